"""Recorded forwards and verify steps with real copies and kernels: the simulation's demands, and equal in lockstep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expertflow.forward import DECODE, PREFILL, Forward, Span
from replay.lockstep.compare import check
from sim.job.setup import make_policy
from sim.machine.run import run_policy
from tests.support.commands import TINY_MODEL_WORDS, tiny_trace
from tests.support.replays import Case, replay_here

WORDS = ("machine=cpu", "scale=8", "stack=found", "+hardware=a100", "residency=0.4", *TINY_MODEL_WORDS)
FORWARDS = np.array([0, 0, 1, 2, 2, 3, 1, 1, 2, 3, 4, 4])
"""Two requests of six tokens, prompts of two: the second's prompt beside a decode, and two tokens of each at once."""
COUNTED = ("num_tokens", "num_forwards", "num_accesses")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "adaptive"])
@pytest.mark.parametrize(
    "words", [["batch_size=as_recorded"], ["speculate=[2,0.6]"], ["speculate=[3,0.8]", "batch_size=2", "seed=4"]]
)
def test_a_replay_runs_them_and_decides_the_same_again(policy: str, words: list[str], tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors", prompt=2, forward_id=FORWARDS)
    case = Case.of(*WORDS, f"+policy={policy}", f"trace.path={trace}", *words)
    log = tmp_path / "records.parquet"
    with case.rig() as rig:
        metrics, integrity = case.replay(rig, verify=True, log=log)
    assert integrity is not None
    assert integrity.sound
    simulated = run_policy(case.full, *make_policy(case.cfg["policy"], case.full, case.cfg["seed"]))
    assert [metrics[key] for key in COUNTED] == [simulated[key] for key in COUNTED]
    assert metrics["speculation"] == simulated["speculation"]
    # The workload and a fresh policy of what the log says of itself.
    result = check(log)
    assert (result.difference, result.num_forwards) == (None, metrics["num_forwards"])


def test_the_shape_of_spans_is_that_of_forwards_without_them(tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors")
    case = Case.of(*WORDS, "+policy=lru", f"trace.path={trace}")
    with case.rig() as rig:
        kernels = rig.kernels
        lens = (500, 31, 77)
        decode = Forward(0, DECODE, range(3), (0, 1, 2), lens, [], [], None)
        decode_spans = spanned(DECODE, lens, *(Span(request, 1, False, 1, 1) for request in range(3)))
        prompt = Forward(0, PREFILL, range(4), (0,), (7, 8, 9, 10), [], [], None)
        for grid in (0, 256):
            assert kernels.shape(0, decode_spans, grid) == kernels.shape(0, decode, grid)
            prompt_span = spanned(PREFILL, (7, 8, 9, 10), Span(0, 4, True, 1, 1))
            assert kernels.shape(0, prompt_span, grid) == kernels.shape(0, prompt, grid)
        # Three rows of one request read its cache once, for as many pairs.
        one = kernels.shape(0, spanned(DECODE, (1002,), Span(0, 1, False, 1, 1)))
        step = kernels.shape(0, spanned(DECODE, (1000, 1001, 1002), Span(0, 3, False, 1, 3)))
        assert (step.num_tokens, step.rows, step.columns) == (3, one.rows, 3 * one.columns)


def spanned(phase: str, lens: tuple[int, ...], *spans: Span) -> Forward:
    requests = tuple(span.request for span in spans)
    return Forward(0, phase, range(len(lens)), requests, lens, [], [], None, spans=spans)


def test_a_draft_model_is_not_replayed(tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors")
    words = [*WORDS, "+policy=lru", f"trace.path={trace}", "speculate=[2,0.5]", "draft_ms=1"]
    found = replay_here(words, tmp_path / "run")
    assert (found.code, found.err) == (
        2,
        "error: draft_ms=1 is time of a draft model, which a replay does not run; leave it out\n",
    )
