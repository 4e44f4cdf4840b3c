"""A stopwatch for a policy's own code: each moment goes to the part that runs, and what the timing costs is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from expertflow.parts import Eviction, Horizon, Order, Part, Place, Predictor, Selection
from expertflow.policy import Policy

PARTS = ("predictor", "horizon", "selection", "eviction", "order", "place")
GLUE = "policy"
"""Code of the policy itself, which asks the parts and puts their answers together."""

_CONTRACTS: dict[str, type[Part]] = {
    "predictor": Predictor,
    "horizon": Horizon,
    "selection": Selection,
    "eviction": Eviction,
    "order": Order,
    "place": Place,
}
_POLICY_HOOKS = ("begin_forward", "routed", "decide", "feedback", "place_experts", "fetched_later", "end_forward")
_UNTIMED = ("start", "announced", "fuse", "thresholds", "worths", "stays_on_host")
"""Methods that are called once before the run, or never, and so belong to no layer."""
_PER_FORWARD = ("begin_forward", "end_forward")
_CALLS = 20_000


@dataclass(frozen=True)
class Overhead:
    """What timing one call costs in ns: `inside` is read as the call's own time, `outside` as its caller's."""

    inside: int = 0
    outside: int = 0


class Step:
    """Time in ns of one layer-step by part; reach: how many layers ahead its decision looked, 0 = there was none;
    is_prompt: the forward computes a prompt."""

    __slots__ = ("decide_ns", "is_prompt", "parts_ns", "reach")

    def __init__(self, is_prompt: bool = False) -> None:
        self.parts_ns = dict.fromkeys((*PARTS, GLUE), 0)
        self.decide_ns = 0
        self.reach = 0
        self.is_prompt = is_prompt

    @property
    def total_ns(self) -> int:
        """Time of the layer-step in all parts together; 0 where the clock's noise makes it negative."""
        return max(sum(self.parts_ns.values()), 0)


class Stopwatch:
    """Counts the time that passes in wrapped code for the innermost part that runs.

    clock: integer ns, monotonic. event_of: gives the number of the layer-step as `view.event`; -1 before the first.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns, overhead: Overhead | None = None) -> None:
        self.steps: list[Step] = []
        self.forwards_ns: list[int] = []
        """ns of begin_forward and end_forward together, by forward."""
        self.event_of: Callable[[], int] = lambda: -1
        self.reach_of: Callable[[], int] = lambda: 0
        self.in_prompt: Callable[[], bool] = lambda: False
        self._clock = clock
        self._overhead = overhead or Overhead()
        self._stack: list[str] = []
        self._spent = dict.fromkeys((*PARTS, GLUE), 0)
        self._since = 0

    def wrap(self, function: Callable[..., Any], part: str, hook: str) -> Callable[..., Any]:
        """`function`, timed as code of `part`."""
        clock, stack, spent = self._clock, self._stack, self._spent
        inside, outside = self._overhead.inside, self._overhead.outside

        @wraps(function)
        def timed(*args: Any, **named: Any) -> Any:
            entered = clock()
            if stack:
                spent[stack[-1]] += entered - self._since
            stack.append(part)
            self._since = clock()
            try:
                return function(*args, **named)
            finally:
                left = clock()
                spent[part] += left - self._since - inside
                stack.pop()
                if stack:
                    self._since = left + outside
                else:
                    self._close(hook)

        return timed

    def attach(self, policy: Policy) -> None:
        """Time every method that the runtime, or the policy itself, calls. Before the runtime is made: it binds some.

        A part's helpers are its own time. Inherited hooks that nobody hears are left alone.
        """
        for name in PARTS:
            part = getattr(policy, name)
            contract = _CONTRACTS[name]
            for hook in sorted({*_hooks(Part), *_hooks(contract)}):
                if hook not in _UNTIMED and policy.overrides(part, hook):
                    setattr(part, hook, self.wrap(getattr(part, hook), name, hook))
        for hook in _POLICY_HOOKS:
            setattr(policy, hook, self.wrap(getattr(policy, hook), GLUE, hook))

    def _close(self, hook: str) -> None:
        """Add the time of a call from outside, which has ended, to its layer-step or forward."""
        event, spent = self.event_of(), self._spent
        if hook in _PER_FORWARD:
            if hook == "begin_forward":
                self.forwards_ns.append(0)
            self.forwards_ns[-1] += sum(spent.values())
        elif event >= 0:
            while len(self.steps) <= event:
                self.steps.append(Step(self.in_prompt()))
            step = self.steps[event]
            for part, ns in spent.items():
                step.parts_ns[part] += ns
            if hook == "decide":
                step.decide_ns += sum(spent.values())
                step.reach = self.reach_of()
        for part in spent:
            spent[part] = 0


def _hooks(contract: type[Part]) -> Iterator[str]:
    return (name for name, value in vars(contract).items() if callable(value) and not name.startswith("_"))


def _nothing(first: Any, second: Any) -> None:
    """The function whose bare call is timed."""


def call_ns(function: Callable[..., Any] = _nothing, batches: int = 25) -> float:
    """Time in ns of one call with two arguments, the loop around it subtracted: the median of many batches."""
    times = []
    for _ in range(batches):
        started = time.perf_counter_ns()
        for _ in range(_CALLS // batches):
            pass
        looped = time.perf_counter_ns()
        for _ in range(_CALLS // batches):
            function(1, 2)
        times.append((time.perf_counter_ns() - looped - (looped - started)) / (_CALLS // batches))
    return max(quantile(sorted(times), 0.5), 1.0)


def measure_overhead() -> Overhead:
    """What the stopwatch adds to a call, and to the caller of a call: on a function that does nothing."""
    bare = call_ns()
    insides, outsides = [], []
    for _ in range(25):
        watch = Stopwatch()
        inner = watch.wrap(_nothing, PARTS[0], "predict")

        def outer(call: Callable[..., Any] = inner) -> None:
            for _ in range(_CALLS // 25):
                call(1, 2)

        watch.event_of = lambda: 0
        watch.wrap(outer, GLUE, "decide")()
        spent = watch.steps[0].parts_ns
        insides.append(spent[PARTS[0]] / (_CALLS // 25))
        outsides.append(spent[GLUE] / (_CALLS // 25))
    # A call that is not timed costs its caller nothing but the call, which is part of what `inside` reads.
    return Overhead(max(round(quantile(sorted(insides), 0.5) - bare), 0), round(quantile(sorted(outsides), 0.5)))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of `ordered` (ascending, not empty) does not exceed: a value that occurred."""
    return ordered[max(-int(-share * len(ordered) // 1) - 1, 0)]
