"""One forward pass as the runtime sees it: which experts each layer demands, and how many tokens.

Knows nothing of files: `traces.batching` builds these from a recorded trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DECODE = "decode"
PREFILL = "prefill"


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

    @property
    def num_tokens(self) -> int:
        """Token rows in this forward."""
        return len(self.rows)
