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
        self._last_ns: dict[int, int] = {}
        self._admitted_ns: dict[int, int] = {}
        self._now_ns = 0

    def end_forward(self, forward: Forward, now_ns: int) -> None:
        """The tokens of `forward` were read back at `now_ns`."""
        last = self._last_ns
        for request in forward.requests_started:
            self._admitted_ns[request] = self._now_ns
        if forward.emits_token:
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

    def begin_measuring(self, counters: Counters) -> None:
        """The warm-up is over: forget its tokens, keep its counters to subtract."""
        self.before = counters
        self.num_tokens = 0
        del self.gaps_ns[:]
        del self.first_token_ns[:]
