"""Every trace that a table of results/ names is there, or a command is said that makes it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from sim.job.configure import configure
from sim.job.setup import trace_of
from sim.paths import DATA, ROOT
from sim.study.plan import cells, load_study

RESULTS = ROOT / "results"
TEXT = (RESULTS / "README.md").read_text(encoding="utf-8")
DIGITS = 16


def made() -> dict[str, list[str]]:
    """Rows of results/README.md by the beginning of the hash."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line[:1] == "|"]
    return {row[1].strip("`"): row for row in rows if re.fullmatch(rf"`[0-9a-f]{{{DIGITS}}}`", row[1])}


def named(folder: Path) -> dict[str, str]:
    """Trace name by the beginning of its hash, as a study's report and summary have them."""
    found = {}
    for readme in folder.glob("README.md"):
        pattern = rf"^\| (\S+) \| sha256 `([0-9a-f]{{{DIGITS}}})…` \|$"
        found |= {
            sha256: name for name, sha256 in re.findall(pattern, readme.read_text(encoding="utf-8"), re.MULTILINE)
        }
    for summary in folder.glob("summary.json"):
        traces = json.loads(summary.read_text(encoding="utf-8")).get("traces", {})
        found |= {sha256[:DIGITS]: name for name, sha256 in traces.items()}
    return found


def is_assumed(name: str) -> bool:
    """Whether a trace is of no file: a run makes it, the same each time."""
    return name.startswith("assumed:")


def test_assumed_traces_of_a_study_are_those_that_it_makes_now() -> None:
    found = {
        (folder.name, sha256)
        for folder in RESULTS.iterdir()
        for sha256, name in (named(folder).items() if folder.is_dir() else ())
        if is_assumed(name)
    }
    assert found
    for study, sha256 in found:
        cfg = configure([*cells(load_study(study), {})[0].overrides, "compare=none"])
        assert trace_of(cfg).sha256().startswith(sha256)


def test_every_trace_that_a_table_names_is_there_or_can_be_made() -> None:
    there = {hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS] for path in DATA.glob("*.safetensors")}
    folders = [folder for folder in RESULTS.iterdir() if folder.is_dir()]
    cited = {sha256: name for folder in folders for sha256, name in named(folder).items() if not is_assumed(name)}
    assert len(cited) >= 3
    for sha256, name in cited.items():
        if sha256 not in there:
            row = made()[sha256]
            assert row[0] == name
            assert re.match(r"`python -m traces(\.twin)? (import|train) ", row[3])


@pytest.mark.parametrize("name", re.findall(r"traces/data/[\w.-]+", TEXT))
def test_every_short_form_is_there(name: str) -> None:
    assert (ROOT / name).is_file()
