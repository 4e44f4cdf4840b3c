"""What each place answers, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from expertflow.forward import KnownForward
from expertflow.machine import Costs
from expertflow.parts import Place, Placing
from expertflow.places.balanced import Balanced
from expertflow.places.capped import Capped
from expertflow.places.cheaper import Cheaper
from expertflow.places.host_experts import HostExperts
from expertflow.places.host_layers import HostLayers
from expertflow.view import View
from sim.job.configure import configure
from sim.job.setup import make_policy, make_workload
from sim.machine.run import run_policy
from tests.support.workloads import view_of

NO_FORWARD = cast(KnownForward, None)


def placing(
    tokens: Sequence[int],
    *,
    copy: int = 40,
    wait: int = 0,
    gpu: int = 1,
    host: int = 10,
    trip: int = 0,
    stretch: float = 1.0,
    layer: int = 0,
    first: int = 0,
) -> Placing:
    """Missing experts `first`, `first` + 1 …, over so many tokens each; gpu, host: ns for each token."""
    costs = Costs(copy, wait, [gpu * num for num in tokens], [host * num for num in tokens], trip, stretch)
    return Placing(layer, (), (), range(first, first + len(tokens)), tokens, costs)


def answer(place: Place, told: Placing, view: View | None = None) -> list[int]:
    """What `place` computes on the host."""
    place.start(view or view_of(4, 10, 2), None)
    return list(place.on_host(told, NO_FORWARD))


# -- layers and experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "side", "hosted"),
    [(0, "first", []), (1, "first", [0]), (3, "first", [0, 1, 2]), (1, "last", [3]), (4, "last", [0, 1, 2, 3])],
)
def test_host_layers(layers: int, side: str, hosted: list[int]) -> None:
    place = HostLayers(layers, side)
    found = [layer for layer in range(4) if answer(place, placing([1, 1], layer=layer, first=10 * layer))]
    assert found == hosted
    assert list(place.stays_on_host()) == [key for layer in hosted for key in range(10 * layer, 10 * layer + 10)]


def test_more_host_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"policy.place.layers=5 is more than the model's MoE layers, 4; give at most"):
        HostLayers(5).start(view_of(4, 10, 2), None)


def test_host_experts_of_a_list() -> None:
    place = HostExperts([3, 12])
    assert answer(place, placing([1] * 5)) == [3]
    assert sorted(place.stays_on_host()) == [3, 12]
    with pytest.raises(ValueError, match=r"policy.place.experts: 40 is no key; the model has 0 to 39"):
        HostExperts([1, 40]).start(view_of(4, 10, 2), None)


def test_the_most_used_experts_are_the_gpus_as_many_as_there_are_slots() -> None:
    place = HostExperts(used_on=[0, 5, 9, 5, 1, 1])
    place.start(view_of(2, 3, 1, num_slots=3), None)
    assert sorted(place.stays_on_host()) == [0, 4, 5]
    place.start(view_of(2, 3, 1, num_slots=2, slots_by_layer=(1, 1)), None)
    assert sorted(place.stays_on_host()) == [0, 1, 4, 5]
    with pytest.raises(ValueError, match=r"policy.place.used_on is of 6 experts, the model has 4; give a trace of it"):
        place.start(view_of(2, 2, 1), None)


@pytest.mark.parametrize("given", [{}, {"experts": [1], "used_on": [1, 2]}])
def test_host_experts_are_told_in_one_way(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"policy.place takes either experts, a list of keys, or used_on, a trace"):
        HostExperts(**given)


# -- by cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("copy", "hosted"), [(9, []), (10, [0]), (18, [0]), (19, [0, 1])])
def test_cheaper_compares_expert_by_expert(copy: int, hosted: list[int]) -> None:
    """Over 1 and 2 tokens: 10 and 20 on the host, a copy and 1 and 2 on the GPU; as dear as the host is the GPU's."""
    assert answer(Cheaper(), placing([1, 2, 90], copy=copy)) == hosted


def test_cheaper_counts_the_round_trip_for_each() -> None:
    assert answer(Cheaper(), placing([1], copy=12, trip=2)) == [0]
    assert answer(Cheaper(), placing([1], copy=12, trip=3)) == []


@pytest.mark.parametrize(
    ("told", "hosted"),
    [
        # Four of 10 on the host, copies of 30: with one copied 31 against 30, with none 40.
        ({"tokens": [1] * 4, "copy": 30}, [1, 2, 3]),
        # A busy link: 15 more make it 46; none is copied.
        ({"tokens": [1] * 4, "copy": 30, "wait": 15}, [0, 1, 2, 3]),
        # The dearest is copied, wherever it stands.
        ({"tokens": [1, 5, 1], "copy": 30}, [0, 2]),
        # Copies in no time.
        ({"tokens": [1, 1], "copy": 0}, []),
        # A host that takes longer than both copies, 60 + 1 against 70.
        ({"tokens": [7, 7], "copy": 30}, []),
        # 1 copied: 35 + 1 against 2 * 15 + 6, the same; ties copy more, but two copied take 71.
        ({"tokens": [1, 1, 1], "copy": 35, "host": 15, "trip": 6}, [1, 2]),
        ({"tokens": [], "copy": 30}, []),
    ],
)
def test_balanced_ends_both_together(told: dict[str, Any], hosted: list[int]) -> None:
    assert answer(Balanced(), placing(**told)) == hosted


def test_balanced_minds_that_both_slow_each_other() -> None:
    """Of two, one copied: 30 and 28 at once, three times as long for 28: 86 + 1; both on the host 56."""
    assert answer(Balanced(), placing([1, 1], copy=30, host=28)) == [1]
    assert answer(Balanced(), placing([1, 1], copy=30, host=28, stretch=3.0)) == [0, 1]


def test_balanced_is_the_split_of_freetoken_where_all_cost_the_same() -> None:
    """q* = m * B_P / B_H of m misses are copied, B_H the rate of the host's memory that both share."""
    copy, host = 300, 100
    for num in (4, 8, 16, 40):
        copied = num - len(answer(Balanced(), placing([1] * num, copy=copy, host=host, gpu=0)))
        assert abs(copied - num * host / (copy + host)) <= 1


def test_capped() -> None:
    told = placing([1] * 4)
    behind, waiting = Capped(2), Capped(2, behind=False)
    assert answer(behind, told) == [0, 1, 2, 3]
    assert list(behind.for_later([0, 1, 2, 3], [])) == [0, 1]
    assert answer(waiting, told) == [2, 3]
    assert list(waiting.for_later([2, 3], [3])) == []
    assert (answer(Capped(0, behind=False), told), list(Capped(0).for_later([0], []))) == ([0, 1, 2, 3], [])


@pytest.mark.parametrize("kind", [Cheaper, Balanced])
def test_a_queued_prefetch_is_kept_by_key(kind: type[Any]) -> None:
    assert (list(kind().for_later([1, 2], [2])), list(kind(keep_prefetch=True).for_later([1, 2], [2]))) == ([], [2])


# -- from the configuration -------------------------------------------------------------------------------------------


def metrics_of(*words: str) -> dict[str, Any]:
    cfg = configure(["+hardware=rtx4090", "+host=desktop", "+policy=lru", "compare=none", "max_tokens=24", *words])
    work = make_workload(cfg)
    return run_policy(work, *make_policy(cfg["policy"], work, 0))


def test_experts_used_on_another_trace_are_the_gpus(tmp_path: Path) -> None:
    from traces.shipped import shipped

    trace = str(shipped("gpt-oss-20b-twin-eval.safetensors"))
    words = ["+policy/place=host_experts", f"policy.place.used_on={trace}", "start=resident"]
    metrics = metrics_of(*words)
    assert metrics["num_misses"] == metrics["num_late"] == metrics["num_evictions"] == 0
    assert metrics["num_host"] == metrics["num_accesses"] - metrics["num_hits"] > 0
    assert metrics["num_hits"] > 0.5 * metrics["num_accesses"]


def test_n_cpu_moe_keeps_the_other_layers_resident() -> None:
    metrics = metrics_of("+policy/place=host_layers", "policy.place.layers=6", "start=resident", "residency=0.75")
    # Six of the 24 layers are the host's.
    assert metrics["num_host"] * 4 == pytest.approx(metrics["num_accesses"], rel=0.1)
    assert (metrics["num_misses"], metrics["bytes"]["demand"]) == (0, 0)
    with pytest.raises(
        ValueError, match=r"the start needs room for 576 experts that do not stay on the host, and 568 find"
    ):
        metrics_of("+policy/place=host_layers", "policy.place.layers=6", "start=resident", "residency=0.74")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("policy.place.used_on=7", "policy.place.used_on=7 must be the file of a trace, or null"),
        ("policy.place.experts=[-1]", "policy.place.experts"),
        ("+policy.place.uses=[1]", "uses is no key"),
    ],
)
def test_wrong_arguments_are_told_by_their_key(word: str, message: str) -> None:
    with pytest.raises(ValueError) as told:
        metrics_of("+policy/place=host_experts", word)
    assert message in str(told.value)
