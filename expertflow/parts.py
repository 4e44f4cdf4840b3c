"""The six questions a policy answers, one small class each. The whole contract is told in docs/contract.md.

A part hears what happens (the hooks of `Part`), answers one question, and acts on nothing: the runtime acts.
It has no clock, no I/O, no module state; randomness comes from the generator it is given. It reads its view and the
forward and writes to neither; what one part knows reaches another only as a value that it returns and the policy hands
on. A hook that a part does not override costs nothing. A public method outside the contract is refused when the class
is made, so that a misspelt hook cannot be silently ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol

from expertflow.forward import Forward, KnownForward
from expertflow.keys import Rule, check_fields, near_to, nearest, plain
from expertflow.machine import Costs
from expertflow.view import Feedback, View

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from expertflow.future import Future

    Ints = npt.NDArray[np.int64]

DEMAND = 0
PREFETCH = 1


class Prediction(NamedTuple):
    """What a predictor says of one layer.

    keys: experts, best first, ties by key. scores: theirs, in 2^-16. chances [num_experts]: of every expert of the
    layer, by expert, in 2^-16, where the predictor knows more than `scores` says; else None. The array is overwritten
    by the next prediction.
    """

    keys: Sequence[int]
    scores: Sequence[int]
    chances: Ints | None = None


Step = tuple[list[int], int, int, bool]
"""A decision made at once (`Predictor.step`): wants, as of `Policy.decide`; how many keys were selected, in how many
layers; and what `Horizon.overfetched` would be told. A bare tuple: one is made between any two layers."""


class Worths(NamedTuple):
    """What a prediction changes in an eviction that keeps arrays [num_layers * num_experts], by key.

    For each expert of a predicted layer: chance becomes its chance in 2^-16, worth = max(soon, chance),
    held = worth | bar.
    """

    soon: Ints
    chance: Ints
    worth: Ints
    bar: Ints
    held: Ints


class Placing(NamedTuple):
    """A layer that was classified, for `Place`: keys that are resident, in flight and missing, in touch order (missing:
    in the order of issue). tokens: those routed to each of `missing`; costs: what these would cost, in the same order.
    Fields may be added at the end."""

    layer: int
    resident: Sequence[int]
    in_flight: Sequence[int]
    missing: Sequence[int]
    tokens: Sequence[int]
    costs: Costs


class KeptRows(Protocol):
    """An array that is kept, read a few rows at a time."""

    def read(self, first: int, into: npt.NDArray[Any]) -> int:
        """Read rows from `first` on, as many as `into` holds or there are; how many those were. `into` is C-contiguous
        and of the array's type."""


class Kept(Protocol):
    """Arrays that take long to make, kept from run to run under names that say all that they depend on."""

    def find(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> KeptRows | None:
        """The array; None where there is none of that shape and type."""

    def keep(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike, parts: Iterable[npt.NDArray[Any]]) -> bool:
        """Keep an array of which `parts` are the consecutive rows, each done with before the next is asked for. False:
        it is not kept, for want of room or of parts."""


class Announced(Protocol):
    """Takes forwards before they run; see `Predictor.announced`.

    code: the modules that compute what it keeps; empty: it keeps nothing, and `prepare_all` need not be asked.
    """

    code: tuple[str, ...]

    def prepare(self, forwards: Sequence[Forward]) -> None:
        """The next forwards, in order, with all their routing."""

    def prepare_all(self, forwards: Iterable[Forward], num_forwards: int, kept: Kept, name: str) -> bool:
        """All forwards of the run, which are so many if each is of one token; `name` tells them and `code` from others.
        True: it has, or finds in `kept`, what it says of all of them, and takes no `prepare`."""


@dataclass(frozen=True)
class Effort:
    """Host time of a decision, in multiples of one that looks rows up in a table (`hardware.decide_ns`): `once`, and
    `per_layer` for each layer that is predicted anew. What a policy's own code takes is measured by
    `python -m replay.bench_decide`; nothing but the simulated clock depends on it.
    """

    once: Annotated[float, Rule(0, 1000, about="of a decision, in table look-ups")] = 1.0
    per_layer: Annotated[float, Rule(0, 1000, about="of each layer that is predicted anew")] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "effort")

    def of(self, num_predicted: float) -> float:
        """Of a decision that predicts so many layers."""
        return self.once + self.per_layer * num_predicted


_putting_off: list[bool] = []
"""Not empty while a module of parts is imported of which one is wanted."""


@contextmanager
def faults_put_off() -> Iterator[None]:
    """Within this block a class with a misspelt hook is made all the same, and bears its fault: the other classes of
    its module have none. Who uses it must ask (`fault_of`)."""
    _putting_off.append(True)
    try:
        yield
    finally:
        _putting_off.pop()


def fault_of(kind: type) -> str:
    """What is wrong with a class that was made with a fault, or that derives from one; empty: nothing."""
    return kind._fault if issubclass(kind, Part) else ""


class Part:
    """Hooks every part may override, in the order in which they are heard."""

    uses_future: ClassVar[bool] = False
    """True: it reads ahead in the trace, and the result is a reference."""
    at_once: ClassVar[bool] = False
    """True: this very class also answers by arrays (`Predictor.step`, `Selection.thresholds`, `Eviction.worths`), so
    that a whole decision is taken in one call. Not inherited: a class that derives may answer something else, and is
    asked in the ordinary way unless it says so itself. Heeded of this package's own classes alone: the arrays are
    another part's, read and written in place, and what another class does to them cannot be checked."""

    _fault: ClassVar[str] = ""
    """What is wrong with the class, where it was not refused when it was made (see `faults_put_off`)."""

    def __init_subclass__(cls) -> None:
        if "at_once" not in vars(cls):
            cls.at_once = False
        known = {name for base in cls.__mro__[1:] for name in vars(base)}
        for name, value in vars(cls).items():
            if not name.startswith("_") and callable(value) and name not in known and not cls._is_contract():
                hooks = sorted(one for one in known if not one.startswith("_"))
                near = near_to(name, hooks)
                listed = "" if near else f"; known: {nearest(name, hooks, 100)}"
                cls._fault = (
                    f"{plain(cls.__name__, 60)}.{plain(name, 60)} is not in the contract of {cls.__mro__[1].__name__}"
                    f"{near}; name helpers with a leading underscore{listed}"
                )
                if not _putting_off:
                    raise TypeError(cls._fault)
                break

    @classmethod
    def _is_contract(cls) -> bool:
        return cls.__module__ == __name__

    def start(self, view: View, future: Future | None) -> None:
        """Once, before the first forward. `future` is given only if `uses_future`."""

    def begin_forward(self, forward: KnownForward) -> None:
        """Before anything of `forward` runs: requests, phase, tokens are known, routing is not."""

    def routed(self, forward: KnownForward, layer: int) -> None:
        """The routing of (forward, layer) has become known."""

    def feedback(self, feedback: Feedback) -> None:
        """About the layer before, if it stalled; heard when the next routing has been read."""

    def evicted(self, key: int, unused: bool) -> None:
        """`key` lost its slot; `unused` = it was prefetched and never demanded."""

    def landed(self, key: int) -> None:
        """The last chunk of `key` was seen to have ended."""

    def layer_end(self, layer: int, keys: Sequence[int]) -> None:
        """All kernels of the layer are launched; `keys` are its demand."""

    def end_forward(self, forward: KnownForward) -> None:
        """The tokens of `forward` have been read back."""


class Predictor(Part):
    """How likely is each expert of the layer `distance` layers ahead?"""

    predicts: ClassVar[bool] = True
    """False: it never does, and the policy neither decides nor prefetches."""
    needs_pregate: ClassVar[bool] = False
    """True: it says nothing of a trace that holds no recorded pre-gate."""
    fitted_kind: ClassVar[str] = ""
    """Which kind of fitted file its argument `fitted` takes; empty: it has none."""
    refreshes: bool = False
    """True: nearer predictions replace those made farther away for the same layer."""
    effort: Effort = Effort()
    """Of a policy's decision with this predictor, unless the policy says otherwise."""
    effort_at_once: Effort | None = None
    """The same where a decision is taken at once (see `step`); None: no less."""

    def predict(self, forward: KnownForward, layer: int, distance: int) -> Prediction | None:
        """Scores for layer `layer + distance`, past the last layer the next forward's first; None = no idea."""
        raise NotImplementedError

    def forecast(self) -> Ints | None:
        """Chances [num_layers * num_experts] in 2^-16 of each expert's use in the next forwards, nearer ones weighing
        more; None where it knows nothing of the kind. Asked when all parts have started and after each forward, if the
        eviction hears `foreseen`."""
        return None

    def announced(self) -> Announced | None:
        """What takes forwards before they run, to score them in blocks; None, as for all but ours: nothing does.

        It is shown routing that is not known yet, so it is no part of the contract that others may rely on: what the
        predictor answers must be the same, bit for bit, as without, and a test holds each of ours against that.
        """
        return None

    # A decision at once, in place of predict, select and predicted for each distance: where predictor, selection and
    # eviction are all `at_once`, and all classes of this package.

    def fuse(self, thresholds: Ints, worths: Worths) -> bool:
        """Whether `step` can decide by `Selection.thresholds` and `Eviction.worths`; once, when all parts started."""
        return False

    def step(self, forward: KnownForward, layer: int, reach: int) -> Step | None:
        """The decision for distances 1 … reach, to the same integers as by asking the parts; None = ask them."""
        return None


class Horizon(Part):
    """Which distances are predicted, how far ahead?"""

    num_expected: float = 0.0
    """N_e of the last forward, set by the policy before each forward; 0 = not known yet."""

    def distances(self) -> Sequence[int]:
        """Distances in layers, ascending, each in 1 … num_layers - 1; none: at this layer nothing is decided, and the
        host spends no time on it. Asked once a layer."""
        raise NotImplementedError

    def overfetched(self) -> None:
        """A layer's predicted experts were all resident two or more layers early."""


class Selection(Part):
    """Which of the predicted experts are wanted, best first?"""

    def select(self, prediction: Prediction, forward: KnownForward) -> Sequence[int]:
        """A prefix (or a subset, best first) of the scored keys."""
        raise NotImplementedError

    def thresholds(self) -> Ints | None:
        """Least score that is wanted, by distance [num_layers + 1], always up to date, where `select` does nothing but
        compare with it; None = ask `select`. For a selection `at_once`."""
        return None


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

    def foreseen(self, forecast: Ints) -> None:
        """What the predictor expects of the next forwards (`Predictor.forecast`), as long as it says anything; heard
        when all parts have started, and after each forward. The array is the hearer's to keep."""

    def predicted(self, keys: Sequence[int], layer: int, prediction: Prediction) -> None:
        """`keys` of `layer` were selected for the window (resident ones included), of what was predicted."""

    def worths(self) -> Worths | None:
        """The arrays that `predicted` changes, if it does nothing but what `Worths` says; None = tell `predicted`. For
        an eviction `at_once`."""
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


class Place(Part):
    """Where is each demanded expert computed? By default all on the GPU."""

    def on_host(self, placing: Placing, forward: KnownForward) -> Sequence[int]:
        """Those of `placing.missing` that the host computes where they lie, in the order in which it does; the others
        are copied and run on the GPU, as what is resident or in flight does in any case. Asked once a layer, after it
        was classified, unless the class leaves this method alone. What is placed on the host is neither touched nor
        admitted."""
        return ()

    def for_later(self, keys: Sequence[int], queued: Sequence[int]) -> Sequence[int]:
        """Those of `keys`, just placed on the host, that are copied as well, behind the demand, for later use, best
        first. queued: those of them whose prefetch waits in the queue; unless it is answered it is dropped."""
        return ()

    def stays_on_host(self) -> Iterable[int]:
        """Keys that are never copied: neither wanted nor there at the start. Asked once, when all parts have started;
        `on_host` must place them on the host whenever they are demanded."""
        return ()
