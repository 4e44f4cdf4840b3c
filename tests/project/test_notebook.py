"""The notebooks run from a copy of the project's results and make their pictures.

`python -m tests.project.test_notebook` executes them where they stand and writes their pictures into them.
"""

import ast
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra: pip install 'expertflow[notebooks]'")
nbclient = pytest.importorskip("nbclient", reason="needs the extra: pip install 'expertflow[notebooks]'")
kernelspec = pytest.importorskip("ipykernel.kernelspec", reason="needs the extra: pip install 'expertflow[notebooks]'")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
PAPER = ROOT / "notebooks" / "paper.ipynb"
RESULTS = ROOT / "results" / "headline"
NUM_PICTURES = 5


def execute(notebook: Path) -> Any:
    """Run all cells in the notebook's folder, with this interpreter, without times in the result."""
    document = nbformat.read(notebook, as_version=4)
    where = {"metadata": {"path": str(notebook.parent)}}
    client = nbclient.NotebookClient(document, timeout=300, kernel_name="python3", record_timing=False, resources=where)
    return client.execute()


def copy_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch, notebook: Path = NOTEBOOK) -> Path:
    """A project of nothing but a notebook in `folder`; the kernel `python3` is this interpreter."""
    kernelspec.install(kernel_name="python3", prefix=str(folder))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    (folder / "notebooks").mkdir()
    (folder / "pyproject.toml").touch()
    return Path(shutil.copy(notebook, folder / "notebooks"))


def pictures(document: Any) -> list[bytes]:
    outputs = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    return [b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def assert_made_its_pictures(document: Any) -> None:
    found = pictures(document)
    assert len(found) == NUM_PICTURES
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 10_000 for picture in found)
    assert len(set(found)) == NUM_PICTURES


@pytest.mark.slow
@pytest.mark.skipif(not RESULTS.is_dir(), reason="results/headline is not there yet")
def test_it_makes_its_pictures_from_the_published_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = copy_notebook(tmp_path, monkeypatch)
    shutil.copytree(RESULTS, tmp_path / "results" / "headline")
    assert_made_its_pictures(execute(notebook))


@pytest.mark.slow
def test_it_makes_its_pictures_from_any_results_of_that_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sim.views.timeline import Timeline
    from tests.unit.views.support import at_random, run
    from tests.unit.views.test_plots import FOUR, table

    notebook = copy_notebook(tmp_path, monkeypatch)
    results = tmp_path / "results" / "headline"
    results.mkdir(parents=True)
    table(FOUR).to_csv(results / "table.csv", index=False)
    timeline = Timeline("adaptive", 8)
    run(at_random(10), 8, 12, [timeline])
    timeline.write(results / "timeline.json")
    document = execute(notebook)
    assert_made_its_pictures(document)
    assert pictures(execute(notebook)) == pictures(document)


@pytest.mark.slow
def test_without_results_it_fails_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"headline/table\.csv"):
        execute(copy_notebook(tmp_path, monkeypatch))


@pytest.mark.slow
def test_the_papers_claims_are_drawn_from_the_published_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = copy_notebook(tmp_path, monkeypatch, PAPER)
    for name in ("accuracy", "paper", "inversion"):
        shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
    found = pictures(execute(notebook))
    assert len(set(found)) == 3
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 10_000 for picture in found)


@pytest.mark.parametrize(
    ("notebook", "modules"),
    [
        (NOTEBOOK, {"pathlib", "pandas", "sim.views.plots", "sim.views.timeline"}),
        (PAPER, {"pathlib", "pandas", "sim.views.plots", "sim.study.pictures", "sim.study.plan"}),
    ],
)
def test_it_computes_no_metric_of_its_own(notebook: Path, modules: set[str]) -> None:
    document = nbformat.read(notebook, as_version=4)
    nbformat.validate(document)
    source = "\n".join(cell.source for cell in document.cells if cell.cell_type == "code")
    tree = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("%")))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == modules


if __name__ == "__main__":
    for path in (NOTEBOOK, PAPER):
        nbformat.write(execute(path), path)
