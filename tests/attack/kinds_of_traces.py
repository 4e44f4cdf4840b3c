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


def read_in_blocks(path: Path) -> Any:
    """The same, a few rows at a time: what a trace of gigabytes meets."""
    from traces import trace as module

    before = module.BLOCK_BYTES
    module.BLOCK_BYTES = 48
    try:
        return read(path)
    finally:
        module.BLOCK_BYTES = before


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
    # The library takes -0 for no size; for JSON it is 0.
    if b"-0" in content[8 : 8 + int.from_bytes(content[:8], "little")]:
        return ""
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
    """A trace among sound ones, opened as one."""

    def __init__(self) -> None:
        self.other = Path()

    def make(self, folder: Path) -> Sequence[Path]:
        """Two files of one kind; the one is attacked, and opened before the other and behind it."""
        doc = traces.bases()[0]
        self.other = folder / "other.safetensors"
        self.other.write_bytes(tensors.write(doc))
        attacked = folder / "attacked.safetensors"
        attacked.write_bytes(tensors.write(doc))
        return [attacked]

    def read(self, path: Path) -> Any:
        """The trace and all its rows."""
        from traces.reader import open_trace

        trace = open_trace([path, self.other, path])
        return trace, {name: np.asarray(array) for name, array in trace.layout_arrays().items()}

    def agrees(self, content: bytes) -> dict[str, trace_oracle.Tensor]:
        """The attacked file. Unsound where it is no trace, or of another kind than the other."""
        meta, found = trace_oracle.check(content)
        other_meta, other = trace_oracle.check(self.other.read_bytes())
        for key in ("model", "num_layers", "num_experts", "top_k"):
            same = meta[key] == other_meta[key] if key == "model" else int(meta[key]) == int(other_meta[key])
            trace_oracle.need(same, f"another {key}")
        if "expert_bytes" in meta and "expert_bytes" in other_meta:
            each = [trace_oracle.each_size(one) for one in (meta, other_meta)]
            trace_oracle.need(each[0] == each[1], "other sizes of experts")
        trace_oracle.need(set(found) == set(other), "other arrays")
        for name, (kind, shape, _) in found.items():
            trace_oracle.need((kind, shape[1:]) == (other[name][0], other[name][1][1:]), f"another {name}")
        trace_oracle.need(max(trace_oracle.values(found["forward_id"])) < 2**61, "no numbers left")
        return found

    def sound(self, content: bytes) -> bool:
        """They may be opened as one."""
        try:
            self.agrees(content)
        except trace_oracle.Unsound:
            return False
        return True

    def recheck(self, content: bytes, read: tuple[Any, dict[str, Any]]) -> str:
        """The rows of the attacked file, of the other, and of the attacked one again; no forward in two of them."""
        trace, arrays = read
        try:
            found = self.agrees(content)
        except trace_oracle.Unsound as error:
            return str(error)
        size = found["experts"][1][0]
        if trace.num_tokens != 2 * size + 6 or trace.request_start[-1] != trace.num_tokens:
            return "rows are missing"
        for part in (arrays["experts"][:size], arrays["experts"][size + 6 :]):
            if part.tobytes() != found["experts"][2]:
                return "experts have other values than the file's"
        forwards = [set(part.tolist()) for part in np.split(arrays["forward_id"], [size, size + 6])]
        return "two files share a forward" if len(set.union(*forwards)) != sum(map(len, forwards)) else ""


class Forwards:
    """A trace as a run takes it: forward after forward, with what is recorded beside the routing."""

    def __call__(self, path: Path) -> Any:
        from traces.batching import BatchConfig, Batches

        trace = read(path)
        found = []
        for forward in Batches(trace, BatchConfig(batch_size=2, prefill_chunk=2)):
            recorded = forward.recorded
            beside = (recorded.embedding(forward.rows), recorded.token_ids(forward.rows))
            ahead = [recorded.lookahead(forward.rows, layer) for layer in range(trace.num_layers)]
            found.append((list(forward.rows), forward.demands, beside, ahead))
        return found

    @staticmethod
    def recheck(content: bytes, forwards: list[Any]) -> str:
        """Each row runs once, and a forward demands in each layer what its rows chose, and nothing else."""
        try:
            meta, found = trace_oracle.check(content)
        except trace_oracle.Unsound as error:
            return str(error)
        num_experts = int(meta["num_experts"])
        padding = (1 << 8 * (1 if found["experts"][0] == "U8" else 2)) - 1
        rows = trace_oracle.values(found["experts"])
        if sorted(row for forward in forwards for row in forward[0]) != list(range(len(rows))):
            return "rows run twice or not at all"
        for at, demands, _, ahead in forwards:
            for layer, keys in enumerate(demands):
                chosen = {expert for row in at for expert in rows[row][layer] if not num_experts <= expert == padding}
                if sorted(keys) != sorted(layer * num_experts + expert for expert in chosen):
                    return f"layer {layer} demands other experts than were chosen"
            for scores in ahead:
                if scores is not None and (scores > 1).any():
                    return "a chance above 1"
        return ""


def kinds() -> list[FileKind]:
    """Those of traces."""
    chained, most = Chained(), 256 * MIB
    form = formats.TRACE
    return [
        FileKind("trace", form, sound_files, read, recheck, sound, "traces", most, batch=2_000),
        FileKind("trace-blocks", form, sound_files, read_in_blocks, recheck, sound, most_bytes=most),
        FileKind("trace-chained", form, chained.make, chained.read, chained.recheck, chained.sound, most_bytes=most),
        FileKind("trace-forwards", form, sound_files, Forwards(), Forwards.recheck, sound, most_bytes=most),
        FileKind("trace-validate", form, sound_files, Command(), recheck_command, sound, most_bytes=most),
    ]
