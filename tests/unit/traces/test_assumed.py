"""Assumed routing: the correlation behind an overlap, routing that shows what was asked, the same bytes again."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from traces.assumed import made
from traces.assumed.command import main
from traces.assumed.families import SETTINGS, Family, load_families, shipped_families
from traces.assumed.fit import _least_squares, fit_families, targets
from traces.assumed.latent import correlation, overlap
from traces.assumed.made import Assumed, Size, arrays_of, request_lengths, usual_size
from traces.assumed.measure import LAGS, Locality, beyond_chance, measure, share_of_top_tenth
from traces.assumed.routing import Topology, make_routing
from traces.messages import TraceError
from traces.reader import Trace, open_trace
from traces.shipped import FOLDER

EVEN = Family(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""Routing without any locality."""
LASTING = Family(0.2, 0.3, 0.0, 0.0, 0.5, 0.0)
TRAIN = FOLDER / "gpt-oss-20b-twin-train.safetensors"


def starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.parametrize("share", [0.03, 0.125, 0.25, 0.5])
def test_an_overlap_is_that_of_two_normals(share: float) -> None:
    assert overlap(0.0, share) == pytest.approx(share)
    rng = np.random.default_rng(1)
    one, own = rng.standard_normal((2, 400_000))
    for given in (0.3, 0.8):
        other = given * one + np.sqrt(1 - given**2) * own
        limit = np.quantile(one, 1 - share)
        seen = ((one > limit) & (other > limit)).mean() / share
        assert overlap(given, share) == pytest.approx(seen, abs=0.02)


def test_half_and_half_is_the_known_quadrant() -> None:
    # Sheppard 1899: both above the median with 1/4 + asin(r)/2π.
    for given in (-0.4, 0.0, 0.5, 0.9):
        assert overlap(given, 0.5) == pytest.approx(0.5 + np.arcsin(given) / np.pi, abs=1e-6)


def test_the_correlation_is_the_inverse_and_leaves_what_is_unknown() -> None:
    for share in (0.03, 0.125, 0.25):
        given = np.array([-0.3, 0.0, 0.2, 0.6, 0.95])
        assert correlation(overlap(given, share), share) == pytest.approx(given, abs=1e-3)
    assert np.isnan(correlation(np.nan, 0.25))


@pytest.mark.parametrize("topology", [Topology(4, 8, 2), Topology(4, 32, 4), Topology(3, 128, 8)], ids=str)
def test_every_topology_shows_the_correlations_that_were_asked_for(topology: Topology) -> None:
    lengths = [64] * 48
    family = Family(0.1, 0.3, 0.0, 0.2, 0.4, 0.6)
    seen = measure(make_routing(family, topology, lengths, 3), starts(lengths), topology.num_experts)
    # An expert keeps popularity, request, and half of what is fast: 0.5 at the next token, 0.4 far away. Choosing K of
    # few experts is not quite the same as passing a threshold.
    slack = 0.08 if topology.num_experts == 8 else 0.04
    assert np.mean(seen.lags[LAGS.index(1)]) == pytest.approx(0.5, abs=slack)
    assert np.mean(seen.lags[LAGS.index(32)]) == pytest.approx(0.4, abs=slack)
    assert np.mean(seen.popularity) == pytest.approx(0.1, abs=slack)
    # Above (1 − 0.1) · 0.6 = 0.54: experts that many tokens choose meet more often, too.
    assert 0.5 < np.mean(seen.depth) < 0.75


def test_without_locality_all_is_chance() -> None:
    lengths = [64] * 16
    experts = make_routing(EVEN, Topology(3, 32, 4), lengths, 0)
    seen = measure(experts, starts(lengths), 32)
    assert np.abs(seen.lags[:9]).max() < 0.1
    assert np.abs(seen.depth).max() < 0.1
    assert abs(beyond_chance(experts, starts(lengths), 32, 1)) < 0.03
    assert share_of_top_tenth(experts, starts(lengths), 32) < 0.13  # a tenth, and a little for the choice of the tenth


def test_rows_hold_distinct_experts_of_the_layer() -> None:
    for topology in (Topology(1, 2, 1), Topology(2, 5, 5), Topology(3, 256, 8)):
        experts = make_routing(LASTING, topology, [3, 1], 0)
        assert experts.shape == (4, topology.num_layers, topology.top_k)
        assert experts.dtype == (np.uint16 if topology.num_experts == 256 else np.uint8)
        assert all(len(set(row)) == topology.top_k for row in experts.reshape(-1, topology.top_k).tolist())
        assert experts.max() < topology.num_experts


def test_the_same_seed_gives_the_same_bytes_wherever_it_runs() -> None:
    made_here = make_routing(shipped_families()["usual"], Topology(4, 16, 3), [20, 5], 7)
    assert np.array_equal(made_here, make_routing(shipped_families()["usual"], Topology(4, 16, 3), [20, 5], 7))
    assert not np.array_equal(made_here, make_routing(shipped_families()["usual"], Topology(4, 16, 3), [20, 5], 8))
    pinned = make_routing(LASTING, Topology(4, 16, 3), [20, 5], 7)
    assert hashlib.sha256(pinned.tobytes()).hexdigest()[:16] == "4918c679d21f6771"


def test_further_requests_change_nothing_of_the_first() -> None:
    one = make_routing(LASTING, Topology(2, 16, 2), [40], 5)
    assert np.array_equal(one, make_routing(LASTING, Topology(2, 16, 2), [40, 9, 1], 5)[:40])


def test_the_shipped_settings_are_in_order() -> None:
    families = shipped_families()
    assert tuple(families) == SETTINGS
    lasting = [one.popularity + one.request for one in families.values()]
    assert lasting == sorted(lasting)
    assert [one.depth for one in families.values()] == sorted(one.depth for one in families.values())
    told = json.loads((FOLDER / "assumed.families.json").read_text(encoding="utf-8"))
    # Nothing that is judged on was fitted to.
    assert [one["name"] for one in told["fitted_to"] if "eval" in one["name"]] == []
    assert all(one["license"] and one["sha256"] for one in told["fitted_to"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "x"}, "settings: must be those of"),
        ({"settings": {"low": {}}}, "settings: must be those of"),
        ({"settings": {name: {"popularity": 2.0} for name in SETTINGS}}, "settings.low: must give popularity"),
        ({"settings": dict.fromkeys(SETTINGS)}, "settings.low: must give popularity"),
    ],
)
def test_a_file_that_holds_no_families_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    table = json.loads((FOLDER / "assumed.families.json").read_text(encoding="utf-8"))
    path = tmp_path / "families.json"
    path.write_text(json.dumps(table | change), encoding="utf-8")
    with pytest.raises(TraceError, match=said):
        load_families(path)


# -- fitting -------------------------------------------------------------------------------------------------


def flat(level: float, num_layers: int) -> Locality:
    """A recording of one locality in all layers."""
    return Locality(
        np.full(num_layers, level / 4), np.full((len(LAGS), num_layers), level), np.full(num_layers - 1, level)
    )


def test_settings_are_quantiles_and_recordings_weigh_the_same() -> None:
    # One recording of 90 layers, one of 10: by layers the median would be that of the first.
    found = targets([flat(0.2, 90), flat(0.6, 10)])
    assert found["low"].lags[0] == pytest.approx(0.2)
    assert 0.2 < found["usual"].lags[0] < 0.6
    assert found["high"].lags[0] == pytest.approx(0.6)


def test_what_one_recording_is_too_short_to_tell_is_not_taken_from_the_others() -> None:
    short = flat(0.2, 4)
    short.lags[-1] = np.nan
    assert np.isnan(targets([short, flat(0.6, 4)])["usual"].lags[-1])


def test_least_squares_takes_no_negative_share() -> None:
    columns = np.array([[1.0, 1.0], [1.0, 0.5], [1.0, 0.25]])
    assert _least_squares(columns, np.array([0.7, 0.5, 0.4])) == pytest.approx([0.3, 0.4])
    # Rising: the decaying part would be negative, so it is left out.
    assert _least_squares(columns, np.array([0.1, 0.2, 0.3])) == pytest.approx([0.2, 0.0])
    best = min(
        np.sum((columns @ np.array(pair) - [0.1, 0.2, 0.3]) ** 2)
        for pair in itertools.product(np.linspace(0, 0.5, 51), repeat=2)
    )
    assert np.sum((columns @ [0.2, 0.0] - [0.1, 0.2, 0.3]) ** 2) <= best + 1e-12


def recording(family: Family, seed: int) -> Trace:
    """A trace in memory, of which the truth is known."""
    lengths = [144] * 24
    header = {
        "model": "m",
        "num_layers": "4",
        "num_experts": "32",
        "top_k": "4",
        "num_requests": "24",
        "num_tokens": str(sum(lengths)),
    }
    arrays = {
        "experts": make_routing(family, Topology(4, 32, 4), lengths, seed),
        "request_start": starts(lengths),
        "prompt_len": np.zeros(24, np.int32),
    }
    return Trace((Path("m.safetensors"),), header, arrays)


@pytest.mark.slow
def test_a_fit_finds_the_family_that_made_the_recording() -> None:
    truth = Family(0.1, 0.25, 0.1, 0.25, 0.3, 0.7)
    found = fit_families([recording(truth, 11)])["usual"]
    assert found.popularity == pytest.approx(truth.popularity, abs=0.05)
    assert found.request + found.slow == pytest.approx(truth.request + truth.slow, abs=0.08)
    assert found.fast == pytest.approx(truth.fast, abs=0.12)
    assert found.depth == pytest.approx(truth.depth, abs=0.08)


# -- size, cache, commands -----------------------------------------------------------------------------------


def test_a_size_that_is_not_said_takes_as_long_whatever_the_topology() -> None:
    assert usual_size(Topology(94, 128, 8)) == Size(192, 8)
    assert usual_size(Topology(58, 256, 8)) == Size(320, 8)
    assert usual_size(Topology(32, 8, 2)) == Size(1024, 8)
    assert usual_size(Topology(1000, 64, 64)) == Size(128, 8)
    assert usual_size(Topology(32, 8, 2), num_requests=20) == Size(2560, 20)
    assert usual_size(Topology(32, 8, 2), num_tokens=5) == Size(5, 5)
    assert usual_size(Topology(32, 8, 2), 5, 3) == Size(5, 3)
    assert request_lengths(Size(11, 4)) == [3, 3, 3, 2]


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_what_is_kept_is_what_would_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = Assumed(Topology(3, 16, 2), "high", Size(30, 4), 1)
    first = arrays_of(asked)
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    monkeypatch.setattr(made, "make_routing", None)  # a second run makes nothing
    second = arrays_of(asked)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert second["prompt_len"].tolist() == [2, 2, 1, 1]
    with pytest.raises(TypeError):
        arrays_of(asked._replace(seed=2))


def test_a_trace_is_written_measured_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.safetensors"
    words = ["generate", str(path), "--layers", "3", "--experts", "16", "--top-k", "2", "--tokens", "64"]
    assert main(words) == 0
    assert "assumed:usual 3x16 top 2, 64 tokens in 8 requests" in capsys.readouterr().out
    trace = open_trace(path)
    assert (trace.num_layers, trace.num_experts, trace.top_k, trace.num_requests) == (3, 16, 2, 8)
    assert trace.header["source"].startswith("assumed routing, no recording of this model")
    assert main(["measure", str(path)]) == 0
    assert "across requests" in capsys.readouterr().out
    for wrong, said in (
        ([*words[:6], "--top-k", "17"], "--top-k 17 is more than --experts 16"),
        ([*words, "--requests", "65"], "--requests 65 is more than --tokens 64"),
        (["fit", str(FOLDER / "gpt-oss-20b-twin-eval.safetensors"), "--out", "x"], "is named as one to judge by"),
        (["fit", str(path), "--out", str(tmp_path / "nowhere" / "f.json")], "nowhere"),
        (["measure", str(tmp_path / "none.safetensors")], "none.safetensors"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert len(error) <= 310
        assert said in error
