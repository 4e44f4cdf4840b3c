"""A limited number of copies a layer, the rest on the host (GitHub ggml-org/llama.cpp#27861)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from expertflow.forward import KnownForward
from expertflow.keys import Rule
from expertflow.parts import Place, Placing


class Capped(Place):
    """Of a layer's misses at most `uploads` are copied, the first in the order of issue.

    behind: the host computes these as well, this time, and their copies go on behind for the next time, as in
    llama.cpp#27861 (`--moe-expert-cache-inserts`); else the GPU waits for them.
    """

    def __init__(
        self,
        uploads: Annotated[int, Rule(0, 65_535, unit="experts", about="copied at most, of a layer's misses")] = 2,
        behind: Annotated[bool, Rule(about="they are computed on the host this time, and copied for the next")] = True,
    ) -> None:
        self.uploads, self.behind = uploads, behind

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        return placing.missing if self.behind else placing.missing[self.uploads :]

    def for_later(self, keys: Sequence[int], queued: Sequence[int]) -> Sequence[int]:
        return keys[: self.uploads] if self.behind else ()
