"""Figures of accuracy with known answers, and the two commands: what they write and how they refuse."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from expertflow.predictors.lookahead import LookaheadPredictor
from expertflow.transitions import TransitionCounts
from tests.policy.forest.support import SMALL, D, E, K, L, knowable, needs_fit, quiet, written
from tests.support.commands import routing
from tests.support.traces import check_error, run
from tests.support.workloads import forward_rows, memory_trace, view_of
from traces.batching import RecordedRows
from traces.fitting.accuracy import Accuracy, fit_decay
from traces.fitting.baselines import Training, Transition
from traces.fitting.rows import row_blocks
from traces.fitting.score import BASELINES, ROUTING_ALONE, markdown, score

OPTIONS = tuple(f"{key}={value}" for key, value in SMALL.items())


# -- figures ---------------------------------------------------------------------------------------------------------


def test_figures_of_two_decisions_by_hand() -> None:
    accuracy = Accuracy(top_k=1)
    accuracy.add(np.array([[0.9, 0.6, 0.1, 0.0]]), np.array([[0, 1, 0, 0]]))
    accuracy.add(np.array([[0.4, 0.4, 0.0, 1.0]]), np.array([[1, 0, 0, 1]]))
    row = accuracy.row()
    # One and then two of three are found among the best one, two named.
    assert row["recall_k"] == pytest.approx(1 / 3)
    assert row["recall_2k"] == pytest.approx(3 / 3)
    assert row["precision_50"] == pytest.approx(2 / 3)
    assert row["named_50"] == pytest.approx(1.5)
    # Bins: 0.9 missed; 0.6 right; 0.1 not; two 0.4, one right; 1.0 right (in the bin of 0.9); three 0.
    assert row["ece"] == pytest.approx((abs(0.9 + 1.0 - 1) + abs(0.6 - 1) + 0.1 + abs(0.8 - 1)) / 8)
    kept = 1 - 1e-4
    losses = [0.1, 0.6, 0.9, kept, 0.4, 0.6, kept, kept]
    assert row["log_loss"] == pytest.approx(-sum(np.log(losses)) / 8)
    assert row["num_decisions"] == 2


def test_ties_go_to_the_lower_expert() -> None:
    accuracy = Accuracy(top_k=1)
    accuracy.add(np.full((1, 3), 0.5), np.array([[1, 0, 0]]))
    accuracy.add(np.full((1, 3), 0.5), np.array([[0, 0, 1]]))
    assert (accuracy.row()["recall_k"], accuracy.row()["recall_2k"]) == (0.5, 0.5)


def test_perfect_and_useless_chances_are_told_apart() -> None:
    draws = np.random.default_rng(0)
    truth = (draws.random((500, 8)) < 0.25).astype(float)
    perfect, useless = Accuracy(2), Accuracy(2)
    perfect.add(truth, truth)
    useless.add(np.full(truth.shape, 0.25), truth)
    assert perfect.row()["ece"] == 0
    assert perfect.row()["log_loss"] < 2e-4
    assert useless.row()["ece"] < 0.02
    assert useless.row()["log_loss"] > 0.5
    assert np.isnan(useless.row()["precision_50"])


@pytest.mark.parametrize(("a", "b", "c"), [(0.4, 0.3, 0.5), (0.8, 1.2, 0.1), (0.2, 0.1, 0.3)])
def test_the_decay_that_was_put_in_is_found(a: float, b: float, c: float) -> None:
    pytest.importorskip("scipy")
    found = fit_decay([a * np.exp(-b * d) + c for d in range(1, 9)])
    assert found["rmse"] < 1e-6
    assert (found["a"], found["b"], found["c"]) == pytest.approx((a, b, c), abs=2e-3)


def test_three_distances_are_too_few_for_a_decay() -> None:
    assert all(np.isnan(value) for value in fit_decay([0.9, 0.8, 0.7]).values())


# -- baselines -------------------------------------------------------------------------------------------------------


def test_transition_log_odds_are_those_of_the_predictor() -> None:
    """One request, so that no pair of its counts spans two; the predictor counts pairs past the last layer besides."""
    trace = memory_trace(routing((L, E, K), 60), E, [0, 60], [0])
    made = Transition(Training(trace, D, report=quiet))
    counts = TransitionCounts(L, E, D)
    shares = np.zeros((61, L, E))
    np.put_along_axis(shares[1:], np.asarray(trace.experts).astype(int), 1.0, axis=2)
    counts.learn([(row, 1) for row in shares])
    cross, _, popularity = counts.log_odds(8.0, D)
    assert np.allclose(made.popularity, popularity)
    for distance in range(1, D + 1):
        assert np.allclose(made.cross[distance - 1, : L - distance], cross[distance - 1, : L - distance], atol=1e-5)


def test_blocks_do_not_show_in_the_figures() -> None:
    trace, other = knowable(3), knowable(3, 5)
    training = Training(other, D, report=quiet)
    names = ("popularity", "transition", "pregate", "calibrated", "ridge")
    baselines = {name: BASELINES[name](training) for name in names}
    whole = score(baselines, trace, D)
    sums = {(name, d): Accuracy(K) for name in baselines for d in range(1, D + 1)}
    for block in row_blocks(trace, range(3), 7):
        for layer in range(L - 1):
            for d in range(1, min(D, L - 1 - layer) + 1):
                for name, baseline in baselines.items():
                    sums[name, d].add(baseline.scores(block, layer, d), block.truth(layer, d))
    for row in whole:
        part = sums[row["predictor"], row["distance"]].row()
        assert row["num_decisions"] == 3 * 24 * (L - row["distance"])
        assert {key: row[key] for key in part} == pytest.approx(part, nan_ok=True)


@pytest.mark.slow
def test_every_baseline_gives_chances_and_calibration_does_not_change_the_ranking() -> None:
    needs_fit()
    trace, judged = knowable(8), knowable(2, 9)
    training = Training(trace, D, report=quiet)
    rows = score({name: BASELINES[name](training) for name in BASELINES if name != "forest"}, judged, D)
    by_name = {name: [row for row in rows if row["predictor"] == name] for name in BASELINES}
    for plain, calibrated in zip(by_name["pregate"], by_name["calibrated"], strict=True):
        assert calibrated["recall_k"] == pytest.approx(plain["recall_k"], abs=0.02)
        assert calibrated["ece"] < 0.75 * plain["ece"]
    for name in ("logistic", "boosting", "perceptron", "ridge"):
        # What the layers before chose says the topic.
        assert by_name[name][0]["recall_k"] > by_name["pregate"][0]["recall_k"] + 0.1
        assert by_name[name][0]["log_loss"] < by_name["popularity"][0]["log_loss"]


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [False, True])
def test_fit_and_score_write_what_they_say(listed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_fit()
    train = written(tmp_path / "train.safetensors", 24, 1, listed=listed)
    judged = written(tmp_path / "eval.safetensors", 4, 2, listed=listed)
    fitted = tmp_path / "tiny.forest.safetensors"
    code, out, err = run(capsys, "fit-predictor", train, fitted, "kind=forest", "max_mb=1", *OPTIONS)
    assert (code, out.split(",")[0]) == (0, f"wrote {fitted}: forest for tiny")
    assert err.count("layer ") == L
    assert "held-out requests, rounded: " in err
    assert fitted.stat().st_size <= 1e6
    with safe_open(fitted, "numpy") as file:
        header = file.metadata()
    assert (header["format"], header["model"], header["num_tokens"]) == ("expertflow-forest", "tiny", str(21 * 24))
    folder = tmp_path / "accuracy"
    names = "popularity,transition,pregate,forest"
    code, out, err = run(
        capsys, "score-predictors", train, judged, "--out", folder, "--only", names, f"--fitted=forest={fitted}"
    )
    assert code == 0
    with (folder / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["predictor"], row["distance"]) for row in rows] == [
        (name, str(distance)) for name in names.split(",") for distance in range(1, D + 1)
    ]
    recall = {row["predictor"]: float(row["recall_k"]) for row in rows if row["distance"] == "1"}
    assert recall["popularity"] < recall["pregate"] < 0.7 < 0.93 < recall["forest"]
    with (folder / "fits.csv").open() as file:
        fits = {row["predictor"]: row for row in csv.DictReader(file)}
    assert fits["forest"]["reader_reported_c_qwen1.5"] == "0.653"
    assert fits["transition"]["reader_reported_c_qwen1.5"] == ""
    assert "| recall@2 | d=1 | d=2 | d=3 |" in out
    assert "[2], reader-reported" in out
    assert sorted(path.name for path in folder.iterdir()) == ["accuracy.csv", "fits.csv"]


def test_the_same_fit_twice_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_fit()
    train = written(tmp_path / "train.safetensors", 6)
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    for file, seed in zip(files, (3, 3, 4), strict=True):
        words = ("fit-predictor", train, file, "rows=200", "trees=3", "max_mb=1", f"seed={seed}")
        assert run(capsys, *words)[0] == 0
    first, second, other = (file.read_bytes() for file in files)
    assert (first == second, first == other) == (True, False)
    assert run(capsys, *words, "calibrated=false")[0] == 0
    assert files[-1].read_bytes() != other


@pytest.mark.slow
def test_without_a_pregate_what_needs_none_is_compared_and_the_rest_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = written(tmp_path / "train.safetensors", 6, 1, pregate=False)
    judged = written(tmp_path / "eval.safetensors", 3, 2)
    code, out, _ = run(capsys, "score-predictors", train, judged, "--out", tmp_path / "out", "--distances", 2)
    assert code == 0
    skipped = ", ".join(name for name in BASELINES if name not in ROUTING_ALONE)
    assert out.startswith(f"skipped, for want of a pre-gate in both traces: {skipped}\n")
    rows = (tmp_path / "out" / "accuracy.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [[name, distance] for name in ROUTING_ALONE for distance in "12"]
    check_error(
        run(capsys, "score-predictors", train, judged, "--out", tmp_path / "out", "--only", "ridge"),
        "without a pre-gate in both traces",
    )
    check_error(run(capsys, "fit-predictor", train, tmp_path / "f.safetensors"), "holds no pre-gate")


@pytest.mark.parametrize(("kind", "module"), [("forest", "sklearn.ensemble"), ("hybrid", "sklearn.linear_model")])
def test_a_package_that_is_not_there_is_named_with_the_remedy(
    kind: str, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_fit()
    pytest.importorskip("torch", reason="pip install 'expertflow[fit]'")
    train, out = written(tmp_path / "train.safetensors", 3), tmp_path / "out.safetensors"
    monkeypatch.setitem(sys.modules, module, None)
    code, told, err = run(capsys, "fit-predictor", train, out, f"kind={kind}", "distances=2", "rows=80")
    # What it was about to fit to may be said first.
    check_error(
        (code, told, err.splitlines(keepends=True)[-1]), f"kind={kind} needs {module}", "pip install 'expertflow[fit]'"
    )
    # Where the function itself needs what is missing, to name its options is too much already.
    monkeypatch.setitem(sys.modules, "traces.fitting.network", None)
    check_error(run(capsys, "fit-predictor", train, out, "kind=hybrid"), "kind=hybrid needs traces.fitting.network")
    assert not out.exists()


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("sklearn", "forest, hybrid, logistic, boosting, perceptron need sklearn"),
        ("torch", "hybrid needs torch"),
        ("scipy", "score-predictors needs scipy"),
    ],
)
def test_a_package_that_is_not_there_is_missed_before_anything_is_fitted(
    module: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, judged = written(tmp_path / "train.safetensors", 3), written(tmp_path / "eval.safetensors", 2, 1)
    for other in ("sklearn", "torch", "scipy"):
        monkeypatch.setitem(sys.modules, other, None if other == module else sys)
    monkeypatch.setattr("traces.fitting.packages.find_spec", lambda name: sys.modules[name])
    code, out, err = run(capsys, "score-predictors", train, judged, "--out", tmp_path / "out")
    check_error((code, out, err), told, "pip install 'expertflow[fit]'")
    assert ("--only popularity,transition,pregate,calibrated" in err) == (module != "scipy")
    assert not (tmp_path / "out").exists()


def test_wrong_words_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, judged = written(tmp_path / "train.safetensors", 3), written(tmp_path / "eval.safetensors", 2, 1)
    other, out = written(tmp_path / "other.safetensors", 2, 1, model="small"), tmp_path / "out.safetensors"
    folder = ("--out", tmp_path / "out")
    check_error(run(capsys, "fit-predictor", train, out, "kind=tree"), "kind=tree is unknown", "forest")
    check_error(
        run(capsys, "fit-predictor", train, out, "kind=hybird"), "kind=hybird is unknown (did you mean hybrid?)"
    )
    check_error(run(capsys, "fit-predictor", train, out, "kind=forest", "kind=forest"), "given twice")
    check_error(run(capsys, "fit-predictor", train, out, "leaves=3"), "'leaves' is unknown to forest", "max_mb")
    check_error(run(capsys, "fit-predictor", train, out, "depth=16"), "depth=16", "1 … 15")
    check_error(run(capsys, "fit-predictor", train, out, "rows=0"), "rows=0")
    check_error(run(capsys, "fit-predictor", train, tmp_path / "no" / "f"), "does not exist")
    check_error(run(capsys, "fit-predictor", tmp_path / "none", out), "does not exist")
    check_error(run(capsys, "score-predictors", train, train, *folder), "is the trace that was fitted to")
    check_error(run(capsys, "score-predictors", train, other, *folder), "model is small")
    check_error(run(capsys, "score-predictors", train, judged, *folder, "--only", "oracle"), "'oracle'", "transition")
    check_error(run(capsys, "score-predictors", train, judged, *folder, "--fitted", "forest=none"), "forest=none")
    check_error(run(capsys, "score-predictors", train, judged, *folder, "--distances", 0), "--distances: 0 must be")
    assert not out.exists()
    assert not (tmp_path / "out").exists()


def test_the_pregate_that_is_scored_is_the_one_that_runs() -> None:
    """Chances of a block against the scores of the predictor over the recorded pre-gate."""
    trace = knowable(1)
    predictor = LookaheadPredictor()
    predictor.start(view_of(L, E, K), None)
    baseline = BASELINES["pregate"](Training(trace, D, report=quiet))
    chances = baseline.scores(next(row_blocks(trace, range(1))), 1, 2)
    for row in (0, 7):
        said = predictor.predict(forward_rows(row, [row], L, RecordedRows(trace)), 1, 2)
        assert said is not None
        assert dict(zip(*said[:2], strict=True)) == {3 * E + e: round(float(chances[row, e]) * 65536) for e in range(E)}


def test_the_table_has_a_row_for_each_and_no_loose_ends() -> None:
    pytest.importorskip("scipy")
    trace = knowable(2)
    baselines = {"pregate": BASELINES["pregate"](Training(trace, D, report=quiet))}
    rows = score(baselines, trace, D)
    fits = [{"predictor": "pregate", **fit_decay([row["recall_k"] for row in rows])}]
    lines = markdown(rows, fits, {"pregate": (0, 1.0)}, K)
    assert all(line == "" or line.count("|") >= 4 for line in lines)
    assert sum(line.startswith("| pregate |") for line in lines) == 6
