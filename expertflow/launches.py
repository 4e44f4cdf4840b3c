"""Every expert that a layer demands is launched in it once, and no other: kept book of layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from expertflow.forward import Forward


@dataclass(frozen=True)
class Mislaunched:
    """A layer whose launches are not its demand: keys that were left out, and keys that were launched too often."""

    forward: int
    layer: int
    left_out: tuple[int, ...]
    too_often: tuple[int, ...]

    @property
    def keys(self) -> tuple[int, ...]:
        """All of them."""
        return self.left_out + self.too_often


class Launches:
    """Compares the launches of each layer with what its forward demands. Belongs to a machine: it hears what that is
    asked for, whoever asks."""

    def __init__(self) -> None:
        self._forward: Forward | None = None
        self._launched: list[int] = []

    def begin_forward(self, forward: Forward) -> None:
        """The launches that follow are of `forward`."""
        self._forward, self._launched = forward, []

    def launched(self, keys: Sequence[int]) -> None:
        """Experts of the layer that runs."""
        self._launched += keys

    def end_layer(self, layer: int) -> Mislaunched | None:
        """All launches of `layer` have been heard; None: they are its demand."""
        forward, launched = self._forward, self._launched
        self._launched = []
        if forward is None:
            return None
        demanded = forward.demands[layer]
        if len(launched) == len(demanded) and set(launched) == set(demanded):
            return None
        wanted, found = Counter(demanded), Counter(launched)
        left_out, too_often = tuple((wanted - found).elements()), tuple((found - wanted).elements())
        return Mislaunched(forward.index, layer, left_out, too_often)
