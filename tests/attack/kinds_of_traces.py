"""Traces: one file, several as one, and by the command that checks them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from tests.attack import formats, tensors, trace_oracle, traces
from tests.attack.kinds import MIB, FileKind
from tests.attack.outcome import fault_of_message


def sound_files(folder: Path) -> list[Path]:
    """The sound traces."""
    paths = []
    for index, doc in enumerate(traces.bases()):
        paths.append(folder / f"trace{index}.safetensors")
        paths[-1].write_bytes(tensors.write(doc))
    return paths


def read(path: Path) -> Any:
    """As every run reads it."""
    from traces.reader import open_trace

    return open_trace(path)


def sound(content: bytes) -> bool:
    """The oracle finds nothing wrong with the file."""
    try:
        trace_oracle.check(content)
    except trace_oracle.Unsound:
        return False
    return True


def recheck(content: bytes, trace: Any) -> str:
    """The oracle takes the file too, what was read are its bytes, and the library of the format opens it."""
    import safetensors

    try:
        meta, found = trace_oracle.check(content)
    except trace_oracle.Unsound as error:
        return str(error)
    arrays = trace.layout_arrays()
    if trace.header != meta or set(arrays) != set(found):
        return "other names or metadata than the file's"
    for name, (_, shape, data) in found.items():
        if arrays[name].shape != shape or np.ascontiguousarray(arrays[name]).tobytes() != data:
            return f"{name} has other values than the file's"
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        return f"the library of the format refuses it: {error}"
    return ""


class Command:
    """What `python -m traces validate` says of a file: its exit code and what it prints."""

    def __call__(self, path: Path) -> str:
        """The line printed. ValueError with the message where it ends with 2."""
        from traces.cli import main

        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["validate", str(path)])
        told = err.getvalue()
        if code == 2 and not out.getvalue():
            message = told.removesuffix("\n")
            if not message.startswith("error: "):
                raise RuntimeError(f"the message begins otherwise: {message[:200]}")
            raise ValueError(message)
        if code != 0 or told:
            raise RuntimeError(f"exit code {code}, printed {out.getvalue()[:200]!r} and {told[:200]!r}")
        return out.getvalue()


def recheck_command(content: bytes, line: str) -> str:
    """One line that can be printed, about a file that the oracle takes too."""
    if not sound(content):
        return "the oracle refuses it"
    return fault_of_message(line.removesuffix("\n"), ())


class Chained:
    """A trace behind a sound one, opened as one."""

    def __init__(self) -> None:
        self.first = Path()

    def make(self, folder: Path) -> Sequence[Path]:
        """Two files of one kind; the second is attacked."""
        doc = traces.bases()[0]
        self.first = folder / "first.safetensors"
        self.first.write_bytes(tensors.write(doc))
        second = folder / "second.safetensors"
        second.write_bytes(tensors.write(doc))
        return [second]

    def read(self, path: Path) -> Any:
        from traces.reader import open_trace

        return open_trace([self.first, path])

    def agrees(self, content: bytes) -> tuple[dict[str, str], dict[str, trace_oracle.Tensor]]:
        """The second file. Unsound where it is no trace, or of another kind than the first."""
        meta, found = trace_oracle.check(content)
        other_meta, other = trace_oracle.check(self.first.read_bytes())
        for key in ("model", "num_layers", "num_experts", "top_k"):
            same = meta[key] == other_meta[key] if key == "model" else int(meta[key]) == int(other_meta[key])
            trace_oracle.need(same, f"another {key}")
        trace_oracle.need(set(found) == set(other), "other arrays")
        for name, (kind, shape, _) in found.items():
            trace_oracle.need((kind, shape[1:]) == (other[name][0], other[name][1][1:]), f"another {name}")
        return meta, found

    def sound(self, content: bytes) -> bool:
        """The two may be opened as one."""
        try:
            self.agrees(content)
        except trace_oracle.Unsound:
            return False
        return True

    def recheck(self, content: bytes, trace: Any) -> str:
        """Rows of the second stand behind those of the first."""
        try:
            _, found = self.agrees(content)
        except trace_oracle.Unsound as error:
            return str(error)
        size = found["experts"][1][0]
        if trace.num_tokens - size != 6:
            return "rows are missing"
        same = np.ascontiguousarray(trace.experts[6:]).tobytes() == found["experts"][2]
        return "" if same else "experts have other values than the file's"


def kinds() -> list[FileKind]:
    """Those of traces."""
    chained, most = Chained(), 256 * MIB
    return [
        FileKind("trace", formats.TRACE, sound_files, read, recheck, sound, "traces", most, 2_000),
        FileKind("trace-chained", formats.TRACE, chained.make, chained.read, chained.recheck, chained.sound, "each"),
        FileKind("trace-validate", formats.TRACE, sound_files, Command(), recheck_command, sound, "each", most),
    ]
