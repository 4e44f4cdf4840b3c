"""Which request each choice of a table is of, and which of its tokens: decided by all that the columns hold.

A number under `token` may count the tokens of a request, those of its context, or those of a forward, from 0 with each;
which files are one run is settled before (`traces.importers.parts`). What is concluded is said
in a note, and what cannot be told apart is refused. Shape letter: C choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from traces.container import TraceError, fault
from traces.importers.assemble import Choices
from traces.importers.collected import UNKNOWN, Ints, Picks, Rows, codes_of
from traces.importers.columns import HOW
from traces.importers.parts import Has, Numbers, falling_step, settle_parts
from traces.importers.runs import Runs, Told

_REQUEST = "name the column of the request with request="


@dataclass(frozen=True)
class Asked:
    """What the user said of the numbers. both_named: token= and step=, so that neither is left out."""

    positions: bool = False
    both_named: bool = False


def numbered(rows: Rows, picks: Picks, choices: Choices, asked: Asked, notes: list[str]) -> None:
    """Hand all choices to `choices`, with their request and token. TraceError names the row that cannot be placed."""
    if not len(picks):
        return
    reading = _Reading(rows, picks, Numbers.of(picks), asked, notes)
    reading.settle_requests()
    reading.settle_parts()
    try:
        if reading.has_token and not reading.counts_in_forwards():
            reading.hand_numbered(choices)
        else:
            reading.hand_runs(choices)
    except TraceError:
        raise
    except ValueError as error:
        raise rows.fault_at(int(picks.first[reading.pick]), str(error), HOW) from None


class _Reading:
    """How one table is read."""

    def __init__(self, rows: Rows, picks: Picks, numbers: Numbers, asked: Asked, notes: list[str]) -> None:
        columns = rows.columns
        self._rows, self._picks, self._n, self._asked, self._notes = rows, picks, numbers, asked, notes
        self.has_token, self._has_step = bool(columns.token), bool(columns.step)
        self._has_request, self._has_phase = bool(columns.request), bool(columns.phase)
        self.pick = 0
        """The choice that is being handed on."""
        self._segment = np.zeros(len(picks), np.int64)
        """Of tables without a request: how often the token number had fallen in the choice's layer."""

    def _fault(self, pick: int, problem: str, remedy: str) -> TraceError:
        return self._rows.fault_at(int(self._picks.first[pick]), problem, remedy)

    def settle_requests(self) -> None:
        """A column of requests that is empty throughout is none; TraceError where only some rows name one."""
        nameless = self._n.request == UNKNOWN
        if not self._has_request or not nameless.any():
            return
        if not nameless.all():
            pick = int(np.argmax(nameless))
            raise self._fault(pick, "names no request, other rows do", "give every row its request")
        self._has_request = False
        self._notes.append(f"column {self._rows.columns.request} is empty: not used")

    def settle_parts(self) -> None:
        """Which files are one run."""
        settle_parts(self._rows, self._n, Has(self._has_request, self.has_token, self._has_step), self._notes)

    # -- what a token's number counts --------------------------------------------------------------------------

    def counts_in_forwards(self) -> bool:
        """Whether token numbers begin again with each forward, so that they tell no token of a request."""
        found = self._in_requests() if self._has_request else self._in_segments()
        if found and self._asked.both_named:
            remedy = "leave out token=: the forwards of step= tell the tokens"
            raise self._fault(0, "numbers tokens from 0 again with each step", remedy)
        if found:
            self._notes.append("token numbers begin again with each forward: tokens are counted by the forwards")
        return found

    def _in_requests(self) -> bool:
        """The same of a table that names requests: numbers fall from step to step."""
        n = self._n
        code = codes_of([n.part, n.request, n.layer, n.token])
        if int(code.max()) + 1 == len(code):
            self._check_order()
            return False
        if not self._has_step:
            return False
        step = codes_of([n.step, n.layer, n.request, n.part])
        least, most = np.full(int(step.max()) + 1, 1 << 62), np.full(int(step.max()) + 1, -(1 << 62))
        np.minimum.at(least, step, n.token)
        np.maximum.at(most, step, n.token)
        owner = np.zeros(len(least), np.int64)
        owner[step] = codes_of([n.part, n.request, n.layer])
        same = np.diff(owner) == 0
        falls = same & (least[1:] <= most[:-1])
        return bool(2 * falls.sum() > same.sum())

    def _check_order(self) -> None:
        """TraceError where numbers leave gaps and stand in no order: then they count nothing."""
        n = self._n
        owner = codes_of([n.part, n.request])
        pairs = np.unique(np.stack([owner, n.token]), axis=1)
        same = np.diff(pairs[0]) == 0
        gaps = same & (np.diff(pairs[1]) > 1)
        if not gaps.any():
            return
        order = np.lexsort((np.arange(len(owner)), n.layer, owner))
        together = (np.diff(owner[order]) == 0) & (np.diff(n.layer[order]) == 0)
        falls = np.flatnonzero(together & (np.diff(n.token[order]) < 0))
        if len(falls):
            pick = int(order[falls[0] + 1])
            problem = f"{self._rows.columns.token} is {int(n.token[pick])} after a larger one, and numbers leave gaps"
            remedy = "token= counts the tokens of a request, and is no number of the vocabulary; else give step="
            raise self._fault(pick, problem, remedy)
        self._note_gaps(len(np.unique(pairs[0][1:][gaps])))

    def _note_gaps(self, num: int) -> None:
        self._notes.append(f"token numbers of {num} requests leave gaps: their tokens are taken in that order")

    def _in_segments(self) -> bool:
        """The same of a table without requests, in which a number that does not rise begins one; the segments."""
        in_forwards = []
        for part in np.unique(self._n.part).tolist():
            here = np.flatnonzero(self._n.part == part)
            self._count_falls(here)
            in_forwards.append(self._is_by_forward(here))
        if any(in_forwards) and not all(in_forwards):
            remedy = "import these files one by one"
            raise fault(self._rows.paths[0], "source", "numbers tokens otherwise than other files", remedy)
        if not any(in_forwards):
            for part in np.unique(self._n.part).tolist():
                self._check_segments(np.flatnonzero(self._n.part == part))
        return any(in_forwards)

    def _count_falls(self, here: Ints) -> None:
        last: dict[int, tuple[int, int]] = {}
        n, segments = self._n, self._segment
        columns = (here.tolist(), n.layer[here].tolist(), n.token[here].tolist())
        for pick, layer, token in zip(*columns, strict=True):
            before, number = last.get(layer, (-(1 << 62), 0))
            number += token <= before
            last[layer] = token, number
            segments[pick] = number

    def _widest(self, here: Ints) -> Ints:
        """The choices of the layer that has most of a part: its segments are looked at."""
        layers, counts = np.unique(self._n.layer[here], return_counts=True)
        found: Ints = here[self._n.layer[here] == layers[int(counts.argmax())]]
        return found

    def _is_by_forward(self, here: Ints) -> bool:
        """Whether the segments of a part are forwards: a prompt, and then single tokens that begin again at its number.

        Prompts alone, each from its first token, are requests; what is then assumed is said.
        """
        n = self._n
        of_layer = self._widest(here)
        segment, token = self._segment[of_layer], n.token[of_layer]
        begins = np.flatnonzero(np.diff(segment, prepend=-1))
        sizes = np.diff(np.append(begins, len(segment)))
        if len(begins) < 2 or (token[begins] != token[0]).any():
            return False
        single = sizes[1:] == 1
        if self._has_step and (np.diff(n.step[of_layer][begins]) > 0).all() and not single.any():
            spread = [len(set(part.tolist())) for part in np.split(n.step[of_layer], begins[1:])]
            if max(spread) == 1 and max(sizes) > 1:
                self._notes.append(
                    "token numbers begin again with each step: each is taken for a request, all of it in one forward; "
                    f"if a step holds tokens of several, {_REQUEST}"
                )
            return False
        if self._has_phase:
            return bool(single.any()) and bool((n.phase[of_layer][begins[1:]][single] == 0).all())
        return bool(2 * single.sum() > len(single))

    def _check_segments(self, here: Ints) -> None:
        """TraceError where the numbers of a part are those of several requests in turn."""
        n = self._n
        of_layer = self._widest(here)
        segment, token, step = self._segment[of_layer], n.token[of_layer], n.step[of_layer]
        same = np.diff(segment) == 0
        begins = np.flatnonzero(np.diff(segment, prepend=-1))
        ends = np.append(begins[1:], len(segment)) - 1
        problem, remedy = "", f"tokens of several requests stand in turn: {_REQUEST}"
        gap = np.flatnonzero(same & (np.diff(token) > 1)) + 1
        # A request that goes on after another one's tokens: its number follows that of an earlier segment's end.
        resumed = gap[np.isin(token[gap], token[ends] + 1)] if len(begins) > 1 else gap[:0]
        within = begins[1:][step[begins[1:]] == step[begins[1:] - 1]] if self._has_step else begins[:0]
        odd = begins[1:][token[begins[1:]] != token[0]] if not self._asked.positions else begins[:0]
        for found in (within, odd, resumed):
            if len(found):
                pick = int(of_layer[found[0]])
                before = int(token[found[0] - 1])
                problem = f"{self._rows.columns.token} is {int(token[found[0]])} after {before}"
                raise self._fault(pick, problem, remedy)
        if len(gap):
            self._note_gaps(len(np.unique(segment[gap])))

    # -- handing on --------------------------------------------------------------------------------------------

    def hand_numbered(self, choices: Choices) -> None:
        """Choices whose token is told by its number."""
        n = self._n
        request, offset = (n.request, np.zeros(len(n.token), np.int64)) if self._has_request else self._joined_phases()
        owner = codes_of([n.part, request])
        forward = self._forwards(owner)
        names = list(self._rows.requests)
        many_parts = int(n.part.max()) > 0
        known: dict[int, int] = {}
        for pick, row in self._handed(choices):
            own = int(owner[pick])
            number = known.get(own)
            if number is None:
                path = self._rows.paths[int(n.file[pick])]
                label = names[int(n.request[pick])] if self._has_request else f"request {int(request[pick])}"
                number = known[own] = choices.new_request(f"{path.stem}/{label}"[:200] if many_parts else label)
            experts, weights = self._picks.experts(pick)
            choices.add(
                number,
                int(n.token[pick] + offset[pick]),
                int(n.layer[pick]),
                experts,
                place=row,
                weights=weights,
                prefill=bool(n.phase[pick]) if self._has_phase else None,
                forward=None if forward is None else int(forward[pick]),
            )

    def _joined_phases(self) -> tuple[Ints, Ints]:
        """The request of each choice, and what is added to its token: an answer whose numbers begin again follows the
        prompt before it."""
        n = self._n
        request, offset = self._segment.copy(), np.zeros(len(n.token), np.int64)
        if not self._has_phase:
            return request, offset
        num_joined = 0
        for part in np.unique(n.part).tolist():
            here = np.flatnonzero(n.part == part)
            segments = self._segment[here]
            owner, length = -1, 0
            for segment in range(int(segments.max()) + 1):
                chosen = here[segments == segment]
                phases = set(n.phase[chosen].tolist())
                if phases == {0} and owner >= 0 and length:
                    request[chosen], offset[chosen] = owner, length
                    num_joined, length = num_joined + 1, 0
                    continue
                owner = segment
                length = int(n.token[chosen].max()) + 1 - int(n.token[chosen].min()) if phases == {1} else 0
                request[chosen] = segment
        if num_joined:
            self._notes.append(
                f"{num_joined} answers are numbered from the beginning again: each is taken to follow the prompt before"
            )
        return request, offset

    def _forwards(self, owner: Ints) -> Ints | None:
        """The number of the forward of each choice; None where it is not told. Parts have forwards of their own."""
        n = self._n
        if not self._has_step or int(n.step.min()) < 0:
            return None
        if self._counts_for_each(owner):
            self._notes.append("step numbers begin again with each request: no forwards in common are assumed")
            return None
        base, forward = 0, n.step.copy()
        for part in np.unique(n.part).tolist():
            here = n.part == part
            forward[here] += base
            base = int(forward[here].max()) + 1
        return forward

    def _counts_for_each(self, owner: Ints) -> bool:
        """Whether each request has steps of its own: all begin with one number, and stand one after the other."""
        n = self._n
        for part in np.unique(n.part).tolist():
            here = np.flatnonzero(n.part == part)
            requests, first = np.unique(owner[here], return_index=True)
            if len(requests) < 2:
                continue
            changes = int((np.diff(owner[here]) != 0).sum())
            falls = bool((np.diff(n.step[here]) < 0).any())
            begins = n.step[here][first]
            if changes == len(requests) - 1 and falls and (begins == begins[0]).all():
                return True
        return False

    def hand_runs(self, choices: Choices) -> None:
        """Choices whose token is told by its forward."""
        if self._asked.positions:
            choices.positions = False
        n = self._n
        if not self._has_step and not self.has_token and len(np.unique(n.layer)) == 1:
            self._notes.append("one layer and no step: all rows of a request are taken for one forward, its prompt")
        if self._has_step and (pick := falling_step(self._n)) is not None:
            raise self._fault(pick, f"goes back to step {int(n.step[pick])}", "give each run its own file or request")
        stream = codes_of([n.part, n.request]) if self._has_request else n.part
        ran_in = self._forwards(stream)
        forward = self._forward_of_stream(stream)
        runs = Runs(choices, by_request=self._has_request)
        names = list(self._rows.requests)
        many_parts = int(n.part.max()) > 0
        streams: dict[int, str] = {}
        for pick, row in self._handed(choices):
            name = streams.get(code := int(stream[pick]))
            if name is None:
                own = names[int(n.request[pick])] if self._has_request else ""
                file = self._rows.paths[int(n.file[pick])].stem if many_parts or not own else ""
                name = "/".join(word for word in (file, own) if word)
                # Files of one name in several folders.
                name = streams[code] = f"{name} {code}" if name in streams.values() else name
            told = Told(bool(n.phase[pick]) if self._has_phase else None, None if ran_in is None else int(ran_in[pick]))
            experts, weights = self._picks.experts(pick)
            runs.add(name, int(forward[pick]), int(n.layer[pick]), experts, place=row, weights=weights, told=told)
        self._notes += runs.number(self._rows.paths[0])

    def _forward_of_stream(self, stream: Ints) -> Ints:
        """The number of the forward within its stream: by step, by numbers that fall, or by layers that fall."""
        n = self._n
        if self._has_step:
            pairs, code = np.unique(np.stack([stream, n.step]), axis=1, return_inverse=True)
            _, begins = np.unique(pairs[0], return_index=True)
            of_pair = np.arange(pairs.shape[1]) - np.repeat(begins, np.diff(np.append(begins, pairs.shape[1])))
            found: Ints = of_pair[code.reshape(-1)]
            return found
        if self.has_token:
            return self._segment
        last: dict[int, tuple[int, int]] = {}
        forward = np.zeros(len(stream), np.int64)
        for pick, (own, layer) in enumerate(zip(stream.tolist(), n.layer.tolist(), strict=True)):
            before, number = last.get(own, (layer, 0))
            number += layer < before
            last[own] = layer, number
            forward[pick] = number
        return forward

    def _handed(self, choices: Choices) -> Iterator[tuple[int, int]]:
        """(choice, place) of all, in the order of the files; `choices` is told where each file begins."""
        current = UNKNOWN
        for pick, (file, place) in enumerate(
            zip(self._n.file.tolist(), self._picks.column("place").tolist(), strict=True)
        ):
            if file != current:
                current = file
                choices.reads(self._rows.paths[file])
            self.pick = pick
            yield pick, place
