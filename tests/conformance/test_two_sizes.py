"""A published route with experts of two sizes: what an LRU with a budget of bytes hits, evicts and moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sim.job.configure import configure
from sim.job.setup import make_policy, make_workload
from sim.machine.run import run_floor, run_policy
from traces.importers.route_csv import import_route_csv
from traces.reader import open_trace

# Two experts a step, best first, of a toy model of 3 layers; steps 0 to 3 are the prompt.
LAYERS = (
    "51 13 10 10 01 14 14 16 16 45 51 63",
    "61 14 14 14 06 06 41 46 46 06 01 70",
    "50 56 45 46 40 47 60 60 56 50 05 60",
)
SIZES = (100, 300, 100)
SHAPE = (
    "num_layers=3 num_experts=8 top_k=2 hidden_size=64 expert_intermediate=64 num_heads=4 num_kv_heads=4 head_dim=16"
)
WORDS = ("model.name=toy", *(f"+model.{word}" for word in f"{SHAPE} vocab_size=100 source=tests".split()))


@pytest.fixture
def route(tmp_path: Path) -> Path:
    """The route as a trace; its prompt is one forward."""
    lines = ["# route_trace v1", "# model=/models/toy-3x8.gguf arch=toy n_layer=3 n_expert=8 n_expert_used=2"]
    lines.append("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes")
    for layer, row in enumerate(LAYERS):
        for step, pair in enumerate(row.split()):
            place = f"0,{int(step > 3)},{step},{layer}"
            lines += [f"{place},{slot},{expert},0.5,0,{SIZES[layer]}" for slot, expert in enumerate(pair)]
    (tmp_path / "route.csv").write_text("\n".join(lines) + "\n")
    return import_route_csv(tmp_path / "route.csv", tmp_path / "route.safetensors").path


def numbers(path: Path, *words: str) -> tuple[int, int, int, int]:
    """Hits, misses, evictions and bytes."""
    cfg = configure(["+hardware=a100", f"trace.path={path}", *WORDS, *words])
    work = make_workload(cfg)
    policy, transfer = make_policy(cfg["policy"], work, 0)
    found = run_policy(work, policy, transfer)
    floor = run_floor(work)
    assert floor.floor_ns <= found["elapsed_ns"]
    assert floor.num_loads <= found["num_misses"]
    return found["num_hits"], found["num_misses"], found["num_evictions"], found["bytes"]["demand"]


def test_the_sizes_of_the_rows_are_kept_by_layer(route: Path) -> None:
    trace = open_trace(route)
    assert trace.expert_bytes == SIZES
    assert json.loads(trace.header["expert_bytes"]) == list(SIZES)


def test_lru_with_1500_bytes_gives_the_published_integers(route: Path) -> None:
    # 1500 of the 4000 bytes of all experts.
    assert numbers(route, "+policy=lru", "residency=0.375") == (29, 30, 21, 5000)


def test_the_model_may_say_otherwise(route: Path) -> None:
    listed = numbers(route, "+policy=lru", "residency=0.375", "+model.expert_bytes=[1,3,1]")
    assert listed == (29, 30, 21, 50)
    # Nine slots of one size are not what 1500 bytes are.
    alike = numbers(route, "+policy=lru", "residency=0.375", "+model.expert_bytes=100")
    assert alike[0] + alike[1] == 59
    assert alike[3] == 100 * alike[1]
    assert alike[:3] != (29, 30, 21)
