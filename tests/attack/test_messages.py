"""What goes wrong with the file system is said in one line: which file, why, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sim.job.output import write_text
from tests.attack import files
from traces import cli
from traces.files import replace_file, whole_file
from traces.format import About, write_trace
from traces.messages import MOST, PREFIX, TraceError, fault, shortened, told, why

FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*_: object, **__: object) -> Any:
    raise FULL


def write_a_trace(path: Path) -> None:
    write_trace(path, files.trace_arrays(), About("tiny", files.E, "tests", "none"))


def write_parameters(path: Path) -> None:
    from traces.parameters import save_params

    save_params(path, files.params())


def write_metrics(path: Path) -> None:
    write_text(path, "{}\n")


def write_timeline(path: Path) -> None:
    from sim.views.timeline import Timeline

    Timeline("lru", 4).write(path)


def write_picture(path: Path) -> None:
    from matplotlib.figure import Figure

    from sim.views.plots import save

    save(Figure(), path)


def write_events(path: Path) -> None:
    from sim.views.events import EventTable

    EventTable(path, 4).close()


def write_log(path: Path) -> None:
    from tests.lockstep.support import small_header, some_forwards
    from tests.lockstep.support import write_events as write_all

    write_all(path, small_header(), some_forwards())


def write_table_of_runs(path: Path) -> None:
    import pandas as pd

    from sim.collect import write_table

    write_table(pd.DataFrame({"a": [1]}), path.parent, path.stem)


WRITERS: list[Callable[[Path], None]] = [
    write_a_trace,
    write_parameters,
    write_metrics,
    write_timeline,
    write_picture,
    write_events,
    write_log,
    write_table_of_runs,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda one: one.__name__)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.csv"
    path.write_text("before")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError) as caught:
        write(path)
    line = str(caught.value)
    assert line == f"{path}: file: cannot be written (the disk is full); free space, or write to another disk"
    assert path.read_text() == "before"


@pytest.mark.parametrize("write", [write_a_trace, write_parameters, write_metrics], ids=lambda one: one.__name__)
def test_a_disk_that_fills_while_it_is_written_leaves_nothing_behind(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> int:
            self.file.write(content[: len(content) // 2])
            raise FULL

    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: Full(plain(self, mode, *a, **k)))
    with pytest.raises(TraceError, match=r"out\.bin: file: cannot be written \(the disk is full\)"):
        write(tmp_path / "out.bin")
    assert list(tmp_path.iterdir()) == []


def test_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with whole_file(path) as first, whole_file(path) as second:
        assert first.name != second.name
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert [one.name for one in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("absent/a.bin", "does not exist; check the path"),
        ("taken/a.bin", "part of the path is no folder; check the path"),
        ("folder", "is a folder; name a file"),
        ("n" * 300, "the name is too long; use a shorter one"),
    ],
)
def test_where_nothing_can_be_written_the_place_is_named(place: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TraceError) as caught:
        replace_file(tmp_path / place, b"x")
    assert says.replace("; ", "); ") in str(caught.value)
    assert len(PREFIX + str(caught.value)) <= MOST


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, 9999]
)
def test_every_refusal_of_the_system_has_words_and_a_remedy(number: int) -> None:
    problem, remedy = why(OSError(number, os.strerror(number)))
    assert problem
    assert remedy
    line = told(OSError(number, os.strerror(number), "some/file"))
    assert line == f"some/file: {problem}; {remedy}"
    assert "Errno" not in line


def test_what_arrow_hides_in_its_text_is_found() -> None:
    assert why(OSError("Error writing bytes. Detail: [errno 28] No space left on device"))[0] == "the disk is full"


def test_no_line_is_longer_than_it_may_be() -> None:
    long = fault("/a" * 400, "array 'x'", "is " + "9" * 1000, "correct it and write it again")
    assert len(PREFIX + str(long)) <= MOST
    assert str(long).endswith("; correct it and write it again")
    assert str(long).startswith("/a/a")
    assert len(PREFIX + shortened("x" * 5000)) <= MOST
    assert shortened("two\nlines \x1b[31m") == "two lines ?[31m"


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 8 EiB")])
def test_too_little_memory_is_said_without_numpys_words(
    error: MemoryError, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("traces.cli.open_trace", fail)
    assert cli.main(["validate", "x.safetensors"]) == 2
    assert capsys.readouterr().err.startswith("error: there is too little memory for this; use a smaller file")
