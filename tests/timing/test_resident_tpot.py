"""A stack solved from the time between tokens with all experts resident: by hand, and by simulating just that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from sim import simulate
from sim.job.configure import configure
from sim.job.setup import make_workload
from sim.machine.kernels import KernelTimes
from sim.machine.resident import resident_time
from sim.machine.simulated import HostCosts
from sim.machine.solved import solved_stack
from tests.support.commands import TINY_MODEL_WORDS, job, run_here, tiny_trace
from traces.format import About, write_trace
from traces.reader import open_trace

RESIDENT = ("+policy=lru", "compare=none", "residency=1", "start=resident")
ASSUMED = ("trace.locality=usual", "trace.num_tokens=48", "trace.num_requests=3")


class Constant:
    """Kernels of two layers: attention 100 ns and 1 more for each KV token, an expert 10, shared 7, the head 50."""

    model = SimpleNamespace(num_layers=2)

    def attention_list_ns(self, num_tokens: int, kv_lens: tuple[int, ...], prefill: bool) -> list[int]:
        assert (num_tokens, len(kv_lens), prefill) == (1, 1, False)
        return [100 + kv_lens[0]] * 2

    def experts_ns(self, tokens: list[int]) -> int:
        return 10 * len(tokens)

    def shared_ns(self, num_tokens: int) -> int:
        return 7

    def head_ns(self, num_tokens: int) -> int:
        return 50


def two_requests(folder: Path, prompt: tuple[int, int]) -> Any:
    """Requests of 3 and 2 rows, two experts a layer; the last row has one in its first layer."""
    experts = np.tile(np.array([[0, 1], [2, 3]], np.uint8), (5, 1, 1))
    experts[4, 0, 1] = 255
    arrays = {"experts": experts, "request_start": [0, 3, 5], "prompt_len": list(prompt), "context_len": [0, 9]}
    about = About("toy", num_experts=4, source="tests", license="CC0-1.0")
    return open_trace(write_trace(folder / "toy.safetensors", arrays, about))


def test_the_sum_by_hand(tmp_path: Path) -> None:
    kernels = cast(KernelTimes, Constant())
    # Rows 1 and 2 of the first request, with KV of 2 and 3; row 1 of the second, with 9 + 2.
    trace = two_requests(tmp_path, (1, 1))
    attention, experts = 2 * (102 + 103 + 111), (27 + 27) * 2 + (17 + 27)
    assert resident_time(trace, 5, kernels, HostCosts()) == (3, attention + experts + 3 * 50)
    # Cut behind the fourth row, which is the second request's prompt.
    assert resident_time(trace, 4, kernels, HostCosts()) == (2, 2 * (102 + 103) + 2 * 54 + 2 * 50)
    host = {"classify_ns": 2, "observe_ns": 6, "forward_ns": 8, "group_ns": 1}
    stack = {"layer_overhead_ns": 999, "head_overhead_ns": 999}
    costs = HostCosts(20, 5, gate_sync_ns=3, token_sync_ns=4, **host, **stack)
    # Two experts with the shared one take 28 ns and hide the launch behind them, 20; one takes 18 and does not.
    token = 6 + 8 + 25 + 50 + 1 + 4
    layer = 1 + 3 + 2 + 25
    hidden = (28 + 28) * 2 + (20 + 28)
    assert (27 + costs.group_ns, 17 + costs.group_ns, costs.launch_ns) == (28, 18, 20)
    assert resident_time(trace, 5, kernels, costs) == (3, attention + 3 * token + 6 * layer + hidden)
    # Without a prompt the first forward follows no tokens, and has none to take note of.
    trace = two_requests(tmp_path, (0, 1))
    assert resident_time(trace, 1, kernels, costs) == (1, 2 * 101 + token - 6 + 2 * layer + 2 * 28)


def error_ns(metrics: dict[str, Any], asked_ms: float) -> float:
    return abs(metrics["tpot_ms"]["mean"] - asked_ms) * 1e6


@pytest.mark.mostly_slow(keep=3)
@pytest.mark.parametrize("hardware", ["a100", "rtx4090", "h200", "t4"])
@pytest.mark.parametrize(
    ("model", "asked_ms"),
    [("gpt-oss-20b", 41.7), ("qwen3-30b-a3b", 60.000001), ("deepseek-v2-lite", 120), ("mixtral-8x7b", 900)],
)
@pytest.mark.parametrize("stack", ["eager", "graph", "found"])
def test_the_resident_run_takes_what_was_asked_for(hardware: str, model: str, asked_ms: float, stack: str) -> None:
    words = [f"+hardware={hardware}", *RESIDENT, f"model={model}", *ASSUMED, f"stack={stack}"]
    metrics = job(*words, f"stack.resident_tpot_ms={asked_ms}")
    assert metrics["stall_ns"] == 0
    # To half a nanosecond: overheads are whole ones.
    assert error_ns(metrics, asked_ms) <= 0.51
    solved = metrics["stack_solved"]
    assert (solved["resident_tpot_ms"], solved["num_tokens"]) == (asked_ms, len_of(metrics))
    assert solved["head_overhead_ns"] >= solved["layer_overhead_ns"] > 0
    # The same overheads, given as such, take the same time.
    given = [f"stack.{key}={solved[key]}" for key in ("layer_overhead_ns", "head_overhead_ns")]
    assert job(*words, *given)["elapsed_ns"] == metrics["elapsed_ns"]


def len_of(metrics: dict[str, Any]) -> int:
    """Decoded tokens of the trace: each prompt's forward brings one out, too."""
    found = metrics["num_tokens"] - metrics["trace"]["num_requests"]
    assert 0 < found < metrics["trace"]["num_tokens"]
    return int(found)


@pytest.mark.parametrize(
    "more",
    [
        ["stack.classify_ns=20000", "stack.observe_ns=7000", "stack.forward_ns=90000", "stack.group_ns=3000"],
        ["stack.classify_ns=1", "stack.copy_start_ns=5000", "hardware.launch_host_ns=400000"],
        ["stack.kv_grid=64"],
        ["hardware.link_slowdown=1.7"],
        ["hardware.gate_sync_ns=300000", "hardware.token_sync_ns=500000"],
        ["max_tokens=7"],
        ["prefill_chunk=2", "seed=3"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("prompt", [0, 2])
def test_so_it_does_under_a_host_that_costs_time(more: list[str], prompt: int, tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors", 12, prompt=prompt)
    words = ["+hardware=a100", *RESIDENT, *TINY_MODEL_WORDS, f"trace.path={trace}", *more]
    assert error_ns(job(*words, "stack.resident_tpot_ms=9.87654"), 9.87654) <= 0.51


def test_what_stands_in_the_stack_and_how_much_has_room_changes_nothing(tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors")
    words = ["+hardware=a100", "+policy=adaptive", *TINY_MODEL_WORDS, f"trace.path={trace}", "compare=none"]
    asked = "stack.resident_tpot_ms=5"
    runs = [job(*words, asked, *more) for more in ([], ["stack=graph"], ["residency=0.25"], ["batch_size=2"])]
    assert len({tuple(sorted(run["stack_solved"].items())) for run in runs}) == 1
    assert runs[0]["elapsed_ns"] == runs[1]["elapsed_ns"]
    # Two requests take as many forwards as one: the overhead is paid once for both.
    assert runs[3]["num_forwards"] == runs[0]["num_forwards"] / 2
    assert runs[3]["overhead_ns"] < 0.7 * runs[0]["overhead_ns"]


def test_a_time_that_the_kernels_exceed_is_refused_with_the_least(tmp_path: Path) -> None:
    words = ["+hardware=a100", *RESIDENT]
    found = run_here([*words, "stack.resident_tpot_ms=2"], tmp_path / "run")
    line = (
        "error: stack.resident_tpot_ms=2 is less than kernels and host of gpt-oss-20b take on a100 with all experts in "
        "GPU memory; give at least 2.661\n"
    )
    assert (found.code, found.err, found.done) == (2, line, False)
    with pytest.raises(ValueError, match=r"give at least 2\.661$"):
        solved_stack(make_workload(configure([*words, "stack.resident_tpot_ms=2.660"])))
    stack, _ = solved_stack(make_workload(configure([*words, "stack.resident_tpot_ms=2.661"])))
    assert stack.layer_overhead_ns < 1000


def test_other_times_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors", prompt=6)
    words = ["+hardware=a100", *RESIDENT, *TINY_MODEL_WORDS, f"trace.path={trace}"]
    for more, said in (
        (["stack.resident_tpot_ms=5"], "is of decoded tokens, and the trace tiny has none"),
        (["stack.resident_tpot_ms=5", "stack.layer_overhead_ns=5"], "both say the stack's overhead; leave one out"),
        (["stack.resident_tpot_ms=0"], r"stack.resident_tpot_ms=0 is outside \(0, 1e\+06\] ms"),
        (["stack.resident_tpot_ms=fast"], "stack.resident_tpot_ms='fast' must be a number"),
    ):
        with pytest.raises(ValueError, match=said):
            job(*words, *more)
    tiny_trace(trace)
    work = make_workload(configure([*words, "stack.resident_tpot_ms=1e6"]))
    with pytest.raises(ValueError, match=r"resident_tpot_ms=1e\+06 leaves 200 s of overhead a layer, more than 1 s"):
        solved_stack(work)
    # Whoever reads a stack's overheads past the solution is told so.
    with pytest.raises(ValueError, match="is solved in a simulation alone"):
        HostCosts.of(work.hardware, work.stack)


def test_a_run_says_what_was_solved_and_so_does_python(tmp_path: Path) -> None:
    trace = tiny_trace(tmp_path / "tiny.safetensors")
    words = ["+hardware=a100", *RESIDENT, *TINY_MODEL_WORDS, f"trace.path={trace}", "stack.resident_tpot_ms=5"]
    said = " ".join(run_here(words, tmp_path / "run").out.split())
    assert "eager (resident 5 ms) stack, tiny with" in said
    assert "stack.resident_tpot_ms=5 solved: stack.layer_overhead_ns=9" in said
    assert "mean of 12 decoded tokens, one request at a time" in said
    result = simulate(hardware="a100", policy="lru", stack={"resident_tpot_ms": 12}, residency=1.0, start="resident")
    assert result.metrics["tpot_ms"]["mean"] == pytest.approx(12, abs=1e-6)
    assert "stack.resident_tpot_ms=12 solved" in str(result)
