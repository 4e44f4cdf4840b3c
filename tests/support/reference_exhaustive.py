"""Answers by trying everything: the fewest misses of any cache, the shortest of all schedules, and its bound.

The searches are exponential, for a handful of events on a handful of experts, and share no idea with the
policies they judge: no next use, no priority, no queue. Time is an integer without a unit.

The timing problem: one serial compute stream and one link, with the whole future known. Event i is an
attention of `attention[i]`, then one kernel of `kernel[i]` for each of its experts, in any order, each of
which needs its expert resident (with `group` one kernel may compute several of them); the attention of
event i+1 follows the last kernel of event i. The link loads one expert at a time in `load`, is never
interrupted, and may load any expert at any time. A load holds one of `slots` slots from its start, and may
take it from any resident but those whose kernel is running. The cache starts cold. With `host` an expert of
event i may also be computed without being resident, once the attention of event i is over, one at a time in
`host`; the attention of event i+1 follows these as well.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from tests.support.reference_cache import Event, count_hits

Expert = tuple[int, int]  # (layer, expert)


# -- fewest misses -------------------------------------------------------------------------------------------


def _subsets(pool: frozenset[Expert], size: int, must: frozenset[Expert]) -> list[frozenset[Expert]]:
    """Subsets of `pool` with at most `size` members that hold all of `must`."""
    found = [must]
    for expert in pool - must:
        found += [chosen | {expert} for chosen in found if len(chosen) < size]
    return found


def fewest_misses(events: Iterable[Event], *, capacity: int, bypass: bool) -> int:
    """Fewest misses of any choice of victims in one cache, by following every set of residents it could hold.

    Without `bypass` an event's demand, at most the capacity, must be resident after it.
    """
    best: dict[frozenset[Expert], int] = {frozenset(): 0}
    for layer, experts in events:
        demand = frozenset((layer, expert) for expert in experts)
        reached: dict[frozenset[Expert], int] = {}
        for resident, misses in best.items():
            cost = misses + len(demand - resident)
            for kept in _subsets(resident | demand, capacity, frozenset() if bypass else demand):
                reached[kept] = min(cost, reached.get(kept, cost))
        best = reached
    return min(best.values())


# -- shortest schedule ---------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Something under way; an attention has no `experts`, a load one."""

    experts: frozenset[Expert]
    remaining: int


class State(NamedTuple):
    """All that the rest of a schedule depends on."""

    event: int
    attended: bool  # the event's attention has started
    waiting: frozenset[Expert]  # the event's kernels that have not started
    computing: Work | None
    loading: Work | None
    resident: frozenset[Expert]
    hosting: Work | None = None


class Problem(NamedTuple):
    """One instance of the timing problem in the module's docstring."""

    demand: tuple[frozenset[Expert], ...]
    attention: tuple[int, ...]
    kernel: tuple[int, ...]
    load: int
    slots: int
    group: tuple[int, ...] = ()
    host: int = 0  # 0: nothing is computed there

    def waiting(self, event: int) -> frozenset[Expert]:
        """Kernels of an event before any has started; none past the last event."""
        return self.demand[event] if event < len(self.demand) else frozenset()

    def launches(self, event: int, ready: frozenset[Expert]) -> Iterator[Work]:
        """Every kernel that may start over experts of `ready`: of one, or of any of them with `group`."""
        if not self.group:
            for expert in ready:
                yield Work(frozenset([expert]), self.kernel[event])
            return
        for experts in _subsets(ready, len(ready), frozenset()):
            if experts:
                yield Work(experts, self.group[len(experts) - 1])


def _problem(
    events: Iterable[Event],
    attention: Sequence[int],
    kernel: Sequence[int],
    load: int,
    slots: int,
    group: Sequence[int],
    host: int,
) -> Problem:
    """The instance with its values checked."""
    demand = tuple(frozenset((layer, expert) for expert in experts) for layer, experts in events)
    problem = Problem(demand, tuple(attention), tuple(kernel), load, slots, tuple(group), host)
    if not len(demand) == len(problem.attention) == len(problem.kernel):
        raise ValueError(f"one attention and one kernel time per event, got {problem}")
    if not demand or not all(demand) or min(*problem.attention, *problem.kernel, load, slots) < 1:
        raise ValueError(f"needs events with demand, and times and slots of at least 1, got {problem}")
    return problem


def _compute_choices(problem: Problem, state: State) -> Iterator[State]:
    """The state after each thing the compute stream may start now, and after starting nothing."""
    yield state
    if state.computing is not None or state.event == len(problem.demand):
        return
    if not state.attended:
        yield state._replace(attended=True, computing=Work(frozenset(), problem.attention[state.event]))
        return
    for work in problem.launches(state.event, state.waiting & state.resident):
        yield state._replace(waiting=state.waiting - work.experts, computing=work)


def _link_choices(problem: Problem, state: State) -> Iterator[State]:
    """The state after each load the link may start now, with each victim, and after starting none."""
    yield state
    if state.loading is not None:
        return
    useful = state.waiting.union(*problem.demand[state.event + 1 :])
    in_use = state.computing.experts if state.computing else frozenset()
    for expert in useful - state.resident:
        work = Work(frozenset([expert]), problem.load)
        if len(state.resident) < problem.slots:
            yield state._replace(loading=work)
            continue
        for victim in state.resident - in_use:
            yield state._replace(loading=work, resident=state.resident - {victim})


def _both_choices(problem: Problem, state: State) -> Iterator[State]:
    """The state after each choice of the compute stream and of the link."""
    for computing in _compute_choices(problem, state):
        yield from _link_choices(problem, computing)


def _host_choices(problem: Problem, state: State) -> Iterator[State]:
    """The state after each expert that the host may start now, and after starting none."""
    yield state
    is_attending = state.computing is not None and not state.computing.experts
    if not problem.host or state.hosting is not None or not state.attended or is_attending:
        return
    for expert in state.waiting:
        work = Work(frozenset([expert]), problem.host)
        yield state._replace(waiting=state.waiting - {expert}, hosting=work)


def _advance(problem: Problem, state: State, elapsed: int) -> State:
    """The state `elapsed` later, where nothing under way ends sooner than that."""
    event, attended, waiting, computing, loading, resident, hosting = state
    if loading is not None:
        loading = loading._replace(remaining=loading.remaining - elapsed)
        if loading.remaining == 0:
            resident = resident | loading.experts
            loading = None
    if computing is not None:
        computing = computing._replace(remaining=computing.remaining - elapsed)
        if computing.remaining == 0:
            computing = None
    if hosting is not None:
        hosting = hosting._replace(remaining=hosting.remaining - elapsed)
        if hosting.remaining == 0:
            hosting = None
    if attended and not waiting and computing is None and hosting is None:
        event, attended, waiting = event + 1, False, problem.waiting(event + 1)
    return State(event, attended, waiting, computing, loading, resident, hosting)


def brute_force_optimum(
    events: Iterable[Event],
    attention: Sequence[int],
    kernel: Sequence[int],
    load: int,
    slots: int,
    *,
    every_tick: bool = False,
    group: Sequence[int] = (),
    host: int = 0,
) -> int:
    """The least time in which any schedule can finish the events: Dijkstra over all states.

    Something is started only at time 0 or when something else ends: moving every start of a schedule back
    to the end it waits for changes no order and delays nothing. `every_tick` drops that argument and tries
    a start at each unit of time. Loads without a later use, and evictions while a slot is free, are left
    out: neither helps.
    group: time of one kernel over 1, 2, 3 … experts, in place of `kernel`; then any of an event's experts that are
    resident may run at once. A load takes no slot whose expert runs.
    host: time of one expert on the host; 0: none is computed there.
    """
    problem = _problem(events, attention, kernel, load, slots, group, host)
    first = State(0, False, problem.waiting(0), None, None, frozenset())
    reached = {first: 0}
    tie = count()
    frontier = [(0, next(tie), first)]
    while frontier:
        now, _, state = heapq.heappop(frontier)
        if state.event == len(problem.demand):
            return now
        if now > reached[state]:
            continue
        for begun in _host_choices(problem, state):
            for started in _both_choices(problem, begun):
                busy = (started.computing, started.loading, started.hosting)
                under_way = [work.remaining for work in busy if work]
                if not under_way:
                    continue  # waiting for nothing changes nothing
                elapsed = 1 if every_tick else min(under_way)
                later = _advance(problem, started, elapsed)
                if now + elapsed < reached.get(later, now + elapsed + 1):
                    reached[later] = now + elapsed
                    heapq.heappush(frontier, (now + elapsed, next(tie), later))
    raise AssertionError(f"no schedule finishes {problem}")


# -- partitions ----------------------------------------------------------------------------------------------


def cheapest_partition(members: Sequence[int], cost: Callable[[Sequence[int]], int]) -> int:
    """The least sum of `cost` over the parts, of all partitions of `members`."""
    return min(sum(cost(part) for part in parts) for parts in _partitions(list(members)))


def _partitions(members: list[int]) -> Iterator[list[list[int]]]:
    """Every way to put `members` into parts, none of them empty."""
    if not members:
        yield []
        return
    first, rest = members[0], members[1:]
    for parts in _partitions(rest):
        yield [[first], *parts]
        for place, part in enumerate(parts):
            yield [*parts[:place], [first, *part], *parts[place + 1 :]]


# -- its bound -----------------------------------------------------------------------------------------------


def min_loads(events: Iterable[Event], slots: int) -> int:
    """Loads without which no schedule with `slots` slots can serve the events: MIN with bypass, from cold."""
    demand = list(events)
    num_layers = max((layer for layer, _ in demand), default=0) + 1
    num_experts = max((expert for _, experts in demand for expert in experts), default=0) + 1
    return count_hits(
        demand,
        num_layers=num_layers,
        num_experts=num_experts,
        capacity=slots,
        policy="belady_bypass",
        scope="global",
    ).misses


def floor_bound(
    events: Iterable[Event],
    attention: Sequence[int],
    kernel: Sequence[int],
    load: int,
    slots: int,
    group: Sequence[int] = (),
) -> int:
    """A time no schedule can beat: the largest over prefixes 1..i of loads + one kernel + compute after i.

    The last of the loads that events 1..i cannot do without ends no sooner than their number x `load`; a
    kernel of some event up to i waits for it, and the events after i wait for that kernel. At least all
    compute. With `group` the kernels of an event take the cheapest of all partitions, one kernel the shortest group.
    """
    demand = list(events)
    serial = [
        start + (cheapest_partition(experts, lambda part: group[len(part) - 1]) if group else each * len(experts))
        for (_, experts), start, each in zip(demand, attention, kernel, strict=True)
    ]
    shortest = min(group) if group else min(kernel)
    bounds = [sum(serial)]
    for last in range(len(demand)):
        loads = min_loads(demand[: last + 1], slots)
        if loads >= 1:
            bounds.append(loads * load + shortest + sum(serial[last + 1 :]))
    return max(bounds)
