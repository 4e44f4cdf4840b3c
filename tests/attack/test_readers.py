"""What every reader does with a damaged file: one line, no traceback, no wait, no object that should not be."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.attack.readers import READERS, Reader
from traces.messages import MOST, PREFIX, shortened

SLOW = ("composed", "twin")
"""Of the names of readers that take a second for a file, or to make one."""
TOLERANT = ("done", "kept-scores", "prompts-txt")
"""Readers for whom a damaged file is none, and one that takes any text."""
WHOLE = (
    ("half", "gpt-oss-jsonl"),
    ("half", "prompts-jsonl"),
    ("half", "hardware-yaml"),
    ("half", "hardware-composed"),
    ("half", "study-yaml"),
    ("half", "twin-curve"),
    ("half", "table-binary"),
    ("half", "recognised"),
    ("empty", "prompts-jsonl"),
)
"""What is left of the file is a whole one: lines or records, or keys of which those that are missing may be; to
recognise a file only its beginning is read."""
BY_KEY = ("-yaml", "-composed")
"""Their messages name the key, as those of an override do; which file it stood in is the choice of the user."""


def readers(*, without: tuple[str, ...] = ()) -> list[Any]:
    """As parameters; slow ones marked."""
    return [
        pytest.param(one, id=one.name, marks=[pytest.mark.slow] if any(word in one.name for word in SLOW) else [])
        for one in READERS
        if one.name not in without
    ]


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail instead of waiting without end."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(reader: Reader, path: Path) -> str | None:
    """The line in which the file is refused; None where it is taken. Anything else fails the test."""
    try:
        with within(60):  # of which imports may take some, and a busy machine the rest
            reader.read(path)
    except ValueError as error:
        line = str(error)
        assert line == shortened(line)
        assert len(PREFIX + line) <= MOST
        assert "; " in line or "must" in line or "lacks" in line, line
        for word in ("Errno", "errno", "Traceback", "object has no attribute", "not subscriptable", "<class"):
            assert word not in line, line
        return line
    return None


def check_refused(reader: Reader, path: Path) -> None:
    line = outcome(reader, path)
    if reader.name in TOLERANT:
        return
    assert line is not None, f"{reader.name} takes it"
    assert path.name in line or any(word in reader.name for word in (*BY_KEY, "twin")), line


@pytest.mark.parametrize("reader", readers())
def test_the_valid_file_is_read(reader: Reader, tmp_path: Path) -> None:
    assert outcome(reader, reader.make(tmp_path)) is None


def test_names_are_unique() -> None:
    assert len({reader.name for reader in READERS}) == len(READERS)


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "empty": lambda raw: b"",
    "a byte": lambda raw: raw[:1],
    "half": lambda raw: raw[: len(raw) // 2],
    "zeros": lambda raw: bytes(len(raw)),
    "no UTF-8": lambda raw: b"\xff\xfe" + raw,
    "noise": lambda raw: random.Random(0).randbytes(len(raw)),
    "a pickle": lambda raw: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "depth": lambda raw: b"[" * 200_000,
    "a bomb of tables": lambda raw: b'{"a":' * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", readers())
def test_a_damaged_file_is_one_line(reader: Reader, damage: str, tmp_path: Path) -> None:
    path = reader.make(tmp_path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    if (damage, reader.name) in WHOLE:
        outcome(reader, path)
    else:
        check_refused(reader, path)


def _as_folder(path: Path) -> None:
    path.mkdir()


def _as_pipe(path: Path) -> None:
    os.mkfifo(path)


def _as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _as_broken_link(path: Path) -> None:
    path.symlink_to(path.with_name("absent"))


def _as_circle(path: Path) -> None:
    path.symlink_to(path)


def _as_nothing(path: Path) -> None:
    assert not path.exists()


INSTEAD = [_as_folder, _as_pipe, _as_device, _as_broken_link, _as_circle, _as_nothing]


@pytest.mark.parametrize("instead", INSTEAD, ids=lambda one: one.__name__[1:])
@pytest.mark.parametrize("reader", readers())
def test_what_is_no_file_is_one_line_and_not_waited_for(
    reader: Reader, instead: Callable[[Path], None], tmp_path: Path
) -> None:
    path = reader.make(tmp_path)
    path.unlink()
    instead(path)
    if reader.name == "twin-curve" and not path.exists():
        assert outcome(reader, path) is None  # no curve yet
        return
    if reader.name.endswith("composed") and not path.exists():
        return  # there is then no choice of that name, which Hydra says
    line = outcome(reader, path)
    assert line is not None or reader.name in ("done", "kept-scores")


@pytest.mark.parametrize("reader", readers())
def test_flipped_and_missing_bytes_are_one_line_or_without_consequence(reader: Reader, tmp_path: Path) -> None:
    path = reader.make(tmp_path)
    good, draws = path.read_bytes(), random.Random(1)
    rounds = 6 if any(word in reader.name for word in SLOW) else 60
    for _ in range(rounds):
        raw = bytearray(good)
        for _ in range(draws.choice([1, 2, 8])):
            place = draws.randrange(len(raw))
            if draws.random() < 0.7:
                raw[place] ^= 1 << draws.randrange(8)
            else:
                del raw[place : place + draws.randrange(1, 30)]
            if not raw:
                break
        path.write_bytes(raw)
        outcome(reader, path)
