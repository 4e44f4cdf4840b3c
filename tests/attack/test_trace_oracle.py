"""The second reader of traces finds what the first one does: by tables written for the first, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack import tensors, trace_oracle, traces
from tests.support.traces import HEADER, Arrays, save, sound_arrays
from tests.unit.traces.test_validate import CONTENT, LAYOUT, LISTS, Change


def refused(content: bytes) -> str:
    """What the oracle has against it."""
    with pytest.raises(trace_oracle.Unsound) as found:
        trace_oracle.check(content)
    return str(found.value)


def changed(tmp_path: Path, arrays: Arrays, change: Change) -> bytes:
    header = dict(HEADER)
    change(arrays, header)
    path = tmp_path / "a.safetensors"
    save(path, arrays, header)
    return path.read_bytes()


@pytest.mark.parametrize(("change", "lists"), [(row[1], row in LISTS) for row in [*CONTENT, *LISTS, *LAYOUT]])
def test_what_the_reader_refuses_the_oracle_refuses(tmp_path: Path, change: Change, lists: bool) -> None:
    arrays = sound_arrays(lists)
    assert refused(changed(tmp_path, arrays, change))


def test_sound_traces_of_every_shape_are_taken() -> None:
    for doc in traces.bases():
        meta, found = trace_oracle.check(tensors.write(doc))
        assert meta == doc.meta
        assert {name: array.tobytes() for name, array in doc.tensors.items()} == {n: t[2] for n, t in found.items()}


def test_containers_by_hand() -> None:
    sound = tensors.write(traces.bases()[0])
    length = int.from_bytes(sound[:8], "little")
    assert refused(sound[:15]) == "shorter than any file"
    assert refused(sound[:-1]).endswith("ends past the end")
    assert refused(sound + b"x") == "bytes after the last tensor"
    assert refused((length + 10**6).to_bytes(8, "little") + sound[8:]) == "the header is longer than the file"
    for old, new, told in (
        (b'"dtype"', b'"dtypf"', "has other fields"),
        (b'"U8"', b'"U9"', "has an unknown type"),
        (b'"model": "made-up"', b'"model": "\\ud800"', "a broken character"),
        (b'"model": "made-up"', b'"model": NaN', "NaN is no JSON"),
        (b'"source"', b'"model"', "a key comes twice"),
    ):
        header = sound[8 : 8 + length].replace(old, new, 1)
        assert header != sound[8 : 8 + length]
        assert told in refused(tensors.pack(header, sound[8 + length :]))
