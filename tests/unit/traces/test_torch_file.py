"""Files of torch.save are read as data: what torch reads of them, within their bytes, and nothing is called."""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces.importers.sglang_recorder import import_sglang_recorder
from traces.messages import TraceError
from traces.torch_file import Unread, read_torch

torch = pytest.importorskip("torch")
REMEDY = "give another"


def saved(tmp_path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, tmp_path / "a.pt", **options)
    return tmp_path / "a.pt"


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None], packed: int = zipfile.ZIP_STORED) -> Path:
    """The archive with its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, content in members.items():
            archive.writestr(f"a/{name}", content)
    return path


def with_pickle(path: Path, change: Callable[[bytes], bytes]) -> Path:
    def of(members: dict[str, bytes]) -> None:
        before = members["data.pkl"]
        members["data.pkl"] = change(before)
        assert members["data.pkl"] != before

    return rewritten(path, of)


VALUES = [
    None,
    True,
    -3,
    1 << 80,
    2.5,
    "text ü",
    b"bytes",
    (),
    (1, 2, 3, 4),
    {"a": [1, [2, {}]], 3: ("x",)},
    [list(range(2000))],
    OrderedDict(a=1),
    torch.Size([2, 3]),
]


# Protocol 2 has no bytes: it would call a codec to make them.
@pytest.mark.parametrize(
    ("protocol", "value"),
    [
        (protocol, value)
        for protocol in (2, 3, 4, 5)
        for value in VALUES
        if protocol > 2 or not isinstance(value, bytes)
    ],
)
def test_plain_values_are_read_as_they_were_saved(protocol: int, value: Any, tmp_path: Path) -> None:
    assert read_torch(saved(tmp_path, value, pickle_protocol=protocol), REMEDY) == value


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"])
def test_tensors_are_what_torch_reads(dtype: str, tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    tensors = [whole, whole.permute(2, 0, 1), whole[1, ::2, 1:3], whole[:0], whole.flatten()[5], whole]
    path = saved(tmp_path, {"all": tensors})
    found, known = read_torch(path, REMEDY)["all"], torch.load(path, weights_only=True)["all"]
    for ours, theirs in zip(found, known, strict=True):
        assert ours.dtype == np.dtype(dtype)
        assert ours.shape == tuple(theirs.shape)
        assert np.array_equal(ours, theirs.numpy())
        assert not ours.flags.writeable or not ours.size


def test_what_numpy_has_no_type_for_is_left_unread(tmp_path: Path) -> None:
    found = read_torch(saved(tmp_path, [torch.ones(3, dtype=torch.bfloat16), torch.ones(3)]), REMEDY)
    assert isinstance(found[0], Unread)
    assert found[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("left", [0, 8, 79, 81])
def test_a_tensor_larger_than_its_bytes_is_refused(left: int, tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path, torch.arange(10)), lambda members: members.update({"data/0": bytes(100)[:left]}))
    with pytest.raises(TraceError, match="holds more than tensors and plain values, or is damaged; give another"):
        read_torch(path, REMEDY)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(b"K\x00K\x07\x85", b"K\x01K\x07\x85", id="offset beyond the end"),
        pytest.param(b"K\x00K\x07\x85", b"J\xff\xff\xff\xffK\x07\x85", id="negative offset"),
        pytest.param(b"K\x00K\x07\x85", b"K\x00K\x08\x85", id="longer than its storage"),
        pytest.param(b"K\x01\x85", b"K\x02\x85", id="stride beyond the end"),
        pytest.param(
            b"K\x07\x85q\x06K\x01\x85", b"J\x00\x00\x00\x40\x85q\x06K\x00\x85", id="one value a billion times"
        ),
        pytest.param(b"K\x01\x85", b"K\x01K\x01\x86", id="more strides than axes"),
        pytest.param(b"K\x07\x85", b"N\x85", id="no number"),
        pytest.param(b"torch LongStorage", b"torch LangStorage", id="unknown storage"),
        pytest.param(b"torch\nLongStorage", b"posix\nsystem     ", id="other name"),
        pytest.param(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9", id="other call"),
        pytest.param(b"storage", b"storago", id="other word"),
        pytest.param(b"Q", b"R", id="called instead"),
        pytest.param(b".", b"", id="no end"),
        pytest.param(b"\x80\x02", b"\x80\x02(", id="mark left over"),
        pytest.param(b"\x80\x02", b"\x80\x02N", id="value left over"),
        pytest.param(b"\x80\x02", b"\x80\x02h\x63", id="nothing kept there"),
        pytest.param(b"\x80\x02", b"\x80\x02u", id="no mark"),
    ],
)
def test_a_pickle_that_says_something_else_is_refused(before: bytes, after: bytes, tmp_path: Path) -> None:
    path = saved(tmp_path, torch.arange(7))
    if before == b"torch LongStorage":
        before, after = b"torch\nLongStorage", b"torch\nLangStorage"
    with_pickle(path, lambda program: after.join(program.rsplit(before, 1)))
    with pytest.raises(TraceError, match="holds more than tensors and plain values, or is damaged; give another"):
        read_torch(path, REMEDY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members.pop("data.pkl"), "no data.pkl"),
        (lambda members: members.pop("data/0"), "has no member 'a/data/0'"),
        (lambda members: members.update(byteorder=b"big"), "was written on a big-endian machine"),
    ],
)
def test_an_archive_that_lacks_something_is_refused(
    change: Callable[[dict[str, bytes]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=message):
        read_torch(rewritten(saved(tmp_path, torch.arange(7)), change), REMEDY)


def test_a_packed_member_is_refused(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path, torch.zeros(1 << 20)), lambda members: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(TraceError, match=r"member 'a/.*': is packed, or larger than the file"):
        read_torch(path, REMEDY)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x05\x06" + bytes(18), b"\x80\x02N.", b"\x00PK"])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(TraceError, match=r"a\.pt: file"):
        read_torch(tmp_path / "a.pt", REMEDY)


def test_an_archive_behind_something_else_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, [1])
    path.write_bytes(b"PK" + path.read_bytes())
    with pytest.raises(TraceError, match=r"is no usable file of torch\.save"):
        read_torch(path, REMEDY)


def test_lists_that_hold_each_other_many_times_are_not_written_out(tmp_path: Path) -> None:
    """Twenty-eight lists of two that are one and the same: 268 million numbers of a file of two kilobytes."""
    ids: Any = [1]
    for _ in range(28):
        ids = [ids, ids]
    many = [[[1] * 5000] * 5000]
    for hostile in (ids, many):
        record = {"rank": 0, "positions": [0], "forward_mode": 1, "topk_ids_of_layer": hostile}
        path = saved(tmp_path, {"records": [record]})
        assert path.stat().st_size < 100_000
        with pytest.raises(TraceError, match=r"record 0: holds lists of (other than whole numbers|more than)"):
            import_sglang_recorder(path, tmp_path / "out.safetensors")


def test_the_oldest_layout_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save([1], buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(TraceError, match=r"is no usable file of torch\.save"):
        read_torch(tmp_path / "a.pt", REMEDY)
