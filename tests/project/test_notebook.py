"""The notebooks run and make their pictures: the quickstart anywhere, the paper's from a copy of the results.

`python -m tests.project.test_notebook` executes them where they stand and writes their pictures into them.
"""

import ast
import os
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
NUM_PICTURES = {NOTEBOOK: 4, PAPER: 4}


def execute(notebook: Path) -> Any:
    """Run all cells in the notebook's folder, with this interpreter, without times in the result."""
    document = nbformat.read(notebook, as_version=4)
    where = {"metadata": {"path": str(notebook.parent)}}
    client = nbclient.NotebookClient(document, timeout=300, kernel_name="python3", record_timing=False, resources=where)
    return client.execute()


def copy_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch, notebook: Path = NOTEBOOK) -> Path:
    """A folder of nothing but a notebook; the kernel `python3` is this interpreter with these packages."""
    kernelspec.install(kernel_name="python3", prefix=str(folder))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    (folder / "notebooks").mkdir()
    return Path(shutil.copy(notebook, folder / "notebooks"))


def pictures(document: Any) -> list[bytes]:
    outputs = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    return [b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def assert_made_its_pictures(document: Any, notebook: Path) -> None:
    found = pictures(document)
    assert len(set(found)) == len(found) == NUM_PICTURES[notebook]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 10_000 for picture in found)


def printed(document: Any) -> list[Any]:
    """What each cell put out but for its pictures."""
    return [
        {kind: value for kind, value in output.get("data", {}).items() if kind != "image/png"}
        for cell in document.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


@pytest.mark.slow
def test_the_quickstart_runs_in_any_folder_and_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = copy_notebook(tmp_path, monkeypatch)
    document = execute(notebook)
    assert_made_its_pictures(document, NOTEBOOK)
    assert [path.name for path in notebook.parent.iterdir()] == [notebook.name]
    # It shows what it showed when it was written: the same figures, to the digit.
    assert printed(document) == printed(nbformat.read(NOTEBOOK, as_version=4))
    errors = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in errors} == {"execute_result"}


@pytest.mark.slow
def test_the_papers_claims_are_drawn_from_the_published_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = copy_notebook(tmp_path, monkeypatch, PAPER)
    (tmp_path / "pyproject.toml").touch()
    for name in ("accuracy", "paper", "inversion"):
        shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
    document = execute(notebook)
    assert_made_its_pictures(document, PAPER)
    assert printed(document)[-2:] == printed(nbformat.read(PAPER, as_version=4))[-2:]


@pytest.mark.slow
def test_without_results_the_papers_fails_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"No objects to concatenate|results"):
        execute(copy_notebook(tmp_path, monkeypatch, PAPER))


@pytest.mark.parametrize(
    ("notebook", "modules"),
    [
        (NOTEBOOK, {"expertflow.evictions.lru", "expertflow.view", "sim"}),
        (PAPER, {"pathlib", "pandas", "sim", "sim.views.plots", "sim.study.pictures", "sim.study.plan"}),
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
