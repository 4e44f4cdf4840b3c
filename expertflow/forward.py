"""One forward pass as the runtime sees it: which experts each layer demands, and how many tokens.

Knows nothing of files: `traces.batching` builds these from a recorded trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DECODE = "decode"
PREFILL = "prefill"


class Span(NamedTuple):
    """Consecutive rows of one request in a forward that holds more than a row of each request, or than one prompt.

    prompt: rows of its prompt; else decoded ones, of which several are a verify step of speculative decoding: the last
    token and drafted ones. num_out: tokens of the request that come out, which is known when the forward has ended.
    num_logits: rows that reach the head.
    """

    request: int
    num_rows: int
    prompt: bool
    num_out: int
    num_logits: int


class Recorded(Protocol):
    """What a trace holds beside the routing, for the rows of one forward; None where it holds nothing."""

    def lookahead(self, rows: Sequence[int], layer: int) -> npt.NDArray[np.float32] | None:
        """Chance [len(rows), D, E] that a row picks an expert of layer `layer + 1 + d`, by the pre-gate recorded at
        `layer`; NaN past the last layer."""

    def embedding(self, rows: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """Token embeddings [len(rows), d]."""

    def token_ids(self, rows: Sequence[int]) -> npt.NDArray[Any] | None:
        """Token ids [len(rows)]."""


@dataclass(slots=True)
class Forward:
    """One pass of the model over a batch of token rows.

    phase: DECODE where any row is a decoded one, else PREFILL. spans: the rows by request, in order, of a forward that
    mixes phases or has several rows of a request in decode, or several prompts; () where phase and requests say it
    all: one row of each request (DECODE), or all rows of one prompt (PREFILL). draft_ns: what a draft model has taken
    before it.
    demands[l]: expert keys (`layer * num_experts + expert`), each once, in touch order: row order, then
    column order, at the last occurrence. issue_order[l]: the same keys, best summed gate weight first.
    counts[l][key]: tokens routed to the expert; None stands for one token each (batch 1 decode).
    kv_lens[i]: KV length of row i's request including the row itself.
    """

    index: int
    phase: str
    rows: Sequence[int]
    requests: tuple[int, ...]
    kv_lens: tuple[int, ...]
    demands: list[list[int]]
    issue_order: list[list[int]]
    counts: list[dict[int, int]] | None
    requests_started: tuple[int, ...] = ()
    requests_ended: tuple[int, ...] = ()
    emits_token: bool = True
    recorded: Recorded | None = None
    spans: tuple[Span, ...] = ()
    draft_ns: int = 0

    @property
    def num_tokens(self) -> int:
        """Token rows in this forward."""
        return len(self.rows)

    @property
    def has_prompt(self) -> bool:
        """Whether rows of a prompt are among them."""
        return self.phase == PREFILL or any([span.prompt for span in self.spans])

    @property
    def num_logits(self) -> int:
        """Rows that reach the head: one of each request that a token comes out of, all of a verify step."""
        if self.spans:
            return sum([span.num_logits for span in self.spans])
        return len(self.requests) if self.emits_token else 0

    @property
    def num_out(self) -> int:
        """Tokens that come out."""
        if self.spans:
            return sum([span.num_out for span in self.spans])
        return len(self.requests) if self.emits_token else 0


class KnownForward(Protocol):
    """A forward as the parts of a policy see it: its tokens from the begin, the routing as it becomes known.

    Fields as in `Forward`. demands, issue_order and counts hold the layers whose routing has been read, and no more;
    requests_ended is empty until the tokens have been read back; recorded answers for the forward's own rows and for
    those layers.
    """

    @property
    def index(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def rows(self) -> Sequence[int]: ...
    @property
    def requests(self) -> Sequence[int]: ...
    @property
    def kv_lens(self) -> Sequence[int]: ...
    @property
    def demands(self) -> Sequence[Sequence[int]]: ...
    @property
    def issue_order(self) -> Sequence[Sequence[int]]: ...
    @property
    def counts(self) -> Sequence[Mapping[int, int]] | None: ...
    @property
    def requests_started(self) -> Sequence[int]: ...
    @property
    def requests_ended(self) -> Sequence[int]: ...
    @property
    def emits_token(self) -> bool: ...
    @property
    def recorded(self) -> Recorded | None: ...
    @property
    def num_tokens(self) -> int: ...


class Unveiling:
    """One forward on its way to the parts of a policy: `known` is what they are given, `reveal` shows a layer more.

    copies: recorded values are copies, which lead to no others of the trace and change nothing for anybody else.
    """

    __slots__ = ("known",)

    def __init__(self, forward: Forward, copies: bool = False) -> None:
        self.known: KnownForward = _Known(forward, copies)

    def reveal(self, layer: int) -> None:
        """The routing of `layer`, the next one, has been read."""
        _set_num_known(self.known, layer + 1)

    def end(self) -> None:
        """The tokens have been read back: it is known which requests have ended."""
        _set_ended(self.known, True)


class _Known:
    """Implements `KnownForward`. Its fields cannot be set; what is known is copied when it is first looked at."""

    __slots__ = (
        "_counts",
        "_demands",
        "_ended",
        "_forward",
        "_issue_order",
        "_num_known",
        "emits_token",
        "index",
        "kv_lens",
        "num_tokens",
        "phase",
        "recorded",
        "requests",
        "requests_started",
        "rows",
    )

    index: int
    phase: str
    rows: Sequence[int]
    requests: tuple[int, ...]
    kv_lens: tuple[int, ...]
    requests_started: tuple[int, ...]
    emits_token: bool
    recorded: Recorded | None
    num_tokens: int
    _forward: Forward
    _ended: bool
    _num_known: int
    _demands: tuple[tuple[int, ...], ...]
    _issue_order: tuple[tuple[int, ...], ...]
    _counts: tuple[Mapping[int, int], ...]

    def __init__(self, forward: Forward, copies: bool) -> None:
        for name in ("index", "phase", "requests", "kv_lens", "requests_started", "emits_token"):
            object.__setattr__(self, name, getattr(forward, name))
        rows = forward.rows if isinstance(forward.rows, range) else tuple(forward.rows)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "num_tokens", len(rows))
        object.__setattr__(self, "_forward", forward)
        object.__setattr__(self, "_num_known", 0)
        object.__setattr__(self, "_ended", False)
        for name in ("_demands", "_issue_order", "_counts"):
            object.__setattr__(self, name, ())
        recorded = None if forward.recorded is None else _KnownRecorded(forward.recorded, self, copies)
        object.__setattr__(self, "recorded", recorded)

    @property
    def requests_ended(self) -> tuple[int, ...]:
        return self._forward.requests_ended if self._ended else ()

    @property
    def demands(self) -> tuple[tuple[int, ...], ...]:
        shown, num = self._demands, self._num_known
        if len(shown) < num:
            shown = (*shown, *map(tuple, self._forward.demands[len(shown) : num]))
            _set_demands(self, shown)
        return shown

    @property
    def issue_order(self) -> tuple[tuple[int, ...], ...]:
        shown, num = self._issue_order, self._num_known
        if len(shown) < num:
            shown = (*shown, *map(tuple, self._forward.issue_order[len(shown) : num]))
            _set_order(self, shown)
        return shown

    @property
    def counts(self) -> tuple[Mapping[int, int], ...] | None:
        if self._forward.counts is None:
            return None
        shown, num = self._counts, self._num_known
        if len(shown) < num:
            shown = (*shown, *map(MappingProxyType, self._forward.counts[len(shown) : num]))
            _set_counts(self, shown)
        return shown

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"forward.{name} cannot be set: a forward is given to be read")


# Past `__setattr__`: for this file alone.
_set_num_known = vars(_Known)["_num_known"].__set__
_set_ended = vars(_Known)["_ended"].__set__
_set_demands = vars(_Known)["_demands"].__set__
_set_order = vars(_Known)["_issue_order"].__set__
_set_counts = vars(_Known)["_counts"].__set__


class _KnownRecorded:
    """Implements `Recorded`: of the forward's own rows, and of layers whose routing is known. ValueError else."""

    __slots__ = ("_copies", "_forward", "_recorded", "_rows")

    def __init__(self, recorded: Recorded, forward: _Known, copies: bool) -> None:
        self._recorded, self._forward, self._copies = recorded, forward, copies
        self._rows = frozenset(forward.rows)

    def _check_rows(self, rows: Sequence[int]) -> None:
        if rows is not self._forward.rows and not self._rows.issuperset(rows):
            raise ValueError(
                f"forward {self._forward.index} was asked for recorded values of rows {list(rows)[:8]}, which are not "
                "all its own"
            )

    def lookahead(self, rows: Sequence[int], layer: int) -> npt.NDArray[np.float32] | None:
        self._check_rows(rows)
        if not 0 <= layer < self._forward._num_known:
            raise ValueError(
                f"forward {self._forward.index} was asked for the pre-gate recorded at layer {layer}, whose routing is "
                "not known yet"
            )
        found = self._recorded.lookahead(rows, layer)
        # What is read is a part of all layers' values, to which an array leads.
        return found.copy() if self._copies and found is not None else found

    def embedding(self, rows: Sequence[int]) -> npt.NDArray[np.float32] | None:
        self._check_rows(rows)
        found = self._recorded.embedding(rows)
        return found.copy() if self._copies and found is not None else found

    def token_ids(self, rows: Sequence[int]) -> npt.NDArray[Any] | None:
        self._check_rows(rows)
        found = self._recorded.token_ids(rows)
        return found.copy() if self._copies and found is not None else found
