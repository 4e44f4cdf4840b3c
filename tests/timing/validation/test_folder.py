"""Into whose folder a validation writes, what stays there until there is more, and what is told as left undone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from replay.machine.device import Device
from replay.validate import main as validate
from replay.validate import parser
from replay.validation.findings import Findings
from replay.validation.folder import check_own, num_rows

DEVICE = cast(
    Device,
    SimpleNamespace(world="cuda", describe=lambda: {"name": "Test GPU", "torch": "2.11", "dtype": "bfloat16"}),
)


def arguments(out: Path, **changes: Any) -> argparse.Namespace:
    """As the command parses them and fills them in."""
    args = parser().parse_args(["mine", "--out", str(out), "--verify-executions", "1000"])
    vars(args).update(
        {"words": ["mine"], "begun": False, "scale": 1, "models": ["gpt-oss-20b"], "tokens": 8, **changes}
    )
    return args


def findings(out: Path, **changes: Any) -> Findings:
    """Of a validation that begins."""
    return Findings(arguments(out, **changes), DEVICE, out)


def result(out: Path, num_rows: int = 3) -> dict[str, bytes]:
    """Leave in `out` what a finished validation leaves; the bytes by name."""
    summary = {"command": "python -m replay.validate mine", "judged": {"num_rows": num_rows}}
    texts = {"README.md": "# Simulator against x (cpu)\n", "summary.json": json.dumps(summary), "table.csv": "a\n1\n"}
    (out / "logs").mkdir(parents=True)
    for name, text in {**texts, "logs/cpu-lru.parquet": "x", "logs/own.parquet": "y", "notes.md": "z"}.items():
        (out / name).write_text(text)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    """Their bytes by name."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({"README.md": "# My page\n"}, "README.md"),
        # Notes about a result, beside its table and its summary.
        ({"README.md": "# My page\n", "summary.json": '{"command": "python -m replay.validate x"}'}, "README.md"),
        ({"README.md": "# Simulator against x (cpu)\n"}, "README.md"),
        ({"README.md": "# Simulator against x (cpu)\n", "summary.json": "{"}, "README.md"),
        ({"summary.json": '{"command": "something else"}'}, "summary.json"),
        ({"table.csv": "a\n"}, "table.csv"),
        ({"provenance.json": "{}", "metrics.json": "{}"}, "provenance.json"),
    ],
)
def test_a_folder_that_no_validation_has_written_is_refused_and_left_alone(
    there: dict[str, str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in there.items():
        (tmp_path / name).write_text(text)
    before = files(tmp_path)
    assert validate(["h200", "--machine", "cpu", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err == (
        f"error: --out={tmp_path} holds a {named} that no validation has written, and would lose it; give another "
        f"folder, such as --out={tmp_path / 'h200'}\n"
    )
    assert said.out == ""
    assert files(tmp_path) == before


def test_a_page_of_the_projects_own_results_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the name alone leads there."""
    page = tmp_path / "results" / "validation-h200" / "README.md"
    page.parent.mkdir(parents=True)
    page.write_text("# The replay that the device bounds\n")
    monkeypatch.chdir(tmp_path)
    assert validate(["h200", "--machine", "cpu"]) == 2
    assert "such as --out=results/validation-h200/h200" in capsys.readouterr().err
    assert page.read_text() == "# The replay that the device bounds\n"


def test_other_files_and_an_earlier_result_are_no_hindrance(tmp_path: Path) -> None:
    check_own(tmp_path / "new", "mine")
    (tmp_path / "notes.md").write_text("mine")
    check_own(tmp_path, "mine")
    result(tmp_path / "old")
    check_own(tmp_path / "old", "mine")
    assert (num_rows(tmp_path / "old"), num_rows(tmp_path)) == (3, 0)


def test_what_stood_there_goes_when_something_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment in between the folder is known as a validation's."""
    result(tmp_path)
    unlink = Path.unlink

    def checked(self: Path, missing_ok: bool = False) -> None:
        check_own(tmp_path, "mine")
        unlink(self, missing_ok)

    begun = findings(tmp_path)
    monkeypatch.setattr(Path, "unlink", checked)
    begun.begin()
    assert set(files(tmp_path)) == {"README.md", "summary.json", "logs/own.parquet", "notes.md"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["not_shown"] == ["it was still running, after 0 replays", "nothing was compared"]
    assert "- Not shown: it was still running, after 0 replays." in (tmp_path / "README.md").read_text()


def test_what_breaks_off_before_anything_is_measured_leaves_an_earlier_result_alone(tmp_path: Path) -> None:
    before = result(tmp_path)
    assert not findings(tmp_path).broke_off_before("the device was lost")
    assert files(tmp_path) == before


@pytest.mark.parametrize("earlier", [None, 0])
def test_where_no_rows_stand_a_page_says_what_broke_off(tmp_path: Path, earlier: int | None) -> None:
    if earlier is not None:
        result(tmp_path, earlier)
    assert findings(tmp_path).broke_off_before("calibrating: gone")
    assert "- Not shown: it broke off: calibrating: gone." in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["not_shown"][0] == "it broke off: calibrating: gone"
    assert not (tmp_path / "table.csv").exists()


def test_what_the_time_did_not_suffice_for_is_not_shown(tmp_path: Path) -> None:
    found = findings(tmp_path, minutes=4.0)
    found.unlogged, found.breadth_s = ["lru", "oracle"], 121.0
    found.integrity = [{"case": "x", "executions": 999, "checks": 1998, "wrong": 0}]
    assert found.write_all()["not_shown"] == [
        "nothing was compared",
        "every policy and capacity had been measured once only after 121 s, not in half of the 4 minutes",
        "stamps were checked in 999 expert executions of 1,000",
        "the time did not suffice for the lockstep of lru, oracle",
    ]
    found.breadth_s = None
    assert "the 4 minutes did not reach every policy and capacity once" in found.write_all()["not_shown"]
    found.unlogged, found.breadth_s = [], 119.0
    found.integrity[0]["executions"] = 1000
    assert found.write_all()["not_shown"] == ["nothing was compared"]


def test_of_one_that_broke_off_that_is_reason_enough(tmp_path: Path) -> None:
    found = findings(tmp_path)
    found.broke_off = "gone"
    assert found.write_all()["not_shown"] == ["it broke off: gone", "nothing was compared"]
