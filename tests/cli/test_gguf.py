"""A GGUF file as the model of a run: what it simulates and says, and what is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sim.job.configure import configure
from sim.job.report import notes_of
from sim.job.setup import make_workload
from tests.cli.test_bad_input import assert_refused
from tests.support import gguf_models
from tests.support.commands import ROOT, run_here, small_trace

WORDS = ("+hardware=a100", "+policy=lru", "compare=none")


@pytest.mark.slow
def test_a_run_copies_experts_of_the_size_that_the_file_says(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    header = gguf_models.write(tmp_path / "gpt-oss-20b-mxfp4.gguf", *gguf_models.gpt_oss_20b())
    content = header.read_bytes()
    header.write_bytes(content + bytes(1000))  # the first bytes of the weights, as of a request for a range
    found = run_here([*WORDS, f"model.path={header}", f"trace.path={trace}"], tmp_path / "out")
    assert (found.code, found.err) == (0, "")
    assert "model: derived: an expert takes 13.3 MB (MXFP4)" in found.out
    assert "model: assumed: the KV cache takes 16 bits a value" in found.out
    metrics = found.metrics()
    each = 3 * 2880 * 2880 * 17 // 32 + 3 * 2880 * 4  # mxfp4, and three biases
    assert metrics["bytes"]["demand"] == metrics["num_misses"] * each > 0
    origin = json.loads((found.folder / "provenance.json").read_text(encoding="utf-8"))
    assert origin["model"]["source"] == "GGUF header of gpt-oss-20b-mxfp4.gguf"
    assert "an expert takes 13.3 MB (MXFP4)" in origin["model_file"]["derived"]


@pytest.mark.parametrize("length", [0, 3, 4, 100, 5000])
def test_a_file_that_is_cut_off_is_refused_in_one_line(length: int, tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    path = gguf_models.write(tmp_path / "m.gguf", *gguf_models.gpt_oss_20b())
    path.write_bytes(path.read_bytes()[:length])
    found = run_here([*WORDS, f"model.path={path}", f"trace.path={trace}"], tmp_path / "out")
    assert_refused(found, (str(path), "; "))


def test_another_model_than_the_trace_is_of_is_refused(tmp_path: Path) -> None:
    trace = small_trace(tmp_path / "t.safetensors")
    path = gguf_models.write(tmp_path / "m.gguf", *gguf_models.olmoe())
    found = run_here([*WORDS, f"model.path={path}", f"trace.path={trace}"], tmp_path / "out")
    assert_refused(found, ("num_layers=16", "num_layers=24"))


def test_a_part_that_is_missing_is_told_before_all_else(tmp_path: Path) -> None:
    made = gguf_models.in_parts(tmp_path, "m", gguf_models.gpt_oss_20b(), 100)
    made[1].unlink()
    trace = small_trace(tmp_path / "t.safetensors")
    words = [*WORDS, f"model.path={made[0]}", f"trace.path={trace}", "max_tokens=4"]
    found = run_here(words, tmp_path / "out")
    said = " ".join(found.out.split())
    assert f"model: incomplete: 1 of {len(made)} parts are not there ({made[1].name} first)" in said
    assert said.index("incomplete") < said.index("derived")
    origin = json.loads((found.folder / "provenance.json").read_text(encoding="utf-8"))
    assert len(origin["model_file"]["incomplete"]) == 1
    # A line of a sweep has it, too.
    assert notes_of(make_workload(configure(words)))[0].startswith("model: incomplete: 1 of")


@pytest.mark.slow
def test_the_package_is_imported_for_a_gguf_file_alone(tmp_path: Path) -> None:
    """It brings a client of HTTP with it, which no other run should wait for."""
    path = gguf_models.write(tmp_path / "m.gguf", *gguf_models.tiny())
    code = (
        "import sys; from pathlib import Path; import sim.app, sim.job.setup; from sim.specs import model_file; "
        "assert 'gguf' not in sys.modules; model_file.read_model_file(Path(sys.argv[1])); assert 'gguf' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=ROOT, timeout=120)
