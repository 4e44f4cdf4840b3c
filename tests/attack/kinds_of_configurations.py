"""Configurations: bad ones, alone and in pairs, must be refused; any other must be refused or run to its end."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from random import Random
from typing import Any

from tests.attack import draw
from tests.attack.kinds import MIB, SEEDS_PER_ROUND, SeedKind
from tests.attack.outcome import ACCEPTED, MESSAGE, REFUSED, WRONG_ACCEPTED, Outcome, fault_of_message


class BadConfigurations(SeedKind):
    """Each of the generated list once, then pairs of wrong values; every fiftieth is one that Hydra itself must read.

    What is refused is refused by the checks of a run, with a message that names the key, and nothing that a
    configuration names is called.
    """

    name, target, most_bytes, batch = "configurations", "configurations", 1024 * MIB, 100

    def prepare(self, folder: Path) -> None:
        from tests.attack import configurations, trap

        self.calls = trap.CALLS
        self.cases = configurations.bad()
        Random(3).shuffle(self.cases)
        self.words = configurations.bad_words()
        self.values: dict[Any, list[Any]] = {}
        for case in configurations.bad_values():
            self.values.setdefault((case.base, case.world), []).append(case)
        if (line := configurations.judge(configurations.Bad(configurations.LRU, (), ()))) is not None:
            raise AssertionError(f"the sound configuration is not accepted: {line}")

    def _case(self, seed: int) -> Any:
        """A configuration, or the words of one with what a message must name."""
        from tests.attack.configurations import Bad

        index = seed % SEEDS_PER_ROUND
        if index % 50 == 49:
            return self.words[index // 50 % len(self.words)]
        if (index := index - index // 50) < len(self.cases):
            return self.cases[index]
        rng = Random(seed)
        base, world = rng.choice(list(self.values))
        first, second = rng.choice(self.values[base, world]), rng.choice(self.values[base, world])
        if first.edits[0][0] == second.edits[0][0]:
            return first
        return Bad(base, first.edits + second.edits, (), world)

    def told(self, seed: int) -> str:
        return str(self._case(seed))

    def attempt(self, seed: int, left_out: Collection[int] = ()) -> Outcome:
        from tests.attack.configurations import faults, judge, judge_words

        case = self._case(seed)
        names = case[1] if isinstance(case, tuple) else case.names
        line = judge_words(case[0]) if isinstance(case, tuple) else judge(case)
        if self.calls:
            told = f"{', '.join(self.calls)} was called"
            self.calls.clear()
            return Outcome(WRONG_ACCEPTED, True, told)
        if line is None:
            return Outcome(WRONG_ACCEPTED, True, str(case)[:500])
        problems = [*faults(line, names), fault_of_message(line, ())]
        if told := "; ".join(filter(None, problems)):
            return Outcome(MESSAGE, text=f"{told}: {line}")
        return Outcome(REFUSED, True, line)


class AnyConfigurations(SeedKind):
    """One to three keys with values at the ends of their ranges or far from them: refused in a line, or run."""

    name, target, most_bytes, batch = "configurations-run", "configurations", 1024 * MIB, 20

    def prepare(self, folder: Path) -> None:
        from tests.attack import configurations

        self.places: dict[Any, list[Any]] = {}
        for place in configurations.places():
            if place.world == "sim" and not place.dotted.endswith(("fitted", "fitted_start", "place.experts")):
                self.places.setdefault(place.base, []).append(place)
        # Each base once: what is compiled for it is not counted as the time of an input.
        for base in self.places:
            if (outcome := self._run(configurations.Bad(base, (("max_tokens", 8),), ()))).verdict != ACCEPTED:
                raise AssertionError(f"the sound configuration {' '.join(base)} does not run: {outcome}")

    def _case(self, seed: int) -> Any:
        from tests.attack.configurations import Bad, edges

        rng = Random(seed)
        base = rng.choice(list(self.places))
        edits: dict[str, Any] = {"max_tokens": 8}
        for _ in range(rng.choice((1, 1, 2, 3))):
            place = rng.choice(self.places[base])
            at_end = list(edges(place.key))
            values = (
                at_end if at_end and rng.random() < 0.6 else [draw.whole(rng, 1), draw.real(rng), draw.text(rng), [1]]
            )
            edits[place.dotted] = rng.choice(values)
        return Bad(base, tuple(edits.items()), ())

    def told(self, seed: int) -> str:
        return str(self._case(seed))

    def attempt(self, seed: int, left_out: Collection[int] = ()) -> Outcome:
        return self._run(self._case(seed))

    def _run(self, case: Any) -> Outcome:
        from sim.job.errors import one_line
        from sim.job.setup import make_policy, make_workload
        from sim.machine.run import run_policy
        from tests.attack.configurations import ready, trace_at_hand

        try:
            plain = ready(case)
            work = make_workload(plain, trace_at_hand() if plain["trace"]["path"] is None else None)
            policy, transfer = make_policy(plain["policy"], work, plain["seed"])
            metrics = run_policy(work, policy, transfer)
        except Exception as error:
            if (line := one_line(error)) is None:
                raise
            problem = fault_of_message(line, ())
            return Outcome(MESSAGE, text=f"{problem}: {line}") if problem else Outcome(REFUSED, text=line)
        sound = 0 < metrics["elapsed_ns"] < 2**63 and math.isfinite(metrics["stall_ns"])
        return Outcome(ACCEPTED if sound else WRONG_ACCEPTED, True, "" if sound else f"{case}: {metrics}"[:500])


def kinds() -> list[SeedKind]:
    """Those of configurations."""
    return [BadConfigurations(), AnyConfigurations()]
