"""The five questions a policy answers, one small class each.

A part hears what happens (the hooks of `Part`), answers one question, and acts on nothing: the runtime acts.
It has no clock, no I/O, no module state; randomness comes from the generator it is given. A hook that a part
does not override costs nothing. A public method outside the contract is refused when the class is made, so
that a misspelt hook cannot be silently ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from expertflow.forward import Forward
from expertflow.view import Feedback, View

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from expertflow.future import Future

    Ints = npt.NDArray[np.int64]

DEMAND = 0
PREFETCH = 1
SCORE_ONE = 1 << 16
"""Scores are integers in units of 2^-16, so that a log made elsewhere sorts the same."""

Scores = tuple[Sequence[int], Sequence[int]]
"""(expert keys best first, their scores in 2^-16; ties by key)."""


Step = tuple[list[int], int, int, bool]
"""A decision made at once: the wants; how many keys were selected, in how many layers; `Horizon.overfetched`."""


class Worths(NamedTuple):
    """What a prediction changes in an eviction that keeps arrays [num_layers * num_experts], by key.

    For each expert of a predicted layer: worth = max(soon, chance), held = worth | bar. chance: as `view.chances`.
    """

    soon: Ints
    chance: Ints
    worth: Ints
    bar: Ints
    held: Ints


@dataclass(frozen=True)
class Effort:
    """Host time of a decision, in multiples of one that looks rows up in a table (`hardware.decide_ns`): `once`, and
    `per_layer` for each layer that is predicted anew. What a policy's own code takes is measured by
    `python -m replay.bench_decide`; nothing but the simulated clock depends on it.
    """

    once: float = 1.0
    per_layer: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("once", self.once), ("per_layer", self.per_layer)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1000:
                raise ValueError(f"effort.{name}={value!r} must be a number in 0 … 1000")

    def of(self, num_predicted: float) -> float:
        """Of a decision that predicts so many layers."""
        return self.once + self.per_layer * num_predicted


class Part:
    """Hooks every part may override, in the order in which they are heard."""

    uses_future: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        known = {name for base in cls.__mro__[1:] for name in vars(base)}
        for name, value in vars(cls).items():
            if not name.startswith("_") and callable(value) and name not in known and not cls._is_contract():
                raise TypeError(
                    f"{cls.__name__}.{name} is not in the contract of {cls.__mro__[1].__name__}; "
                    f"known: {', '.join(sorted(n for n in known if not n.startswith('_')))}; "
                    "name helpers with a leading underscore"
                )

    @classmethod
    def _is_contract(cls) -> bool:
        return cls.__module__ == __name__

    def start(self, view: View, future: Future | None) -> None:
        """Once, before the first forward. `future` is given only if `uses_future`."""

    def prepare(self, forwards: Sequence[Forward]) -> None:
        """Optional: the next forwards, so that answers independent of timing may be computed in a block.

        What a part answers must be the same, bit for bit, as without this call.
        """

    def begin_forward(self, forward: Forward) -> None:
        """Before anything of `forward` runs: requests, phase, tokens are known, routing is not."""

    def routed(self, forward: Forward, layer: int) -> None:
        """The routing of (forward, layer) has become known."""

    def feedback(self, feedback: Feedback) -> None:
        """About the layer before, if it stalled; heard when the next routing has been read."""

    def evicted(self, key: int, unused: bool) -> None:
        """`key` lost its slot; `unused` = it was prefetched and never demanded."""

    def landed(self, key: int) -> None:
        """The last chunk of `key` was seen to have ended."""

    def layer_end(self, layer: int, keys: Sequence[int]) -> None:
        """All kernels of the layer are launched; `keys` are its demand."""

    def end_forward(self, forward: Forward) -> None:
        """The tokens of `forward` have been read back."""


class Predictor(Part):
    """How likely is each expert of the layer `distance` layers ahead?"""

    refreshes: bool = False
    """True: nearer predictions replace those made farther away for the same layer."""
    effort: Effort = Effort()
    """Of a policy's decision with this predictor, unless the policy says otherwise."""
    effort_at_once: Effort | None = None
    """The same where the parts say that the predictor decides at once (see `step`); None: no less."""

    def predict(self, forward: Forward, layer: int, distance: int) -> Scores | None:
        """Scores for layer `layer + distance`, past the last layer the next forward's first; None = no idea."""
        raise NotImplementedError

    # A decision at once, in place of predict, select and predicted for each distance. It is taken only where the three
    # parts say so in their very class: one that inherits may do something else, and is asked in the ordinary way.

    def fuse(self, thresholds: Ints, worths: Worths) -> bool:
        """Whether `step` can decide by `Selection.thresholds` and `Eviction.worths`; once, when all parts started."""
        return False

    def step(self, forward: Forward, layer: int, reach: int) -> Step | None:
        """The decision for distances 1 … reach, to the same integers as by asking the parts; None = ask them."""
        return None


class Horizon(Part):
    """Which distances are predicted, how far ahead?"""

    num_expected: float = 0.0
    """N_e of the last forward, set by the policy before each forward; 0 = not known yet."""

    def distances(self) -> Sequence[int]:
        """Distances in layers, ascending, each in 1 … num_layers - 1; none: at this layer nothing is decided, and the
        host spends no time on it."""
        raise NotImplementedError

    def overfetched(self) -> None:
        """A layer's predicted experts were all resident two or more layers early."""


class Selection(Part):
    """Which of the predicted experts are wanted, best first?"""

    def select(self, scores: Scores, forward: Forward) -> Sequence[int]:
        """A prefix (or a subset, best first) of the scored keys."""
        raise NotImplementedError

    def mean_selected(self) -> float:
        """Mean number of experts selected per predicted layer in the last forward (N_e); 0 = not known."""
        raise NotImplementedError

    def thresholds(self) -> Ints | None:
        """Least score that is wanted, by distance [num_layers + 1], always up to date, where `select` does nothing but
        compare with it; None = ask `select`. See `Predictor.step`."""
        return None

    def selected(self, num_keys: int, num_layers: int) -> None:
        """`Predictor.step` has selected so many keys in so many layers by `thresholds`."""


class Eviction(Part):
    """Who leaves? Also where the scope of the cache is decided: one pool, or one per layer."""

    scope: str = "global"

    def touched(self, keys: Sequence[int]) -> None:
        """A layer demands `keys`, in touch order; heard before anything is loaded for it."""
        raise NotImplementedError

    def admitted(self, key: int, cause: int) -> None:
        """`key` has taken a slot: its first chunk is issued."""
        raise NotImplementedError

    def victim(self, key: int, cause: int) -> int | None:
        """A resident key outside `view.pinned` that gives way to `key`, or None.

        None for a prefetch refuses it. None for a demand means that no candidate exists: a demand may not
        be refused. Under scope `layer` the victim must be of the layer of `key`.
        """
        raise NotImplementedError

    def predicted(self, keys: Sequence[int], layer: int, scores: Scores) -> None:
        """`keys` of `layer` were selected for the window (resident ones included); `scores` is what was predicted."""

    def worths(self) -> Worths | None:
        """The arrays that `predicted` changes, if it does nothing but what `Worths` says; None = tell `predicted`. See
        `Predictor.step`."""
        return None

    def release(self, layer: int, keys: Sequence[int]) -> Iterable[int]:
        """Resident keys to give up, now that the layer has run; empty for a cache that keeps what fits."""
        return ()


class Order(Part):
    """What runs first within a layer?"""

    strict: bool = False
    """True: an expert that is not there holds up those behind it."""

    def arrange(self, keys: Sequence[int]) -> Sequence[int]:
        """Execution order of a layer's demanded experts (`keys` in touch order, which is the default)."""
        return keys
