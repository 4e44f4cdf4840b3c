"""Hostile parts: each breaks one rule of docs/contract.md, or wishes for more than it may have.

Named by `_target_` as a user would name them: `tests.attack.parts.DropsLast`. What stands beside one is honest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertflow.evictions.lru import LRU
from expertflow.evictions.outlook import Outlook
from expertflow.orders.index import IndexOrder
from expertflow.parts import Eviction, Horizon, Order, Part, Place, Placing, Predictor, Selection
from expertflow.places.gpu import Gpu
from expertflow.predictors.transition import TransitionPredictor
from expertflow.selections.stall_saved import StallSaved
from tests.attack.hostile_hooks import (
    AtOnce,
    Chances,
    Forecasts,
    Oracle,
    OwnHorizon,
    OwnLRU,
    OwnOrder,
    OwnPredictor,
    OwnSelection,
    Sees,
    Sure,
    Untold,
    answers,
    append,
    counts,
    frees_pinned,
    late,
    looks,
    of_lru,
    other_layer,
    predicts,
    raises,
    recurses,
    sees,
    stale,
    state,
    takes_announced,
    takes_worths,
)

REFUSED, MARKED, BLIND = "refused", "marked as a reference", "sees nothing"
"""How a kind ends: with a message; with a result that says it knows the future; or with nothing gained."""


# -- the kinds -------------------------------------------------------------------------------------------------------

Maker = Callable[[], Part]


@dataclass(frozen=True)
class Kind:
    """One kind of hostile part. told: what it does. beside: honest parts that it needs, by place.

    serial: copies and kernels never overlap. ends: how its runs end.
    """

    name: str
    base: type[Any]
    told: str
    members: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Maker] = field(default_factory=dict)
    serial: bool = False
    ends: str = REFUSED

    @property
    def place(self) -> str:
        """Of the part in a policy."""
        kinds = (Predictor, Horizon, Selection, Eviction, Order, Place)
        return next((one.__name__.lower() for one in kinds if issubclass(self.base, one)), "order")

    def made(self) -> type[Any]:
        """Its class."""
        return CLASSES[self.name]


BESIDE_STEP: dict[str, Maker] = {"selection": StallSaved, "eviction": Outlook}


def arranging(name: str, told: str, arrange: Callable[..., Any], **others: Any) -> Kind:
    """A kind of order."""
    return Kind(name, OwnOrder, told, {"arrange": arrange}, **others)


def evicting(name: str, told: str, victim: Callable[..., Any], **members: Any) -> Kind:
    """A kind of eviction."""
    return Kind(name, OwnLRU, told, {"victim": victim, **members})


def releasing(name: str, told: str, release: Callable[..., Any]) -> Kind:
    """A kind of eviction that gives up what it may not."""
    return Kind(name, OwnLRU, told, {"release": release})


def predicting(name: str, told: str, predict: Callable[..., Any], **members: Any) -> Kind:
    """A kind of predictor."""
    return Kind(name, OwnPredictor, told, {"predict": predict, **members})


def hearing(name: str, told: str, hook: str, heard: Callable[..., Any], base: type[Any] = OwnLRU, **more: Any) -> Kind:
    """A kind that goes wrong in a hook without an answer."""
    return Kind(name, base, told, {hook: heard}, **more)


def distances(name: str, told: str, value: Any) -> Kind:
    """A kind of horizon."""
    return Kind(name, OwnHorizon, told, {"distances": answers(value)})


def selecting(name: str, told: str, select: Callable[..., Any], **others: Any) -> Kind:
    """A kind of selection."""
    return Kind(name, OwnSelection, told, {"select": select}, **others)


def placing(name: str, told: str, on_host: Callable[..., Any], **members: Any) -> Kind:
    """A kind of place."""
    return Kind(name, Gpu, told, {"on_host": on_host, **members})


def all_missing(self: Any, told: Placing, forward: Any) -> Sequence[int]:
    """All that is missing on the host: an honest answer."""
    return told.missing


def declaring(name: str, base: type[Any], told: str, **members: Any) -> Kind:
    """A kind that declares what it may not."""
    return Kind(name, base, told, members)


ORDERS = [
    arranging("DropsLast", "leaves out the last expert", lambda self, keys: keys[:-1]),
    arranging("DropsAll", "answers no expert", answers([])),
    arranging("Doubles", "runs every expert twice", lambda self, keys: [*keys, *keys]),
    arranging(
        "DropsAndDoubles",
        "as many keys as given, one twice",
        lambda self, keys: [*keys[1:], *keys[-1:]][: len(keys)] if len(keys) > 1 else [*keys, *keys],
    ),
    arranging("AddsOne", "adds an expert that nobody demands", lambda self, keys: [*keys, 31]),
    arranging("OtherKeys", "other experts of the layer", lambda self, keys: [key ^ 1 for key in keys] if keys else [1]),
    arranging("ArrangesNone", "answers None", answers(None)),
    arranging("ArrangesLazily", "a generator", lambda self, keys: (key for key in keys)),
    arranging("ArrangesSet", "a set, which has no order", lambda self, keys: set(keys)),
    arranging("ArrangesFloats", "keys as floats", lambda self, keys: [float(key) for key in keys] or [0.0]),
    arranging("ArrangesText", "a text", answers("0123")),
    arranging("SortsInPlace", "sorts what it is given", lambda self, keys: keys.sort()),
    arranging("ClearsKeys", "empties what it is given", lambda self, keys: keys.clear()),
    Kind(
        "DropsStrictly",
        IndexOrder,
        "leaves out an expert where the order is strict",
        {"arrange": lambda self, keys: sorted(keys)[:-1], "strict": True},
    ),
    arranging(
        "DropsInTurn", "leaves out an expert where copies go one by one", lambda self, keys: keys[:-1], serial=True
    ),
    arranging(
        "ArrangesHuge", "numbers of thousands of digits", lambda self, keys: [10**5000] * len(keys) or [10**5000]
    ),
    arranging("RaisesAnExit", "raises what cannot be told", raises(Untold())),
    arranging("ArrangeRaises", "raises ValueError", raises(ValueError("no order"))),
]
EVICTIONS = [
    evicting("EvictsPinned", "a key that the layer demands", state(2, pinned=True)),
    evicting("EvictsLoading", "a key that is being copied", state(1)),
    evicting("EvictsAbsent", "a key that has no slot", state(0)),
    evicting("EvictsItself", "the key that asks for room", lambda self, key, cause: key),
    evicting("EvictsBeyond", "a number past all keys", answers(10**7)),
    evicting("EvictsNegative", "a key counted from the end", of_lru(lambda key: key - 32)),
    evicting("EvictsFloat", "a float", of_lru(float)),
    evicting("EvictsFlag", "True", answers(True)),
    evicting("EvictsNumpyFlag", "a truth value of numpy", answers(np.bool_(True))),
    evicting("EvictsText", "a text", of_lru(str)),
    evicting("EvictsList", "a list of one key", of_lru(lambda key: [key])),
    evicting("NeverEvicts", "None to a demand, though there are candidates", answers(None)),
    evicting("EvictsStale", "a key that it gave up before", stale),
    Kind(
        "EvictsOtherLayer",
        OwnLRU,
        "a key of another layer under scope=layer",
        {"victim": other_layer, "scope": "layer", "__init__": lambda self: LRU.__init__(self, "layer")},
    ),
    evicting("VictimDivides", "raises ZeroDivisionError", raises(ZeroDivisionError("division by zero"))),
    evicting("VictimStops", "raises StopIteration", raises(StopIteration())),
    evicting("VictimRecurses", "recurses without end", recurses),
    evicting("VictimExhausts", "raises MemoryError", raises(MemoryError())),
    evicting("VictimExits", "ends the process", raises(SystemExit(0))),
    evicting("VictimLies", "raises what is no Exception", raises(GeneratorExit("closed"))),
    releasing(
        "ReleasesAbsent",
        "gives up what has no slot",
        lambda self, layer, keys: [key for key in range(32) if self.view.residency[key] == 0],
    ),
    releasing("ReleasesTwice", "gives up a key twice", lambda self, layer, keys: [keys[0], keys[0]]),
    releasing("ReleasesBeyond", "gives up a number past all keys", answers([10**6])),
    releasing("ReleasesFloats", "gives up floats", lambda self, layer, keys: [float(keys[0])]),
    releasing("ReleasesNone", "answers None", answers(None)),
    releasing("ReleasesForever", "a generator without end", lambda self, layer, keys: itertools.count()),
    releasing("ReleaseRaises", "a generator that raises", lambda self, layer, keys: (1 // 0 for _ in keys)),
]
HOOKS = [
    hearing("StartRaises", "raises KeyError at the start", "start", raises(KeyError("view"))),
    hearing("BeginRaises", "raises when a forward begins", "begin_forward", raises(IndexError("row"))),
    hearing("RoutedRaises", "raises when the routing is known", "routed", raises(AttributeError("tables"))),
    hearing("AdmittedRaises", "raises when a key takes a slot", "admitted", raises(ZeroDivisionError("x"))),
    hearing("EvictedRaises", "raises when a key loses its slot", "evicted", raises(KeyError(7))),
    hearing("LandedRaises", "raises when a copy has landed", "landed", raises(RuntimeError("lost"))),
    hearing("EndRaises", "raises when a forward ends", "end_forward", raises(OSError("no file"))),
    hearing("FeedbackRaises", "raises when a layer has stalled", "feedback", raises(TypeError("stall"))),
    hearing(
        "TouchedAnswers",
        "answers where there is no question",
        "touched",
        lambda self, keys: LRU.touched(self, keys) or 1,
    ),
    hearing("AdmittedNever", "a generator, which would never run", "admitted", lambda self, key, cause: (yield)),
    hearing("TouchedAppends", "adds a key to the demand", "touched", lambda self, keys: append(keys)),
    hearing("EndClears", "empties the demand when the layer ends", "layer_end", lambda self, layer, keys: keys.clear()),
    hearing("UnpinsKeys", "empties the pinned keys", "touched", lambda self, keys: self.view.pinned.clear()),
    hearing("WritesFeedback", "writes to the feedback", "feedback", lambda self, told: setattr(told, "stall_ns", 0)),
    hearing(
        "WritesResidency",
        "writes to the residency",
        "touched",
        lambda self, keys: self.view.residency.__setitem__(0, 2),
    ),
    hearing(
        "WritesBehind",
        "writes to the memory behind the residency",
        "touched",
        lambda self, keys: LRU.touched(self, keys) or self.view.residency.obj.__setitem__(31, 2),
    ),
    hearing("WritesView", "sets the clock", "touched", lambda self, keys: setattr(self.view, "now_ns", 0)),
    hearing(
        "WritesPredicted",
        "writes to a prediction",
        "predicted",
        lambda self, keys, layer, told: append(told.keys),
        beside={"predictor": OwnPredictor},
    ),
    hearing(
        "WritesChances",
        "writes to a prediction's chances",
        "predicted",
        lambda self, keys, layer, told: told.chances.__setitem__(0, 1),
        beside={"predictor": Chances},
    ),
    hearing(
        "WritesForecast",
        "writes to a forecast",
        "foreseen",
        lambda self, told: told.__setitem__(0, 1),
        beside={"predictor": Forecasts},
    ),
    hearing("MissesArgument", "takes fewer values than it is told", "touched", lambda self: None),
]
PREDICTORS = [
    predicting("ScoresTwice", "a key twice", predicts(lambda first: [first, first], lambda first: [1, 1])),
    predicting(
        "ScoresThousands",
        "more keys than a layer has",
        predicts(lambda first: [first + n % 8 for n in range(20000)], lambda first: [1] * 20000),
    ),
    predicting("ScoresBeyond", "a number past all keys", predicts(lambda first: [10**6])),
    predicting("ScoresNegative", "a negative key", predicts(lambda first: [-1])),
    predicting("ScoresOtherLayer", "a key of the layer behind", predicts(lambda first: [(first + 8) % 32])),
    predicting("ScoresFloats", "keys as floats", predicts(lambda first: [float(first)])),
    predicting("ScoresText", "keys as text", predicts(lambda first: ["a"])),
    predicting("ScoresFlags", "keys as truth values", predicts(lambda first: [True])),
    predicting("ScoresLazily", "keys as a generator", predicts(lambda first: (key for key in [first]))),
    predicting("ScoresHuge", "a number of thousands of digits", predicts(lambda first: [10**5000])),
    predicting("FewerScores", "fewer scores than keys", predicts(lambda first: [first, first + 1])),
    predicting("ScoreIsNan", "a score that is no number", predicts(scores=lambda first: [float("nan")])),
    predicting("ScoreIsFloat", "a share as a score", predicts(scores=lambda first: [0.5])),
    predicting("ScoresRise", "worst first", predicts(lambda first: [first, first + 1], lambda first: [1, 2])),
    predicting("ScoreTooHigh", "more than certainty", predicts(scores=lambda first: [65537])),
    predicting("ScoreBelowZero", "less than nothing", predicts(scores=lambda first: [-1])),
    predicting("PredictsText", "a text", answers("all of them")),
    predicting("PredictsFour", "four values", answers(([0], [1], None, None))),
    predicting(
        "ChancesOfOther",
        "chances of another shape",
        predicts(lambda first: [first], lambda first: [1], np.zeros(5, np.int64)),
    ),
    predicting("ChancesFloat", "chances as shares", predicts(lambda first: [first], lambda first: [1], np.zeros(8))),
    predicting(
        "ChancesTooHigh",
        "chances above certainty",
        predicts(lambda first: [first], lambda first: [1], np.full(8, 1 << 20)),
    ),
    predicting("PredictRaises", "raises KeyError", raises(KeyError("boom"))),
    Kind(
        "ForecastsOther",
        Forecasts,
        "a forecast of another shape",
        {"forecast": answers(np.zeros(3, np.int64))},
        {"eviction": Outlook},
    ),
    Kind(
        "ForecastsFloats", Forecasts, "a forecast in shares", {"forecast": answers(np.zeros(32))}, {"eviction": Outlook}
    ),
    Kind(
        "ForecastsNegative",
        Forecasts,
        "a forecast below zero",
        {"forecast": answers(np.full(32, -1))},
        {"eviction": Outlook},
    ),
    Kind("ForecastsText", Forecasts, "a text for a forecast", {"forecast": answers("soon")}, {"eviction": Outlook}),
]
AT_ONCE_KINDS = [
    Kind(
        "TakesWorths",
        AtOnce,
        "takes the eviction's arrays",
        {"at_once": True, "fuse": counts(True)},
        BESIDE_STEP,
        ends=BLIND,
    ),
    Kind(
        "DecidesAtOnce",
        AtOnce,
        "decides in place of all",
        {"at_once": True, "step": counts(([], 0, 0, False))},
        BESIDE_STEP,
        ends=BLIND,
    ),
    Kind(
        "FreesPinned",
        AtOnce,
        "writes to what the eviction keeps of the demanded",
        {"at_once": True, "fuse": takes_worths, "routed": frees_pinned},
        BESIDE_STEP,
        ends=BLIND,
    ),
    Kind(
        "GivesThresholds",
        StallSaved,
        "keeps the thresholds that others read",
        {"at_once": True, "saw": 0, "thresholds": counts(np.zeros(5, np.int64))},
        {"predictor": AtOnce, "eviction": Outlook},
        ends=BLIND,
    ),
    Kind(
        "GivesWorths",
        Outlook,
        "keeps the arrays that others write to",
        {"at_once": True, "saw": 0, "worths": counts(None)},
        {"predictor": AtOnce, "selection": StallSaved},
        ends=BLIND,
    ),
]
HORIZONS = [
    distances("LooksAtItself", "distance 0", (0,)),
    distances("LooksBack", "a negative distance", (-1,)),
    distances("LooksBeyond", "more layers than there are", (1000,)),
    distances("LooksTwice", "a distance twice", (1, 1)),
    distances("LooksBackwards", "falling distances", (3, 2, 1)),
    distances("LooksBetween", "half a layer", (1.5,)),
    distances("LooksByFlag", "a truth value", (True,)),
    distances("LooksNowhere", "None", None),
    distances("LooksByText", "a text", "12"),
    distances("LooksByNumber", "a number", 1),
    Kind("LooksForever", OwnHorizon, "a generator without end", {"distances": lambda self: itertools.count(1)}),
    Kind("DistancesRaise", OwnHorizon, "raises KeyError", {"distances": raises(KeyError("no such layer"))}),
    Kind(
        "HasNoSetter", OwnHorizon, "cannot be told how many are expected", {"num_expected": property(lambda self: 1.0)}
    ),
    Kind(
        "OverfetchedAnswers",
        OwnHorizon,
        "answers where there is no question",
        {"distances": answers((1, 2)), "overfetched": answers(1)},
        {"predictor": Sure},
    ),
]
SELECTIONS = [
    selecting(
        "SelectsOther",
        "a key that was not predicted",
        lambda self, told, forward: [told.keys[0] ^ 7],
        beside={"predictor": OwnPredictor},
    ),
    selecting("SelectsTwice", "a key twice", lambda self, told, forward: [told.keys[0]] * 2),
    selecting("SelectsFloats", "keys as floats", lambda self, told, forward: [float(key) for key in told.keys]),
    selecting("SelectsNone", "None", answers(None)),
    selecting("SelectRaises", "raises TypeError", raises(TypeError("scores"))),
    selecting(
        "SortsPrediction",
        "sorts what was predicted",
        lambda self, told, forward: told.keys.sort(),
        beside={"predictor": TransitionPredictor},
    ),
    selecting(
        "ReadsBehind",
        "reads the chances of other forwards",
        lambda self, told, forward: told.chances.base[1],
        beside={"predictor": Chances},
    ),
]
PLACES = [
    placing("PlacesOther", "a key of another layer", lambda self, told, forward: [(*told.missing, 0)[0] ^ 8]),
    placing("PlacesResident", "what is resident", lambda self, told, forward: [*told.resident, *told.in_flight]),
    placing("PlacesTwice", "a key twice", lambda self, told, forward: [*told.missing, *told.missing]),
    placing("PlacesFloats", "keys as floats", lambda self, told, forward: [float(key) for key in told.missing]),
    placing("HostIsNone", "None", answers(None)),
    placing("HostClears", "empties what is missing", lambda self, told, forward: told.missing.clear()),
    placing("HostIsFree", "makes the host cheaper", lambda self, told, forward: told.costs.host_ns.append(0)),
    placing("HostRaises", "raises ZeroDivisionError", raises(ZeroDivisionError("no host"))),
    placing("LaterOther", "copies what it has not placed", all_missing, for_later=answers([-1])),
    placing("LaterTwice", "copies twice", all_missing, for_later=lambda self, keys, queued: [*keys, *keys]),
    placing("LaterSorts", "sorts what it has placed", all_missing, for_later=lambda self, keys, queued: keys.sort()),
    placing("StaysNoKey", "keeps a key that is none", all_missing, stays_on_host=answers([1000])),
    placing("StaysForever", "keeps keys without end", all_missing, stays_on_host=lambda self: itertools.count()),
    placing("StaysButCopies", "copies what stays", answers(()), stays_on_host=answers(range(32))),
]
PEEKS = [
    predicting(
        "PeeksDemands",
        "reads the demand of a later layer",
        looks(lambda forward, target, view: forward.demands[target]),
    ),
    predicting(
        "PeeksOrder",
        "reads the order of issue of a later layer",
        looks(lambda forward, target, view: forward.issue_order[target]),
    ),
    predicting(
        "PeeksCounts",
        "reads the token counts of a later layer",
        looks(
            lambda forward, target, view: (
                forward.counts[target] if forward.counts is not None else forward.demands[target]
            )
        ),
    ),
    predicting(
        "EditsDemands",
        "takes away the demand of a later layer",
        looks(lambda forward, target, view: forward.demands[target].clear()),
    ),
    predicting(
        "EditsKnown",
        "takes away the demand of this layer",
        looks(lambda forward, target, view: forward.demands[target - 1].clear()),
    ),
    predicting(
        "SetsDemands",
        "puts another demand in its place",
        looks(lambda forward, target, view: setattr(forward, "demands", [])),
    ),
    predicting(
        "EditsCounts",
        "writes to the token counts",
        looks(lambda forward, target, view: forward.counts[target - 1].clear()),
    ),
    predicting(
        "PeeksPregate",
        "reads the pre-gate recorded at a later layer",
        looks(lambda forward, target, view: forward.recorded.lookahead(forward.rows, target)[0]),
    ),
    predicting(
        "PeeksBehindPregate",
        "reads all layers' pre-gates behind the one it is given",
        looks(lambda forward, target, view: forward.recorded.lookahead(forward.rows, target - 1).base[0]),
    ),
    predicting(
        "PeeksNextRows",
        "reads the embeddings of the next tokens",
        looks(lambda forward, target, view: forward.recorded.embedding([row + 1 for row in forward.rows])[0]),
    ),
    predicting(
        "PeeksNextToken",
        "reads the next token",
        looks(lambda forward, target, view: forward.recorded.token_ids([forward.rows[-1] + 1])),
    ),
    predicting(
        "SetsRows", "asks for other rows", looks(lambda forward, target, view: setattr(forward, "rows", range(9)))
    ),
    Kind(
        "WantsFuture",
        OwnPredictor,
        "takes the future without saying so",
        {"predict": lambda self, forward, layer, distance: (self.future.demand(0), [1])},
    ),
    Kind(
        "SaysItLater",
        OwnPredictor,
        "says that it reads ahead once it has started",
        {"start": late("start", OwnPredictor, "uses_future", True)},
    ),
    Kind(
        "DeniesIt",
        OwnPredictor,
        "takes the future and says that it does not",
        {"uses_future": True, "start": late("start", OwnPredictor, "uses_future", False)},
    ),
    Kind(
        "EditsFuture",
        OwnPredictor,
        "edits the future for others",
        {"uses_future": True, "predict": lambda self, forward, layer, distance: self.future.demand(0).clear()},
    ),
    Kind(
        "EditsFutureArrays",
        OwnPredictor,
        "edits the future's arrays",
        {"uses_future": True, "predict": lambda self, forward, layer, distance: self.future.keys.__setitem__(0, 1)},
    ),
    Kind("SaysItReads", Oracle, "reads the future, and says so", {"uses_future": True}, ends=MARKED),
    Kind("TakesAnnounced", Sees, "wants forwards before they run", {"announced": takes_announced}, ends=BLIND),
    Kind(
        "SeesEnds",
        Sees,
        "looks which requests end, before they do",
        sees(lambda forward: len(forward.requests_ended)),
        ends=BLIND,
    ),
    Kind(
        "SeesDemands",
        Sees,
        "counts demands before any is known",
        sees(lambda forward: len(forward.demands) + len(forward.issue_order) + len(forward.counts or ())),
        ends=BLIND,
    ),
    Kind(
        "KeepsForward",
        Sees,
        "keeps a forward and looks at the layers ahead of it",
        {"routed": lambda self, forward, layer: setattr(self, "saw", self.saw + len(forward.demands) - layer - 1)},
        ends=BLIND,
    ),
    Kind(
        "WritesPregate",
        Sees,
        "writes to the pre-gate that others read",
        {"predict": lambda self, forward, layer, distance: forward.recorded.lookahead(forward.rows, layer).fill(1)},
        ends=BLIND,
    ),
    Kind(
        "WritesEmbedding",
        Sees,
        "writes to the embeddings that others read",
        {"predict": lambda self, forward, layer, distance: forward.recorded.embedding(forward.rows).fill(1)},
        ends=BLIND,
    ),
]
WISHES = [
    declaring("ScopeUnknown", OwnLRU, "a scope that there is not", __init__=lambda self: LRU.__init__(self, "gpu")),
    declaring(
        "ScopeChanges", OwnLRU, "another scope once it has started", start=late("start", OwnLRU, "scope", "layer")
    ),
    declaring(
        "ScopeChangesLater",
        OwnLRU,
        "another scope in the middle of a run",
        end_forward=late("end_forward", OwnLRU, "scope", "layer"),
    ),
    declaring("ScopeRaises", Eviction, "a scope that raises", scope=property(raises(ZeroDivisionError("x")))),
    declaring("StrictIsText", OwnOrder, "a text for a truth value", strict="no"),
    declaring("RefreshesIsNumber", OwnPredictor, "a number for a truth value", refreshes=1),
    declaring("PredictsIsText", OwnPredictor, "a text for a truth value", predicts="seldom"),
    declaring("FutureIsText", OwnPredictor, "a text for a truth value", uses_future="no"),
    declaring("EffortIsNumber", OwnPredictor, "decisions that cost nothing", effort=0),
    declaring("EffortIsNone", OwnPredictor, "decisions of no known cost", effort=None),
    declaring("FittedIsNone", OwnPredictor, "no text for the kind of a fitted file", fitted_kind=None),
    Kind(
        "PassesAsOurs",
        OwnOrder,
        "says that its module is one of the package",
        {"__module__": "expertflow.orders.index", "arrange": lambda self, keys: keys[:-1]},
    ),
    Kind(
        "PassesAsOne",
        OwnOrder,
        "takes the name of a class of the package",
        {
            "__module__": "expertflow.orders.index",
            "__qualname__": "IndexOrder",
            "arrange": lambda self, keys: keys[:-1],
        },
    ),
    Kind(
        "PassesBeside",
        OwnOrder,
        "its module's name begins as the package's",
        {"__module__": "expertflow_x.orders", "arrange": lambda self, keys: keys[:-1]},
    ),
    Kind("IsNoPart", object, "is no part at all", {"arrange": lambda self, keys: keys}),
]

KINDS = [*ORDERS, *EVICTIONS, *HOOKS, *PREDICTORS, *AT_ONCE_KINDS, *HORIZONS, *SELECTIONS, *PLACES, *PEEKS, *WISHES]
CLASSES: dict[str, type[Any]] = {
    kind.name: type(kind.name, (kind.base,), {"__module__": __name__, **kind.members}) for kind in KINDS
}


def __getattr__(name: str) -> Any:
    """The class of that name, for `_target_`."""
    if name in CLASSES:
        return CLASSES[name]
    raise AttributeError(name)
