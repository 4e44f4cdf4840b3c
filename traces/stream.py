"""Writing a trace while it is recorded: rows go to disk request by request, memory does not grow with tokens.

Beside the target stands the folder `.<name>.recording` with one raw file per array and a journal. The journal is
replaced atomically after each whole request and says how much of each file counts, so that a recording that was
killed is good up to its last whole request (of a lost machine only what its file system had written). Closing
assembles the trace through `traces.format.write_trace`, with all its checks. While it does, the disk holds the rows
twice. Knows nothing of where the rows come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.container import DTYPE_NAMES, Array, TraceError, fault
from traces.files import replace_text, unwritable, writing
from traces.format import About, checked_trace, write_trace
from traces.journal import CONFIG, JOURNAL, JOURNAL_VERSION, LABELS, TAKEN, Journal
from traces.layout import PER_REQUEST, PER_TOKEN
from traces.processes.whole import remove_folder

try:
    import fcntl
except ImportError:  # pragma: no cover - not on this system: two recordings of one file are then not told apart
    fcntl = None  # type: ignore[assignment]

_LOCK = "lock"


class TraceWriter:
    """A trace that grows by whole requests; `close` makes the file, `recover` what a killed writer left.

    path: the trace to write; it appears when `close` returns, never in part. model, num_experts, source, license,
    moe_layer_ids and further keywords: as of `write_trace`; `header` may be changed until `close`, except that its
    keys stay strings. As a context manager it closes on success and, on an exception, leaves what was written for
    `recover`.

    config: the text of the model's config.json, which is put beside the trace (`config_of`) when that is made.

    Arrays may come in variants, `name@variant`: of these only the ones of the attribute `variant`, as it is when the
    trace is closed, enter the trace, as `name`. TraceError where a recording of this path is unfinished or running.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: str,
        num_experts: int,
        source: str,
        license: str,
        moe_layer_ids: Sequence[int] | None = None,
        config: str | None = None,
        **header: str,
    ) -> None:
        self.path = Path(path)
        self.header: dict[str, str] = dict(header)
        self.variant = ""
        self.num_requests = self.num_tokens = 0
        self._facts: dict[str, Any] = {
            "model": model,
            "num_experts": int(num_experts),
            "source": source,
            "license": license,
            "moe_layer_ids": None if moe_layer_ids is None else [int(layer) for layer in moe_layer_ids],
        }
        self._columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._files: dict[str, Any] = {}
        self._has_labels: bool | None = None
        self._labels_end = 0
        self._folder = folder_of(self.path)
        if not self.path.parent.is_dir():
            raise fault(self.path, "file", f"the folder {self.path.parent} does not exist", "create it first")
        if self.path.is_dir():
            raise fault(self.path, "file", "is a folder", "name a file in it")
        try:
            self._folder.mkdir()
        except FileExistsError:
            raise unfinished(self.path) from None
        except OSError as error:
            raise unwritable(self.path, error) from None
        self._lock = _lock(self.path, self._folder)
        if config is not None:
            replace_text(self._folder / CONFIG, config)

    def append(
        self,
        *,
        prompt_len: int,
        context_len: int | None = None,
        label: str | None = None,
        **arrays: npt.ArrayLike | None,
    ) -> None:
        """Check one request and add it; it is on disk when this returns.

        arrays: the per-token arrays of the layout, one row a token ([n,L,K] experts and so on, None left out),
        also as `name@variant` (through `**{…}`). All requests must give the same arrays, with the same shapes but
        for n, and agree in giving labels and context_len. TraceError, and nothing written, on a faulty request.
        """
        if self._lock is None:
            raise fault(self.path, "file", "is closed already", "make a new TraceWriter")
        place = f"{self.path} (request {self.num_requests})"
        rows = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
        stored = self._checked(place, rows, prompt_len, context_len, label)
        columns = {name: (array.dtype, array.shape[1:]) for name, array in stored.items()}
        if not self.num_requests:
            self._columns, self._has_labels = columns, label is not None
        elif columns != self._columns or self._has_labels != (label is not None):
            raise fault(place, "arrays", _difference(columns, self._columns), "give the same arrays with each request")
        with writing(self.path):
            self._write(stored, label)
        self._write_journal(self.num_requests + 1, self.num_tokens + len(rows["experts"]))
        self.num_requests += 1
        self.num_tokens += len(rows["experts"])
        self._labels_end = self._files[LABELS].tell() if self._has_labels else 0

    def close(self) -> Path:
        """Assemble the trace; the path written. TraceError if it would hold no request, or the disk is full."""
        if self._lock is None:
            raise fault(self.path, "file", "is closed already", "make a new TraceWriter")
        if not self.num_requests:
            self.abort()
            raise fault(self.path, "file", "would hold no request", "append at least one")
        self._write_journal(self.num_requests, self.num_tokens)
        self._release()
        return TraceWriter.recover(self.path, recovered=False)

    def abort(self) -> None:
        """Throw away what was written."""
        self._release()
        remove_folder(self._folder)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        if kind is None:
            self.close()
        elif self.num_requests:
            self._release()
        else:
            self.abort()

    @staticmethod
    def recover(path: str | Path, *, recovered: bool = True) -> Path:
        """Assemble the trace of a recording that was killed, up to its last whole request; the path written.

        The header says `recovered=true` (`recovered=False` leaves that out). The folder of the recording is deleted
        once the trace stands. TraceError where there is none, it is still running, has no whole request, or is
        spoiled.
        """
        path = Path(path)
        folder = folder_of(path)
        if not folder.is_dir():
            raise fault(path, "file", f"no unfinished recording of it: {folder} does not exist", "check the path")
        lock = _lock(path, folder)
        try:
            journal = Journal(folder)
            arrays = journal.arrays()
            header = dict(journal.header) | ({"recovered": "true"} if recovered else {})
            about = About(**journal.facts, request_labels=journal.labels(), header=header)
            config = journal.config()
            if config is not None:
                # Before the trace: with the trace a recording is complete.
                replace_text(config_of(path), config)
            write_trace(path, arrays, about)
        finally:
            lock.close()
        remove_folder(folder)
        return path

    @staticmethod
    def discard(path: str | Path) -> None:
        """Remove what a killed writer of `path` left, if anything. TraceError where one is running."""
        folder = folder_of(Path(path))
        if folder.is_dir():
            lock = _lock(Path(path), folder)
            remove_folder(folder)
            lock.close()

    # -- one request -------------------------------------------------------------------------------------------

    def _checked(
        self, place: str, rows: Mapping[str, Array], prompt_len: int, context_len: int | None, label: str | None
    ) -> dict[str, Array]:
        """The arrays of one request in the types they are stored in, every variant checked as a trace of its own."""
        for name in rows:
            plain, at, variant = name.partition("@")
            if plain not in PER_TOKEN or (at and not variant.isidentifier()):
                raise fault(place, f"array {name!r}", "is unknown", f"known are {', '.join(PER_TOKEN)}")
        if taken := sorted(self.header.keys() & TAKEN):
            raise fault(place, "header", f"{taken[0]} is the name of a keyword of its own", "call it something else")
        if "experts" not in rows or rows["experts"].ndim != 3 or not len(rows["experts"]):
            raise fault(place, "experts", "is missing or holds nothing", "give [n, L, K] with n of at least 1")
        stored: dict[str, Array] = {
            "request_rows": np.array([len(rows["experts"])], np.int64),
            "prompt_len": np.array([prompt_len], np.int32),
        }
        context = None if context_len is None else [context_len]
        if context is not None:
            stored["context_len"] = np.array(context, np.int32)
        requests = {"request_start": [0, len(rows["experts"])], "prompt_len": [prompt_len], "context_len": context}
        about = About(**self._facts, request_labels=None if label is None else [label], header=dict(self.header))
        for variant in sorted({name.partition("@")[2] for name in rows if "@" in name}) or [""]:
            named = {name: array for name, array in rows.items() if name.partition("@")[2] in ("", variant)}
            trace = checked_trace(
                Path(place),
                {name.partition("@")[0]: array for name, array in named.items()} | requests,
                about,
            )
            found = trace.layout_arrays()
            stored |= {name: found[name.partition("@")[0]] for name in named}
        return stored

    def _write(self, stored: Mapping[str, Array], label: str | None) -> None:
        for name, array in stored.items():
            file = self._file(f"{name}.raw")
            dtype, row = self._columns[name]
            # A request that failed half-way (disk full) may have left bytes: each write starts where rows end.
            rows = self.num_requests if name in PER_REQUEST or name == "request_rows" else self.num_tokens
            file.seek(rows * int(np.prod(row, dtype=np.int64)) * dtype.itemsize)
            file.write(np.ascontiguousarray(array).data)
            file.flush()
        if label is not None:
            file = self._file(LABELS)
            file.seek(self._labels_end)
            file.write(json.dumps(label).encode() + b"\n")
            file.flush()

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("wb")
        return self._files[name]

    def _write_journal(self, num_requests: int, num_tokens: int) -> None:
        journal = {
            "version": JOURNAL_VERSION,
            "num_requests": num_requests,
            "num_tokens": num_tokens,
            "facts": self._facts,
            "header": self.header,
            "variant": self.variant,
            "has_labels": bool(self._has_labels),
            "columns": {name: [DTYPE_NAMES[dtype], list(row)] for name, (dtype, row) in self._columns.items()},
        }
        replace_text(self._folder / JOURNAL, json.dumps(journal), sync=False)

    def _release(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._lock is not None:
            self._lock.close()
        self._lock = None


def folder_of(path: Path) -> Path:
    """Where the rows of a recording of `path` are kept until it is closed."""
    return path.with_name(f".{path.name}.recording")


def unfinished(path: Path) -> TraceError:
    """The fault of a recording of `path` that begins where an earlier one has not ended."""
    problem = f"an unfinished recording of it lies in {folder_of(path)}"
    remedy = "finish it with TraceWriter.recover (python -m traces record --recover), or delete that folder"
    return fault(path, "file", problem, remedy)


def config_of(path: str | Path) -> Path:
    """Where the configuration of the model stands that was recorded into `path`: a run takes the sizes of a model from
    there of which none are known."""
    return Path(path).with_suffix(".config.json")


def _lock(path: Path, folder: Path) -> Any:
    """Open the lock file of the recording, which keeps other processes off it; the lock ends with the process."""
    try:
        file = (folder / _LOCK).open("wb")
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise fault(path, "file", "is being recorded by another process", "wait for it, or end it") from None
    except OSError as error:
        raise unwritable(path, error) from None
    return file


def _difference(columns: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    for name in sorted({*columns, *first}):
        if columns.get(name) != first.get(name):
            shown = [
                ("absent" if item is None else f"{item[0]} {list(item[1])}")
                for item in (columns.get(name), first.get(name))
            ]
            return f"{name} is {shown[0]}, in the first request it was {shown[1]}"
    return "some requests have a label and some have none"
