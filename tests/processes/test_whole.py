"""Files that appear whole or not at all, and what killed processes leave of them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from traces.files import replace_file
from traces.messages import TraceError
from traces.processes import whole
from traces.processes.whole import Unfinished, abandon_all, clear, remove_folder

ROOT = Path(__file__).parents[2]
OPENS = "import sys, time; from traces.processes.whole import Unfinished; u = Unfinished(sys.argv[1], {}); {}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_writer(target: Path, folder: bool = False) -> Path:
    """What a process has left of `target` that was killed while it wrote."""
    rest = "print(u.path, flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", OPENS.format(folder, rest), str(target)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    assert left.exists()
    clear(target.parent)
    assert left.exists(), "it lives"
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    return left


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path, folder: bool) -> None:
    left = killed_writer(tmp_path / "a [b]*?.json", folder)
    if folder:
        (left / "part").write_text("half")
    mine = Unfinished(tmp_path / "a [b]*?.json", folder)
    assert not left.exists()
    assert names(tmp_path) == [mine.path.name]
    Unfinished(tmp_path / "other").abandon()
    clear(tmp_path)
    assert names(tmp_path) == [mine.path.name]
    mine.abandon()
    assert names(tmp_path) == []


def test_a_name_is_cleared_alone_and_other_files_of_such_names_stay(tmp_path: Path) -> None:
    for name in (".a.0123abcd.tmp", ".b.0123abcd.tmp", ".a.tmp", "a.0123abcd.tmp", ".a.0123ABCD.tmp", ".a.lock"):
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / ".a.00000000.tmp")
    (tmp_path / ".a.11111111.tmp").symlink_to(tmp_path / ".a.lock")
    clear(tmp_path, "a")
    assert ".a.0123abcd.tmp" not in names(tmp_path)
    clear(tmp_path)
    kept = {".a.tmp", "a.0123abcd.tmp", ".a.0123ABCD.tmp", ".a.lock", ".a.11111111.tmp"}
    assert kept <= set(names(tmp_path))
    assert ".b.0123abcd.tmp" not in names(tmp_path)


def test_it_is_finished_on_success_and_gone_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with Unfinished(target) as unfinished:
        unfinished.path.write_text("first")
        assert not target.exists()

    def broken_off() -> None:
        with Unfinished(target) as unfinished:
            unfinished.path.write_text("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert (names(tmp_path), target.read_text()) == (["file"], "first")


def test_the_file_has_the_rights_that_the_user_gives_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", b"text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_an_error_names_the_target(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No such file or directory: .*/none/file'"):
        Unfinished(tmp_path / "none" / "file")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    with pytest.raises(IsADirectoryError):
        Unfinished(tmp_path / "taken")
    assert names(tmp_path) == ["taken"]


def test_many_writers_of_one_file_leave_one_whole(tmp_path: Path) -> None:
    contents = [bytes([number]) * 50_000 for number in range(16)]

    def write(content: bytes) -> None:
        for _ in range(20):
            replace_file(tmp_path / "file", content)
            assert (tmp_path / "file").read_bytes() in contents

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    assert names(tmp_path) == ["file"]


def test_a_folder_goes_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "part").touch()
    seen: list[list[str]] = []
    monkeypatch.setattr(whole.shutil, "rmtree", lambda path, **_: seen.append([path.name, *names(path)]))
    remove_folder(folder)
    assert not folder.exists()
    ((name, *parts),) = seen
    assert name.startswith(".folder.")
    assert parts == ["part"]
    monkeypatch.undo()
    clear(tmp_path)
    assert names(tmp_path) == []
    remove_folder(folder)


def test_all_that_is_open_can_be_abandoned(tmp_path: Path) -> None:
    Unfinished(tmp_path / "none").finish()
    held = [Unfinished(tmp_path / name) for name in "ab"]
    abandon_all()
    assert names(tmp_path) == ["none"]
    assert held


def test_where_there_are_no_locks_nothing_is_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(whole.fcntl, "flock", refuse)
    left = killed_or_not = tmp_path / ".file.0123abcd.tmp"
    left.touch()
    replace_file(tmp_path / "file", b"text")
    assert (killed_or_not.exists(), (tmp_path / "file").read_text()) == (True, "text")


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    for name, leads_to in (("near", "there/file"), ("far", "near"), ("dangling", "there/new")):
        (tmp_path / name).symlink_to(leads_to)
        with Unfinished(tmp_path / name) as unfinished:
            assert unfinished.path.parent == tmp_path / "there"
            unfinished.path.write_text(name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "there" / ("new" if name == "dangling" else "file")).read_text() == name
    (tmp_path / "twin").symlink_to("there/twin")
    for text in "ab":
        remove_folder(tmp_path / "twin")
        with Unfinished(tmp_path / "twin", folder=True) as unfinished:
            (unfinished.path / "part").write_text(text)
        assert (tmp_path / "there" / "twin" / "part").read_text() == text
    assert names(tmp_path / "there") == ["file", "new", "twin"]


def test_what_is_no_file_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    before = names(tmp_path)
    for name in ("pipe", "to_pipe", "device", "loop"):
        problem = "lead in a circle" if name == "loop" else "a device, a pipe or a socket"
        with pytest.raises(TraceError, match=rf"/{name}: file: cannot be written \(.*{problem}\); .+") as refused:
            replace_file(tmp_path / name, b"text")
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(NotADirectoryError):
        Unfinished(tmp_path / "file", folder=True)
    assert names(tmp_path) == before
    assert (tmp_path / "pipe").is_fifo()
