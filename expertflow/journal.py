"""When tokens came out: inter-token latencies and times to first token, 8 bytes a token."""

from __future__ import annotations

from array import array

from expertflow.counters import Counters
from expertflow.forward import DECODE, Forward


class Journal:
    """Token times of every request, in ns. Gaps are inter-token latencies; a request recorded without its
    prompt counts its first gap from the start of its first forward, and has no time to first token."""

    def __init__(self) -> None:
        self.gaps_ns = array("q")
        self.first_token_ns = array("q")
        self.before: Counters | None = None
        """Counters at the end of the warm-up; None without one."""
        self.num_tokens = 0
        self.num_verified = self.num_drafted = self.num_accepted = 0
        """In forwards with spans: spans of decoded rows, drafted rows among these, and accepted ones."""
        self._last_ns: dict[int, int] = {}
        self._admitted_ns: dict[int, int] = {}
        self._now_ns = 0

    def end_forward(self, forward: Forward, now_ns: int) -> None:
        """The tokens of `forward` were read back at `now_ns`."""
        last = self._last_ns
        for request in forward.requests_started:
            self._admitted_ns[request] = self._now_ns
        if forward.spans:
            self._end_spans(forward, now_ns)
        elif forward.emits_token:
            self.num_tokens += len(forward.requests)
            for request in forward.requests:
                if forward.phase == DECODE:
                    self.gaps_ns.append(now_ns - last.get(request, self._now_ns))
                else:
                    self.first_token_ns.append(now_ns - self._admitted_ns[request])
                last[request] = now_ns
        for request in forward.requests_ended:
            last.pop(request, None)
            self._admitted_ns.pop(request, None)
        self._now_ns = now_ns

    def _end_spans(self, forward: Forward, now_ns: int) -> None:
        """Of tokens of a request that came out together each has an equal part of the gap, in whole ns: a mean over
        them is the time between tokens."""
        last = self._last_ns
        self.num_tokens += forward.num_out
        for span in forward.spans:
            request, num_out = span.request, span.num_out
            if not span.prompt:
                self.num_verified += 1
                self.num_drafted += span.num_rows - 1
                self.num_accepted += num_out - 1
            if not num_out:
                continue
            if span.prompt:
                self.first_token_ns.append(now_ns - self._admitted_ns[request])
            else:
                part, rest = divmod(now_ns - last.get(request, self._now_ns), num_out)
                self.gaps_ns.extend([part + 1] * rest + [part] * (num_out - rest))
            last[request] = now_ns

    def begin_measuring(self, counters: Counters) -> None:
        """The warm-up is over: forget its tokens, keep its counters to subtract."""
        self.before = counters
        self.num_tokens = 0
        self.num_verified = self.num_drafted = self.num_accepted = 0
        del self.gaps_ns[:]
        del self.first_token_ns[:]
