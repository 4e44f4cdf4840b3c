"""What the pages name is there, and what README prints and tabulates is what the code and a result say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hydra.errors import ConfigCompositionException
from matplotlib.image import imread

from sim.job.configure import configure

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
TOP = "expertflow|sim|replay|traces|conf|tests|results|docs|notebooks"
MADE = {
    "expertflow/_core/",
    "sim/conf",
    "sim/conf/",
    "conf/policy/PART/",
    "results/validation-mine/",
    "results/validation-NAME",
}
"""Named as what a command writes, what only a wheel has, or with a word in place of a name."""


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links and pictures that stay within the project."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """What a link can point at in a page: its headings as GitHub names them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def missing(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for target in links(text):
        name, _, anchor = unquote(target).partition("#")
        there = page.parent / name if name else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert missing(page, prose(page)) == []


def test_a_link_that_leads_nowhere_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "# One head\n[a](page.md#one-head) [b](#one-head) [c](https://example.org) [d](gone.md) ![e](page.md#two)"
    page.write_text(text)
    assert missing(page, text) == ["gone.md", "page.md#two"]


# CONTRIBUTING names the files that its example makes.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    named = re.findall(rf"`((?:{TOP})/[\w./-]*)`", prose(page))
    assert [name for name in named if name not in MADE and not (ROOT / name).exists()] == []


@pytest.mark.parametrize(("page", "lines"), [(README, 150), (ROOT / "results" / "LOG.md", None)], ids=["README", "LOG"])
def test_no_line_is_longer_than_a_screen_and_readme_is_short(page: Path, lines: int | None) -> None:
    text = page.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(text, 1) if len(line) > 120] == []
    assert lines is None or len(text) <= lines


def test_the_index_of_the_docs_names_every_page() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(links(prose(ROOT / "docs" / "README.md")))


def test_every_key_of_metrics_json_is_explained() -> None:
    runs = json.loads((ROOT / "tests" / "golden" / "runs.json").read_text(encoding="utf-8"))["runs"].values()
    keys = {key for run in runs for key in run["metrics"]}
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert len(keys) > 40
    assert [key for key in sorted(keys) if f"`{key}`" not in text and f"`{key.partition('.')[0]}`" not in text] == []


# -- commands ------------------------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page, a line that goes on after a backslash as one."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\\\n\s*", "", block) for block in found]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's shell blocks."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(step, comments=True) for line in lines for step in line.split("&&")]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_module_that_a_page_runs_is_there(page: Path) -> None:
    modules = set(re.findall(rf"python3? -m ((?:{TOP})[a-z_.]*[a-z_])", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []


SIMULATIONS = [
    (page.name, words)
    for page in [README, *sorted((ROOT / "docs").glob("*.md"))]
    for command in commands(page)
    if "sim" in command[:4] and "--config-dir" not in command and (words := command[command.index("sim") + 1 :])
]


@pytest.mark.parametrize(("page", "words"), SIMULATIONS, ids=lambda value: " ".join(value)[:60])
def test_every_simulation_that_the_docs_show_is_a_configuration(page: str, words: list[str]) -> None:
    overrides = [word for word in words if word != "-m" and not word.startswith("hydra.")]
    # Of a sweep the first of each list.
    first = [re.sub(r",.*", "", word) if "-m" in words else word for word in overrides]
    assert configure(first)["policy"]["name"]


def test_the_docs_show_simulations_and_a_wrong_one_would_be_found() -> None:
    assert len(SIMULATIONS) >= 10
    with pytest.raises(ConfigCompositionException):
        configure(["+hardware=a100", "+policy=adaptive", "policy/evicton=lru"])


@pytest.mark.slow
def test_the_policy_part_that_the_docs_show_runs(tmp_path: Path) -> None:
    page = ROOT / "docs" / "policies.md"
    (code,) = blocks(page, "python")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mru.py").write_text(code, encoding="utf-8")
    (words,) = [command for command in commands(page) if any("mine.mru" in word for word in command)]
    assert words[:3] == ["python", "-m", "sim"]
    words = [sys.executable, *words[1:], "max_tokens=8", "compare=none", f"hydra.run.dir={tmp_path / 'out'}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, timeout=120, check=True)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["num_evictions"] > 0


# -- README's figures ----------------------------------------------------------------------------------------


def test_readmes_table_is_what_the_result_says() -> None:
    table = pd.read_csv(ROOT / "results" / "headline" / "table.csv")
    table = table[table["stack"] == "eager"].set_index(["policy", "residency"])
    section = README.read_text(encoding="utf-8").split("## What a policy is worth\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", section, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["on_demand", "lru", "two_level", "adaptive", "oracle"]
    for name, cells in rows:
        for cell, residency in zip(cells.split(" | "), (0.25, 0.5, 0.75), strict=True):
            row, base = table.loc[(name, residency)], table.loc[("on_demand", residency)]
            left = 100 * row["stall_ms_per_token"] / base["stall_ms_per_token"]
            assert cell == f"{row['tpot_ms']:.2f} ({left:.1f} %)"
    assert f"No schedule is faster than {table['floor_ms_per_token'].max():.3f} ms." in section


@pytest.mark.slow
def test_readme_prints_what_the_first_command_prints(tmp_path: Path) -> None:
    section = README.read_text(encoding="utf-8").split("## What the command prints\n", 1)[1]
    shown = re.search(r"^```text\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert shown is not None
    command = [sys.executable, "-m", "sim", "+hardware=a100", "+policy=adaptive", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=True)
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    assert printed[:-1] == shown[1].splitlines()
    assert printed[-1].startswith("written to ")


# -- pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["headline", "first-table"])
def test_a_result_page_draws_its_picture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results" / name
    shutil.copytree(ROOT / "results" / name, folder)
    (picture,) = folder.glob("*.png")
    drawn = imread(picture)
    picture.unlink()
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {})
    again = imread(picture)
    pinned = f"matplotlib=={mpl.__version__}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    # Another version of matplotlib may set a text otherwise.
    assert drawn.shape == again.shape or not pinned
    if drawn.shape == again.shape:
        assert np.abs(drawn - again).mean() <= (0.0 if pinned else 0.05)
