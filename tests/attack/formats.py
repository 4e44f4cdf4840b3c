"""How each kind of file is taken apart, changed and written: one `Format` a container.

A mutant is made of steps, each with a seed of its own: first what the file says is changed, then how it is written,
then its bytes. Leaving out a step leaves the others as they were, by which a failure is made smaller.
"""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.attack import arrays, gguf, raw, tables, tensors, traces, trees, yamls

Change = Callable[[Random, Any], None]
Writer = Callable[[Random, Any], bytes]


@dataclass(frozen=True)
class Format:
    """parse: the document of a sound file. changes: of the document, in place. write: what it says, honestly.
    lies: ways to write it that do not. raw: changes of the bytes."""

    parse: Callable[[bytes], Any]
    changes: Sequence[Change]
    write: Callable[[Any], bytes]
    lies: Sequence[Writer]
    raw: Sequence[raw.RawOp] = (raw.mutate,)
    copy: Callable[[Any], Any] = copy.deepcopy


@dataclass(frozen=True)
class Mutant:
    """The bytes, and the names of the steps that led to them."""

    content: bytes
    steps: tuple[str, ...]


def steps_of(rng: Random, form: Format) -> list[tuple[int, Any, int]]:
    """(stage, operation, seed) of a mutant: one to three changes, or a lie, or damage, or several of these."""
    kind, steps = rng.random(), []
    if kind < 0.75 or kind >= 0.97:
        steps = [(0, rng.choice(form.changes), rng.getrandbits(32)) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if form.lies and (0.75 <= kind < 0.87 or kind >= 0.98):
        steps.append((1, rng.choice(form.lies), rng.getrandbits(32)))
    if kind >= 0.87:
        steps += [(2, rng.choice(form.raw), rng.getrandbits(32)) for _ in range(rng.choice((1, 1, 2)))]
    return steps


def build(form: Format, document: Any, rng: Random, left_out: Collection[int] = ()) -> Mutant:
    """The mutant of `document` that `rng` draws, without the steps `left_out`."""
    steps = [step for index, step in enumerate(steps_of(rng, form)) if index not in left_out]
    document = form.copy(document)
    write: Callable[[Any], bytes] | None = form.write
    content = b""
    # One generator, seeded anew for each step: making one takes as long as a whole small mutant.
    for stage, operation, seed in steps:
        rng.seed(seed)
        if stage == 0:
            operation(rng, document)
        elif stage == 1:
            content, write = operation(rng, document), None
        else:
            content = operation(rng, content if write is None else write(document))
            write = None
    if write is not None:
        content = write(document)
    return Mutant(content, tuple(operation.__name__ for _, operation, _ in steps))


# -- containers ----------------------------------------------------------------------------------------------

TRACE = Format(
    tensors.parse,
    traces.OPS,
    tensors.write,
    (tensors.mutate_table,),
    (raw.mutate, tensors.mutate_header),
    tensors.Doc.copy,
)
SAFETENSORS = Format(
    tensors.parse,
    tensors.OPS,
    tensors.write,
    (tensors.mutate_table,),
    (raw.mutate, tensors.mutate_header),
    tensors.Doc.copy,
)


def _change_tree(rng: Random, lines: list[Any]) -> None:
    index = rng.randrange(len(lines)) if lines else 0
    lines[index : index + 1] = [trees.mutate(rng, lines[index] if lines else None)]


def _write_lines(lines: list[Any]) -> bytes:
    return "\n".join(map(trees.write, lines)).encode("utf-8", "surrogatepass")


def _repeat_line(rng: Random, lines: list[Any]) -> None:
    lines.insert(rng.randrange(len(lines) + 1), copy.deepcopy(rng.choice(lines)) if lines else trees.Literal(""))


def _reencoded(rng: Random, lines: list[Any]) -> bytes:
    return trees.reencode(rng, _write_lines(lines).decode("utf-8", "surrogatepass"))


def _spaced(rng: Random, lines: list[Any]) -> bytes:
    return trees.space(rng, _write_lines(lines).decode("utf-8", "surrogatepass")).encode("utf-8", "surrogatepass")


def _trees(content: bytes) -> list[Any]:
    return [trees.parse(content)]


def _line_trees(content: bytes) -> list[Any]:
    return [trees.parse(line) for line in content.splitlines() if line.strip()]


# Parsed anew for each mutant, which takes less time than to copy a tree.
JSON = Format(bytes, (_change_tree,), _write_lines, (_spaced, _reencoded), copy=_trees)
JSON_LINES = Format(bytes, (*(_change_tree,) * 4, _repeat_line), _write_lines, (_reencoded,), copy=_line_trees)

_CSV_CHANGES = (
    *(tables.change_cell,) * 3,
    *(tables.change_digit,) * 2,
    *(tables.change_rows,) * 2,
    tables.change_columns,
)
CSV = Format(tables.parse_csv, _CSV_CHANGES, tables.write_csv, (tables.strange_lines,), copy=tables.copy_rows)
LINES = Format(tables.parse_lines, _CSV_CHANGES[:-1], tables.write_csv, (tables.strange_lines,), copy=tables.copy_rows)
NPY = Format(
    arrays.parse_npy,
    (*(arrays.change_array,) * 5, arrays.foreign_type),
    arrays.write_npy,
    (arrays.lie_npy,),
    copy=list,
)
NPZ = Format(
    arrays.parse_npz,
    (*(arrays.change_member,) * 3, arrays.change_members),
    arrays.write_npz,
    (*(arrays.lie_npz,) * 9, arrays.bomb),
    copy=arrays.copy_archive,
)
PARQUET = Format(
    tables.parse_parquet,
    (*(tables.change_value,) * 4, tables.change_type, tables.change_shape, *(tables.change_metadata,) * 2),
    tables.write_parquet,
    (),
    (raw.mutate, tables.footer, tables.footer),
    copy=list,
)
YAML = Format(bytes, (_change_tree,), yamls.write, (yamls.strange,), copy=yamls.parse)
GGUF = Format(gguf.parse, gguf.OPS, gguf.write, (gguf.lie,), copy=gguf.Doc.copy)


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _damage_member(rng: Random, members: dict[str, bytes]) -> None:
    name = rng.choice(sorted(members))
    members[name] = raw.mutate(rng, members[name])


def _lose_member(rng: Random, members: dict[str, bytes]) -> None:
    del members[rng.choice(sorted(members))]


def _damage(rng: Random, parts: list[bytes]) -> None:
    parts[0] = raw.mutate(rng, parts[0])


TORCH = Format(_members, (_damage_member, _damage_member, _lose_member), _zipped, (), copy=dict)
"""A file of torch.save: a zip archive of a pickle and of raw tensors."""
BINARY = Format(lambda content: [content], (_damage,), lambda parts: parts[0], (), copy=list)
BY_SUFFIX: dict[str, Format] = {
    ".pt": TORCH,
    ".bin": BINARY,
    ".gz": BINARY,
    ".safetensors": SAFETENSORS,
    ".json": JSON,
    ".jsonl": JSON_LINES,
    ".csv": CSV,
    ".txt": LINES,
    ".npy": NPY,
    ".npz": NPZ,
    ".parquet": PARQUET,
    ".yaml": YAML,
    ".gguf": GGUF,
}


def of(path: Path) -> Format:
    """The format of a sound file, by its suffix; a file without one is JSON. KeyError where there is none."""
    return JSON if not path.suffix else BY_SUFFIX[path.suffix]
