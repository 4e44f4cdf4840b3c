"""GGUF files that are none, damaged, hostile or of other models: one line with file, place and remedy."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFEndian, GGUFValueType

from sim.specs.gguf_header import read_gguf
from tests.attack.gguf import Doc, parse
from tests.attack.gguf import write as bytes_of
from tests.support.gguf_models import Info, dense, ends, gqa, in_parts, tiny, write
from traces.limits import MAX_BYTES
from traces.messages import MOST, PREFIX, TraceError


def sound(folder: Path) -> bytes:
    return write(folder / "sound.gguf", *tiny()).read_bytes()


def refused(path: Path) -> str:
    """The line in which the file is refused."""
    with pytest.raises(TraceError) as error:
        read_gguf(path)
    line = str(error.value)
    assert line.startswith(str(path))
    assert len(line.splitlines()) == 1
    assert "; " in line
    assert len(PREFIX + line) <= MOST
    return line.removeprefix(f"{path}: ")


def of_bytes(folder: Path, content: bytes) -> str:
    path = folder / "m.gguf"
    path.write_bytes(content)
    return refused(path)


def of_changed(folder: Path, change: Callable[[Doc], Any]) -> str:
    """The header with one change, all else honest."""
    doc = parse(sound(folder))
    change(doc)
    return of_bytes(folder, bytes_of(doc))


def key(doc: Doc, name: str) -> list[Any]:
    return next(entry for entry in doc.keys if entry[0].endswith(name))


def tensor(doc: Doc, name: str) -> list[Any]:
    return next(entry for entry in doc.tensors if entry[0] == name)


# -- files ---------------------------------------------------------------------------------------------------


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    assert of_bytes(tmp_path, b'{"a": 1}') == (
        "header: is not a GGUF file (it does not begin with GGUF); give a GGUF file"
    )
    assert "is a ggjt file, the form before GGUF; convert the model anew" in of_bytes(tmp_path, b"tjgg" + bytes(40))
    assert "ends at byte 4" in of_bytes(tmp_path, b"GGUF")


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_a_version_that_is_not_known(version: int, tmp_path: Path) -> None:
    line = of_bytes(tmp_path, b"GGUF" + struct.pack("<I", version) + sound(tmp_path)[8:])
    assert line == f"header: has version {version} of GGUF, known are 2 and 3; convert the model anew"


def test_a_big_endian_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", *tiny(), endianess=GGUFEndian.BIG)
    assert refused(path) == "header: is big-endian; convert it: gguf-convert-endian FILE little"


def test_version_2_has_the_same_form(tmp_path: Path) -> None:
    content = sound(tmp_path)
    (tmp_path / "m.gguf").write_bytes(content[:4] + struct.pack("<I", 2) + content[8:])
    assert read_gguf(tmp_path / "m.gguf").spec.num_layers == 2


def test_a_file_may_end_anywhere_behind_its_header_and_nowhere_in_it(tmp_path: Path) -> None:
    content = sound(tmp_path)
    for length in range(0, len(content), 7):
        line = of_bytes(tmp_path, content[:length])
        assert length < 4 or "fetch more of its beginning" in line, (length, line)
    for tail in (b"", b"\0", bytes(1000)):
        (tmp_path / "m.gguf").write_bytes(content + tail)
        assert read_gguf(tmp_path / "m.gguf").spec.num_layers == 2


def test_where_the_header_ends_too_early_is_said(tmp_path: Path) -> None:
    content = sound(tmp_path)
    at = content.index(b"blk.1.attn_q.weight")
    line = of_bytes(tmp_path, content[: at + 4])
    assert line == (
        f"tensor 10 of {len(tiny()[2])}: ends at byte {at + 4}, in its header, which needs 19 more at byte {at}; "
        "fetch more of its beginning"
    )


# -- hostile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 2**40, 300_000])
def test_counts_are_not_believed(count: int, tmp_path: Path) -> None:
    content = sound(tmp_path)
    for place, what in ((8, "tensors"), (16, "keys")):
        tracemalloc.start()
        line = of_bytes(tmp_path, content[:place] + struct.pack("<Q", count) + content[place + 8 :])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert f"says that it has {count} {what}, at most" in line
        assert peak < 1 << 20


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 10**9])
def test_lengths_of_arrays_and_texts_are_not_believed(length: int, tmp_path: Path) -> None:
    content = sound(tmp_path)
    tokens = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    name = content.index(b"general.name") + len("general.name") + 4
    for place in (tokens, name):
        tracemalloc.start()
        line = of_bytes(tmp_path, content[:place] + struct.pack("<Q", length) + content[place + 8 :])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert "in its header, which needs" in line
        assert peak < 1 << 20


def test_what_a_header_takes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sound(tmp_path))
    monkeypatch.setenv(MAX_BYTES, "5000")
    assert "bytes of memory, at most 5000 are allowed; split it, or allow more" in refused(path)


def test_texts_that_would_take_long_are_not_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    with path.open("wb") as file:
        file.write(head + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, 1 << 30))
        file.truncate(1 << 34)  # a hole on the disk
    assert "brings the texts of the header to 1073741824" in refused(path)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ([2**64 - 1, 1], "has the shape [18446744073709551615, 1]"),
        ([2**62, 512, 8], "has the shape [4611686018427387904, 512, 8]"),
        ([0, 512, 8], "has the shape [0, 512, 8]"),
        ([], "has 0 dimensions, 1 to 4 are allowed"),
        ([1] * 5, "has 5 dimensions, 1 to 4 are allowed"),
        ([255, 512, 8], "has rows of 255, no multiple of the 256 that a block of Q4_K holds"),
    ],
)
def test_shapes_that_cannot_be(shape: list[int], told: str, tmp_path: Path) -> None:
    def change(doc: Doc) -> None:
        tensor(doc, "blk.1.ffn_up_exps.weight")[1] = shape

    assert f"tensor 'blk.1.ffn_up_exps.weight': {told}" in of_changed(tmp_path, change)


@pytest.mark.parametrize("kind", [4, 5, 31, 38, 42, 2**32 - 1])
def test_a_type_that_is_not_known(kind: int, tmp_path: Path) -> None:
    line = of_changed(tmp_path, lambda doc: tensor(doc, "blk.1.ffn_up_exps.weight").__setitem__(2, kind))
    assert f"has the type {kind}, which the installed package gguf does not know; update it" in line


def test_tensors_that_overlap_or_leave_a_hole(tmp_path: Path) -> None:
    content = sound(tmp_path)
    name = b"blk.1.ffn_up_exps.weight"
    place = content.index(name) + len(name) + 4 + 3 * 8 + 4
    (offset,) = struct.unpack_from("<Q", content, place)
    for wrong in (offset - 32, offset + 32, 0, 2**63):
        line = of_bytes(tmp_path, content[:place] + struct.pack("<Q", wrong) + content[place + 8 :])
        assert f"begins at byte {wrong} of the data, the tensors before it end at byte {offset}" in line


def test_names_that_come_twice(tmp_path: Path) -> None:
    def tensors(doc: Doc) -> None:
        doc.tensors[3][0] = doc.tensors[2][0]

    assert "tensor 'output.weight': comes twice" in of_changed(tmp_path, tensors)
    assert "key 'deepseek.expert_count': comes twice" in of_changed(
        tmp_path, lambda doc: doc.keys.append(key(doc, ".expert_count"))
    )


def test_arrays_of_arrays_and_types_of_keys_that_are_none(tmp_path: Path) -> None:
    array = ["x", 9, (9, [(4, [1])])]
    assert "key 'x': has the type 9, known are 0 to 12, and no arrays of arrays" in of_changed(
        tmp_path, lambda doc: doc.keys.append(array)
    )
    assert "key 'x': has the type 13" in of_changed(tmp_path, lambda doc: doc.keys.append(["x", 13, 0]))
    assert "key 'x': is a truth value of 2" in of_changed(tmp_path, lambda doc: doc.keys.append(["x", 7, 2]))


def test_names_that_are_no_text_or_endless(tmp_path: Path) -> None:
    assert "has a name that is not UTF-8 text" in of_changed(
        tmp_path, lambda doc: doc.tensors[0].__setitem__(0, b"\xff\xfe")
    )
    assert "has a name of 5000 bytes, at most 127 are allowed" in of_changed(
        tmp_path, lambda doc: doc.tensors[0].__setitem__(0, "x" * 5000)
    )
    assert "has no name" in of_changed(tmp_path, lambda doc: doc.keys[3].__setitem__(0, ""))


@pytest.mark.parametrize("alignment", [0, 3, 2**31])
def test_an_alignment_that_is_no_power_of_two(alignment: int, tmp_path: Path) -> None:
    line = of_changed(tmp_path, lambda doc: doc.keys.append(["general.alignment", 4, alignment]))
    assert f"key 'general.alignment': is {alignment}, no power of two" in line


# -- other models --------------------------------------------------------------------------------------------


def test_a_model_without_experts(tmp_path: Path) -> None:
    tensors = [*ends(256, 1000), *gqa(0, 256, 8, 2, 32), *dense(0, 256, 512)]
    path = write(tmp_path / "m.gguf", "qwen3", {".block_count": 1, ".embedding_length": 256}, tensors)
    assert refused(path) == (
        "file: has 0 experts (architecture qwen3); give a Mixture-of-Experts model: only their offloading is simulated"
    )


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_what_is_no_model(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", *tiny(**{"general.type": kind}))
    assert refused(path) == f"key 'general.type': is {kind!r}, no model; give the model itself"


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    arch, keys, _ = tiny()
    path = write(tmp_path / "m.gguf", arch, keys, [])
    assert "block 0: has no tensors, the file says it has 3 blocks" in refused(path)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (".expert_used_count", 9, "key 'deepseek.expert_used_count': is 9, a whole number from 1 to 8 is needed"),
        (".expert_used_count", None, "file: lacks the key deepseek.expert_used_count"),
        (".block_count", 2, "tensor 'blk.2.attn_q.weight': is of block 2, the file says it has 2"),
        (".block_count", 4, "block 3: has no tensors, the file says it has 4 blocks"),
        (".block_count", 5000, "key 'deepseek.block_count': is 5000, a whole number from 1 to 4096 is needed"),
        (".block_count", "3", "key 'deepseek.block_count': is '3', a whole number"),
        (
            ".embedding_length",
            512,
            "tensor 'token_embd.weight': has the shape [256, 1000], and the model a width of 512",
        ),
        (".expert_count", 16, "has the shape [256, 512, 8], not that of 16 matrices"),
        (".attention.head_count_kv", 4, "has the shape [256, 64], and by the keys 4 KV heads of width 32"),
        (".attention.head_count_kv", [2, 2], "has 2 values, of 3 blocks"),
        (".attention.head_count_kv", [2.0, 2.0, 1.5], "is 2.0, a whole number"),
        ("general.architecture", "", "is '', no name"),
    ],
)
def test_keys_that_do_not_fit(name: str, value: Any, told: str, tmp_path: Path) -> None:
    arch, keys, tensors = tiny(**{} if name == "general.architecture" else {name: value})
    if name == "general.architecture":
        doc = parse(write(tmp_path / "m.gguf", arch, keys, tensors).read_bytes())
        key(doc, "general.architecture")[2] = value
        assert told in of_bytes(tmp_path, bytes_of(doc))
    else:
        assert told in refused(write(tmp_path / "m.gguf", arch, keys, tensors))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blk.1.ffn_up_exps.weight", "block 1: has of its experts ffn_down_exps, ffn_gate_exps alone"),
        ("blk.1.ffn_down_exps.weight", "block 1: has of its experts ffn_gate_exps, ffn_up_exps alone"),
        ("blk.1.ffn_gate_exps.weight", "file: an expert has 2 and 3 matrices in different blocks"),
        ("blk.1.ffn_gate_inp.weight", "block 1: has experts and no router (ffn_gate_inp)"),
        ("blk.1.attn_output.weight", "block 1: has attention and no attn_output"),
        ("blk.0.ffn_down.weight", "block 0: has one of ffn_up and ffn_down alone"),
        ("blk.2.ffn_up_shexp.weight", "block 2: has one of ffn_up_shexp and ffn_down_shexp alone"),
        ("token_embd.weight", "file: has no tensor token_embd.weight"),
    ],
)
def test_a_matrix_that_is_missing(name: str, told: str, tmp_path: Path) -> None:
    arch, keys, tensors = tiny()
    path = write(tmp_path / "m.gguf", arch, keys, [info for info in tensors if info.name != name])
    assert told in refused(path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blk.x.ffn_norm.weight", "is of no block that has a number"),
        ("blk.01.ffn_norm.weight", "is of no block that has a number"),
        ("blk.1.ffn_up_gate_exps.weight", "block 1: has ffn_gate_up_exps beside ffn_gate_exps or ffn_up_exps"),
        ("blk.1.ffn_up.3.weight", "is one of 1 of its kind, and there are 8 experts"),
    ],
)
def test_a_tensor_too_many(name: str, told: str, tmp_path: Path) -> None:
    arch, keys, tensors = tiny()
    assert told in refused(write(tmp_path / "m.gguf", arch, keys, [*tensors, Info(name, (256, 1024, 8), "F16")]))


def test_experts_whose_matrices_do_not_fit_each_other(tmp_path: Path) -> None:
    arch, keys, tensors = tiny()
    other = [i._replace(shape=(256, 768, 8)) if i.name == "blk.1.ffn_up_exps.weight" else i for i in tensors]
    line = refused(write(tmp_path / "m.gguf", arch, keys, other))
    assert "block 1: has experts of 512 to 256 (ffn_down) and of 256 to 768 (ffn_up)" in line


# -- parts ---------------------------------------------------------------------------------------------------


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = in_parts(tmp_path, "m", tiny(), 20)
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(
        TraceError, match=r"m-00002-of-00002.gguf: file: says that it is part 0 \(from 0\) of 2; give the"
    ):
        read_gguf(first)
    second.write_bytes(content)
    alone = tmp_path / "alone.gguf"
    first.rename(alone)
    assert refused(alone) == (
        "file: is one of 2 parts by its key split.count; give the parts the names that they had, …-00001-of-00003.gguf"
    )
    assert "is part 2 of 2, and m-00001-of-00002.gguf, which has the keys, is not beside it; fetch" in refused(second)


def test_a_part_whose_sibling_is_damaged_names_the_sibling(tmp_path: Path) -> None:
    first, second = in_parts(tmp_path, "m", tiny(), 20)
    second.write_bytes(b"GGUF")
    with pytest.raises(TraceError, match=r"m-00002-of-00002.gguf: header: ends at byte 4"):
        read_gguf(first)


def test_no_whole_block_with_experts_in_the_parts_that_are_there(tmp_path: Path) -> None:
    first, second = in_parts(tmp_path, "m", tiny(), 20)
    second.unlink()
    assert "no block with experts is whole in the parts that are there; fetch m-00002-of-00002.gguf, too" in refused(
        first
    )


def test_a_tensor_that_stands_in_two_parts(tmp_path: Path) -> None:
    arch, keys, tensors = tiny()
    first, second = in_parts(tmp_path, "m", (arch, keys, tensors), 20)
    doc = parse(second.read_bytes())
    doc.tensors[-1][0] = "token_embd.weight"
    second.write_bytes(bytes_of(doc))
    assert "tensor 'token_embd.weight': stands in two of its parts" in refused(first)
