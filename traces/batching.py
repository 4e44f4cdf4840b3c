"""Recorded rows into forwards: continuous batching in trace order, prefill in chunks.

Closed loop: what a forward contains never depends on time. A request is admitted, in trace order, as soon as
fewer than `batch_size` are active; its prompt, where recorded, is prefilled at once, alone, in chunks; each
decode forward then takes one token of every active request, or verifies several (`traces.speculation`).

Or as recorded: each of the trace's forwards (`forward_id`) with the rows that it had, in the order of their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.forward import DECODE, PREFILL, Forward, Span
from traces.messages import TraceError
from traces.reader import Trace
from traces.speculation import Speculation, num_accepted

BLOCK_ROWS = 512
_WHOLE_ROWS = 64
"""Forwards of up to so many rows have their look-ahead read for all layers at once."""


@dataclass(frozen=True)
class BatchConfig:
    """How rows become forwards; `max_tokens` cuts the trace after so many rows (None = all).

    as_recorded: by the trace's `forward_id`, in place of the two before it. speculation: of decoded tokens.
    """

    batch_size: int = 1
    prefill_chunk: int = 512
    max_tokens: int | None = None
    as_recorded: bool = False
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1, or null for the whole trace")
        if self.as_recorded and self.speculation is not None:
            raise ValueError("recorded forwards are replayed as they were; leave speculation out")

    @property
    def one_by_one(self) -> bool:
        """Whether every decode forward has one row."""
        return self.batch_size == 1 and not self.as_recorded and self.speculation is None


class RecordedRows:
    """Access to what a trace holds beside routing (`expertflow.forward.Recorded`)."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._read_rows: Any = None
        self._read: npt.NDArray[np.float32] | None = None

    def _rows(self, array: Any, rows: Any) -> npt.NDArray[Any]:
        return np.concatenate([np.asarray(array[row : row + 1]) for row in rows])

    def lookahead(self, rows: Any, layer: int) -> npt.NDArray[np.float32] | None:
        """Router scores become K · softmax, at most 1; listed candidates carry their chance in 1/255."""
        if len(rows) > _WHOLE_ROWS:
            found = self._chances(rows, slice(layer, layer + 1))
            return None if found is None else found[:, 0]
        # Asked for at each layer of a forward: read once, all layers together.
        if rows is not self._read_rows:
            self._read_rows, self._read = rows, self._chances(rows, slice(None))
        return None if self._read is None else self._read[:, layer]

    def _chances(self, rows: Any, layers: slice) -> npt.NDArray[np.float32] | None:
        """[rows, layers, D, E]."""
        trace = self._trace
        if trace.lookahead is not None:
            scores = self._rows(trace.lookahead, rows)[:, layers].astype(np.float32)
            # Scores of layers behind the last one are padding, which may hold anything and is never asked for.
            with np.errstate(invalid="ignore"):
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                chance: npt.NDArray[np.float32] = np.minimum(
                    trace.top_k * weights / weights.sum(axis=-1, keepdims=True), np.float32(1.0)
                )
            return chance
        if trace.lookahead_ids is None or trace.lookahead_scores is None:
            return None
        ids = self._rows(trace.lookahead_ids, rows)[:, layers].astype(np.int64)
        scores = self._rows(trace.lookahead_scores, rows)[:, layers].astype(np.float32) / 255.0
        dense = np.zeros((*ids.shape[:-1], trace.num_experts + 1), np.float32)
        # Padding ids fall into the last column, which is cut off.
        np.put_along_axis(dense, np.minimum(ids, trace.num_experts), scores, axis=-1)
        return dense[..., : trace.num_experts]

    def embedding(self, rows: Any) -> npt.NDArray[np.float32] | None:
        return None if self._trace.embedding is None else self._rows(self._trace.embedding, rows).astype(np.float32)

    def token_ids(self, rows: Any) -> npt.NDArray[Any] | None:
        return None if self._trace.token_ids is None else self._rows(self._trace.token_ids, rows)


class _Request:
    """A cursor over one request's rows, reading the trace in blocks."""

    def __init__(self, trace: Trace, index: int, start: int, stop: int) -> None:
        self.trace, self.index, self.start, self.next, self.stop = trace, index, start, start, stop
        self.num_prompt = min(int(trace.prompt_len[index]), stop - start)
        self.context = int(trace.context_len[index]) if trace.context_len is not None else 0
        self.accepts: npt.NDArray[np.bool_] | None = None
        """Of each row, whether it is accepted where it is drafted; drawn on first use."""
        self.block = (start, start)
        self.keys: list[list[list[int]]] = []

    def load(self, offsets: npt.NDArray[np.int32]) -> None:
        """Read the block that holds the next row as nested lists of expert keys, padding removed."""
        stop = min(self.next + BLOCK_ROWS, self.stop)
        raw = np.asarray(self.trace.experts[self.next : stop])
        self.keys = (raw.astype(np.int32) + offsets).tolist()
        padded = raw == self.trace.padding
        if padded.any() and self.trace.padding >= self.trace.num_experts:
            for row, layer in {(int(r), int(c)) for r, c, _ in np.argwhere(padded)}:
                keep = ~padded[row, layer]
                self.keys[row][layer] = [k for k, kept in zip(self.keys[row][layer], keep, strict=True) if kept]
        self.block = (self.next, stop)

    def take(self, offsets: npt.NDArray[np.int32]) -> list[list[int]]:
        """Keys [L][K] of the next row."""
        if not self.block[0] <= self.next < self.block[1]:
            self.load(offsets)
        row = self.keys[self.next - self.block[0]]
        self.next += 1
        return row

    @property
    def prompt_left(self) -> int:
        """Rows of the prompt that are not taken yet."""
        return self.start + self.num_prompt - self.next

    def verify(self, speculation: Speculation) -> tuple[int, int]:
        """Rows of the next forward, the first of them certain and the others drafted, and how many come out."""
        if self.accepts is None:
            self.accepts = speculation.accepts(self.index, self.stop - self.start)
        num_rows = min(speculation.num_drafted + 1, self.stop - self.next)
        first = self.next - self.start
        return num_rows, 1 + num_accepted(self.accepts[first + 1 : first + num_rows])

    @property
    def kv_len(self) -> int:
        """KV length after the rows taken so far."""
        return self.context + self.next - self.start


class Batches:
    """Iterable of forwards over a trace; iterating again starts again."""

    def __init__(self, trace: Trace, config: BatchConfig) -> None:
        self.trace = trace
        self.config = config
        self.num_tokens = min(trace.num_tokens, config.max_tokens or trace.num_tokens)
        self.num_requests = int(np.searchsorted(trace.request_start[:-1], self.num_tokens, side="left"))
        self._offsets = (np.arange(trace.num_layers, dtype=np.int32) * trace.num_experts)[:, None]
        self._recorded = RecordedRows(trace)
        if config.as_recorded and trace.forward_id is None:
            raise TraceError(
                f"batch_size=as_recorded: the trace {trace.name} does not say which forward a token ran in (it has no "
                "forward_id); give the number of requests that are decoded together"
            )

    def __iter__(self) -> Iterator[Forward]:
        return self._as_recorded() if self.config.as_recorded else self._in_trace_order()

    def _as_recorded(self) -> Iterator[Forward]:
        """Requests of a forward in the order of the trace, a request's rows as they follow one another."""
        starts = np.asarray(self.trace.request_start, np.int64)
        forward_id = np.asarray(self.trace.forward_id[: self.num_tokens], np.int64)  # type: ignore[index]
        order = np.argsort(forward_id, kind="stable")
        begins = np.flatnonzero(np.diff(forward_id[order], prepend=-1))
        request_of = np.searchsorted(starts, order, side="right") - 1
        open_requests: dict[int, _Request] = {}
        for index, (begin, end) in enumerate(pairwise([*begins.tolist(), self.num_tokens])):
            parts, started = [], []
            numbers, counts = np.unique(request_of[begin:end], return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                if number not in open_requests:
                    stop = min(int(starts[number + 1]), self.num_tokens)
                    open_requests[number] = _Request(self.trace, number, int(starts[number]), stop)
                    started.append(number)
                request = open_requests[number]
                in_prompt = min(count, max(request.prompt_left, 0))
                if in_prompt:
                    done = int(in_prompt == request.prompt_left)
                    parts.append((request, Span(number, in_prompt, True, done, done)))
                if count > in_prompt:
                    # Rows that a trace holds were kept: all of a verify step's were accepted.
                    decoded = count - in_prompt
                    parts.append((request, Span(number, decoded, False, decoded, decoded)))
            forward = self._spanned(index, parts, tuple(started))
            for number in forward.requests_ended:
                del open_requests[number]
            yield forward

    def _spanned(
        self, index: int, parts: Sequence[tuple[_Request, Span]], started: tuple[int, ...], verifies: bool = False
    ) -> Forward:
        """A forward of whatever rows. verifies: it has spans though each request should have one row alone."""
        rows: list[int] = []
        kv_lens: list[int] = []
        taken: list[list[list[int]]] = []
        for request, span in parts:
            rows += range(request.next, request.next + span.num_rows)
            for _ in range(span.num_rows):
                taken.append(request.take(self._offsets))
                kv_lens.append(request.kv_len)
            if not span.prompt:
                # On behind the last one that came out.
                request.next += span.num_out - span.num_rows
        spans = tuple(span for _, span in parts)
        plain = len(spans) == 1 if spans[0].prompt else all(span.num_rows == 1 and not span.prompt for span in spans)
        decode = not all(span.prompt for span in spans)
        if len(taken) == 1 and decode:
            demands, counts, order = taken[0], None, taken[0]
        else:
            demands, counts = self._union(taken)
            order = self._by_weight(demands, taken, rows)
        return Forward(
            index,
            DECODE if decode else PREFILL,
            rows,
            tuple(dict.fromkeys(span.request for span in spans)),
            tuple(kv_lens),
            demands,
            order,
            counts,
            started,
            tuple(dict.fromkeys(request.index for request, _ in parts if request.next == request.stop)),
            any(span.num_out for span in spans),
            self._recorded,
            () if plain and not verifies else spans,
        )

    def _verify(
        self, index: int, active: list[_Request], started: tuple[int, ...], speculation: Speculation
    ) -> Forward:
        """One verify step of every active request."""
        parts = []
        for request in active:
            num_rows, num_out = request.verify(speculation)
            parts.append((request, Span(request.index, num_rows, False, num_out, num_rows)))
        forward = self._spanned(index, parts, started, verifies=True)
        if len(forward.rows) > len(active):
            forward.draft_ns = speculation.draft_ns
        return forward

    def _in_trace_order(self) -> Iterator[Forward]:
        index = 0
        active: list[_Request] = []
        fresh: list[_Request] = []
        waiting = self._requests()
        more = True
        while more or active:
            while more and len(active) < self.config.batch_size:
                request = next(waiting, None)
                if request is None:
                    more = False
                    break
                active.append(request)
                fresh.append(request)
                started: tuple[int, ...] = (request.index,)
                while request.next - request.start < request.num_prompt:
                    yield self._prefill(index, request, started)
                    index, started = index + 1, ()
                if request.num_prompt:
                    fresh.remove(request)
                if request.next == request.stop:
                    active.remove(request)
            if active:
                begun, speculation = tuple(request.index for request in fresh), self.config.speculation
                if speculation is None:
                    yield self._decode(index, active, begun)
                else:
                    yield self._verify(index, active, begun, speculation)
                index += 1
                fresh = []
                active = [request for request in active if request.next < request.stop]

    def _requests(self) -> Iterator[_Request]:
        starts = self.trace.request_start
        for index in range(self.trace.num_requests):
            start, stop = int(starts[index]), min(int(starts[index + 1]), self.num_tokens)
            if start >= stop:
                return
            yield _Request(self.trace, index, start, stop)

    def _decode(self, index: int, active: list[_Request], started: tuple[int, ...]) -> Forward:
        rows = [request.next for request in active]
        taken = [request.take(self._offsets) for request in active]
        ended = tuple(request.index for request in active if request.next == request.stop)
        requests = tuple(request.index for request in active)
        kv_lens = tuple(request.kv_len for request in active)
        if len(taken) == 1:
            return Forward(
                index, DECODE, rows, requests, kv_lens, taken[0], taken[0], None, started, ended, True, self._recorded
            )
        demands, counts = self._union(taken)
        order = self._by_weight(demands, taken, rows)
        return Forward(
            index, DECODE, rows, requests, kv_lens, demands, order, counts, started, ended, True, self._recorded
        )

    def _prefill(self, index: int, request: _Request, started: tuple[int, ...]) -> Forward:
        first = request.next
        stop = min(first + self.config.prefill_chunk, request.start + request.num_prompt)
        taken = [request.take(self._offsets) for _ in range(first, stop)]
        rows = range(first, stop)
        done = stop == request.start + request.num_prompt
        ended = (request.index,) if request.next == request.stop else ()
        demands, counts = self._union(taken)
        order = self._by_weight(demands, taken, rows)
        kv_lens = tuple(request.context + row - request.start + 1 for row in rows)
        return Forward(
            index,
            PREFILL,
            rows,
            (request.index,),
            kv_lens,
            demands,
            order,
            counts,
            started,
            ended,
            done,
            self._recorded,
        )

    def _union(self, taken: list[list[list[int]]]) -> tuple[list[list[int]], list[dict[int, int]]]:
        """Per layer: each key once, at its last occurrence in row then column order, and its token count."""
        demands: list[list[int]] = []
        counts: list[dict[int, int]] = []
        for layer in range(self.trace.num_layers):
            count: dict[int, int] = {}
            for row in taken:
                for key in row[layer]:
                    # Popping first moves the key to the end: the last occurrence decides the order.
                    count[key] = count.pop(key, 0) + 1
            demands.append(list(count))
            counts.append(count)
        return demands, counts

    def _by_weight(self, demands: list[list[int]], taken: list[list[list[int]]], rows: Any) -> list[list[int]]:
        """Per layer the same keys, largest summed gate weight first, ties in touch order."""
        if self.trace.weights is None:
            return demands
        weights = np.concatenate([np.asarray(self.trace.weights[row : row + 1]) for row in rows]).astype(np.float64)
        result = []
        for layer, keys in enumerate(demands):
            total = dict.fromkeys(keys, 0.0)
            for row, values in zip(taken, weights[:, layer].tolist(), strict=True):
                for key, value in zip(row[layer], values, strict=False):
                    total[key] += value
            result.append(sorted(keys, key=lambda key: -total[key]))
        return result
