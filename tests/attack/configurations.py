"""Bad configurations, generated from the declared keys, and what judges them within this process.

Deterministic. `bad()` lists those that take a composed configuration apart key by key (a millisecond each: it is
composed once); `bad_words()` those that Hydra itself must read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from expertflow.clairvoyant import Clairvoyant
from expertflow.keys import LISTS, NUMBER, OTHER, REQUIRED, SWITCH, TEXT, WHOLE, Key, arguments_of, declared
from expertflow.model import ModelSpec
from expertflow.parts import Effort
from replay.keys import ReplayKeys
from replay.settings import Settings
from sim.job.configure import configure, settled
from sim.job.errors import one_line
from sim.job.keys import GROUPS, ModelKeys, PolicyKeys, RunKeys, TraceKeys, check_run
from sim.job.parts import KINDS, class_of
from sim.job.setup import Transfer, make_policy, make_workload
from sim.paths import CONF, DATA
from sim.specs.hardware import Hardware, Stack
from sim.specs.links import LinkPreset
from sim.specs.storage import Storage
from traces.reader import open_trace
from traces.shipped import shipped

DELETED = object()
"""In place of a value: the key is taken out."""
LRU = ("+hardware=a100", "+policy=lru", "compare=none", "max_tokens=20")
ADAPTIVE = ("+hardware=a100", "+policy=adaptive", "compare=none", "max_tokens=20")
CLAIRVOYANT = ("+hardware=a100", "+policy=clairvoyant", "compare=none", "max_tokens=20")
MODEL = (*LRU, "model=gpt-oss-20b")
STORED = (*LRU, "+storage=nvme-gen4", "host_memory_gb=8")
LINKED = (*LRU, "link=pcie4x8")
REPLAY = ("+hardware=local", "+policy=lru", "max_tokens=20", "machine=cpu", "scale=64")
TRACE = "gpt-oss-20b-twin-eval.safetensors"
LONGEST = 300
"""Characters of a message."""


@dataclass(frozen=True)
class Bad:
    """A configuration that must be refused: edits of what `base` composes to, and what the message must name.

    world: `sim` or `replay`.
    """

    base: tuple[str, ...]
    edits: tuple[tuple[str, Any], ...]
    names: tuple[str, ...]
    world: str = "sim"

    @property
    def words(self) -> list[str]:
        """The overrides of a command line that say the same."""
        return [
            *self.base,
            *(f"~{key}" if value is DELETED else f"++{key}={literal(value)}" for key, value in self.edits),
        ]

    def __str__(self) -> str:
        return " ".join(self.words)


def literal(value: Any) -> str:
    """A value in Hydra's grammar of overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(literal(one) for one in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{literal(one)}" for key, one in value.items()) + "}"
    return repr(value)


# -- values --------------------------------------------------------------------------------------------------


def wrong_values(key: Key) -> Iterator[Any]:
    """What a key may not hold: wrong types, what lies beyond its ends, and what is no number."""
    rule = key.rule
    if not key.nullable:
        yield None
    if key.kind == OTHER:
        return
    yield {"a": 1}
    if key.kind in LISTS.values():
        yield from ("12", 5, True, [], [rule.low - 1], [rule.high + 1], ["a"], [None], [True], [math.nan], [[1]], [1.5])
        yield [1] * 20_000
        return
    if not rule.extra:
        yield [1]
        yield []
    if key.kind == SWITCH:
        yield from (0, 1, 1.0, "yes", "true")
    elif key.kind == TEXT:
        yield from (5, 1.5, True, math.nan, "")
        yield from ("nosuch", "two words") if rule.choices else ("a\nb", "x" * 5000)
    else:
        yield from (True, False, "abc", "", "1", math.nan, -math.inf)
        if not rule.infinite:
            yield math.inf
        yield from (10**30, -(10**30), 1e300)
        yield from (rule.low - 1, rule.high + 1)
        if key.kind == WHOLE:
            yield from (1.5, float(max(rule.low, 1)))
        elif key.kind == NUMBER:
            yield rule.low if rule.above else math.nextafter(rule.low, -math.inf)
            yield rule.high if rule.below else math.nextafter(rule.high, math.inf)


def edges(key: Key) -> Iterator[Any]:
    """The first and the last value that a key may hold, and what it holds by default."""
    rule = key.rule
    if key.kind == SWITCH:
        yield from (False, True)
    elif rule.choices:
        yield from rule.choices
    elif key.kind == WHOLE:
        yield from (int(rule.low), int(rule.high))
    elif key.kind == NUMBER:
        yield math.nextafter(rule.low, math.inf) if rule.above else rule.low
        yield math.nextafter(rule.high, -math.inf) if rule.below else rule.high
        if rule.infinite:
            yield math.inf
    if key.nullable:
        yield None


@dataclass(frozen=True)
class Place:
    """A declared key where a configuration has it."""

    base: tuple[str, ...]
    dotted: str
    key: Key
    world: str = "sim"


@lru_cache(maxsize=1)
def places() -> tuple[Place, ...]:
    """Every declared key of every group and part."""
    found = [Place(LRU, name, key) for name, key in declared(RunKeys).items()]
    for base, group, cls in (
        (LRU, "trace", TraceKeys),
        (LRU, "policy", PolicyKeys),
        (LRU, "hardware", Hardware),
        (LINKED, "link", LinkPreset),
        (LRU, "stack", Stack),
        (STORED, "storage", Storage),
        (MODEL, "model", ModelSpec),
        (LRU, "model", ModelKeys),
        (LRU, "policy.transfer", Transfer),
        (LRU, "policy.effort", Effort),
    ):
        found += [Place(base, f"{group}.{name}", key) for name, key in declared(cls).items()]
    for part, name, cfg in part_files():
        keys, _ = arguments_of(class_of(cfg, part, KINDS[part]))
        found += [Place(_with_part(part, name, key.name), f"policy.{part}.{key.name}", key) for key in keys.values()]
    own, _ = arguments_of(Clairvoyant)
    found += [Place(CLAIRVOYANT, f"policy.{name}", key) for name, key in own.items() if name != "future"]
    found += [Place(REPLAY, name, key, "replay") for name, key in declared(ReplayKeys).items()]
    return tuple(found)


def _with_part(part: str, name: str, key: str) -> tuple[str, ...]:
    """A sound configuration with that part, in which `key` of it may be given."""
    if part != "place":
        return (*ADAPTIVE, f"policy/{part}={name}")
    # A place needs a host to compute on, which no profile of a GPU says; one needs to be told its experts.
    told = ("policy.place.experts=[0]",) if name == "host_experts" and key != "experts" else ()
    return (*ADAPTIVE, "+host=desktop", f"+policy/place={name}", *told)


def part_files() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Kind, name and content of each file of a part; a class only once, for the first file that names it."""
    seen = set()
    for part in KINDS:
        for path in sorted((CONF / "policy" / part).glob("*.yaml")):
            cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
            if "_target_" in cfg and cfg["_target_"] not in seen:
                seen.add(cfg["_target_"])
                yield part, path.stem, cfg


def _filled(place: Place) -> bool:
    """Whether a key is given a file, which is read before the part is made."""
    return place.dotted.rpartition(".")[2] in ("fitted", "fitted_start")


def bad_values() -> Iterator[Bad]:
    """Each key with each value that it may not hold."""
    for place in places():
        for value in wrong_values(place.key):
            if _filled(place):
                continue
            # A seed of null in a part is the run's.
            if value is None and place.dotted.startswith("policy.predictor.") and place.key.name == "seed":
                continue
            yield Bad(place.base, ((place.dotted, value),), (place.dotted,), place.world)


def bad_keys() -> Iterator[Bad]:
    """Keys that are taken out, unknown and misspelt."""
    groups: dict[tuple[tuple[str, ...], str, str], list[str]] = {}
    for place in places():
        group, _, name = place.dotted.rpartition(".")
        groups.setdefault((place.base, group, place.world), []).append(name)
        # A dataclass of run keys has no defaults: its keys are all in the file.
        if place.key.default is REQUIRED and not _filled(place):
            yield Bad(place.base, ((place.dotted, DELETED),), (place.dotted.replace(f"{group}.", "", 1),), place.world)
    for (base, group, world), names in groups.items():
        prefix = f"{group}." if group else ""
        yield Bad(base, ((f"{prefix}foo", 1),), (f"{prefix}foo", "no key"), world)
        for name in names:
            wrong = f"{name}x" if len(name) < 4 else name[:-2] + name[-1] + name[-2] + "x"
            yield Bad(base, ((prefix + wrong, 1),), (prefix + wrong, "no key"), world)
    for group in GROUPS:
        yield Bad(LRU, ((group, DELETED),), (group,))
        for value in (None, 5, "abc", [1], True):
            yield Bad(LRU, ((group, value),), (group,))


# -- parts ---------------------------------------------------------------------------------------------------

TARGETS: tuple[Any, ...] = (
    "builtins.dict",
    "builtins.eval",
    "builtins.object",
    "os.system",
    "os.path",
    "os.environ",
    "subprocess.run",
    "subprocess.Popen",
    "sys.exit",
    "pathlib.Path",
    "collections.OrderedDict",
    "expertflow.policy.Policy",
    "expertflow.parts.Part",
    "expertflow.evictions.lru.LRU.victim",
    "expertflow.evictions.lru.Nosuch",
    "expertflow.evictions.nosuch.LRU",
    "expertflow.evictions",
    "tests.attack.trap.Trap",
    "tests.attack.trap.trap",
    "tests.attack.trap.TRAP",
    "tests.attack.raising.Part",
    "tests.attack.leaving.Part",
    "nosuch.module.Class",
    "LRU",
    "",
    ".",
    "a..b",
    "expertflow.evictions.lru.",
    "expertflow/evictions/lru.LRU",
    "expertflow.evictions.lru:LRU",
    "__import__('os').system",
    "x" * 600 + ".y",
    5,
    1.5,
    True,
    None,
    ["expertflow.evictions.lru.LRU"],
    {"_target_": "expertflow.evictions.lru.LRU"},
)
MAGIC = {"_partial_": True, "_recursive_": False, "_convert_": "all", "_args_": [1], "__class__": 1, "_": 1}
CALL = {"_target_": "tests.attack.trap.trap"}
OWN = {
    "predictor": "expertflow.predictors.none.NoPredictor",
    "horizon": "expertflow.horizons.fixed.FixedHorizon",
    "selection": "expertflow.selections.top_k.TopK",
    "eviction": "expertflow.evictions.lru.LRU",
    "order": "expertflow.orders.index.IndexOrder",
    "place": "expertflow.places.gpu.Gpu",
}


def bad_parts() -> Iterator[Bad]:
    """Each part with each wrong class, with Hydra's own keys, and with code inside its arguments."""
    for part, kind in KINDS.items():
        key = f"policy.{part}"
        base = (*LRU, "+policy/place=gpu") if part == "place" else LRU
        wrong = [*TARGETS, f"{kind.__module__}.{kind.__name__}", *(name for one, name in OWN.items() if one != part)]
        for target in wrong:
            yield Bad(base, ((f"{key}._target_", target),), (key,))
        for name, value in MAGIC.items():
            yield Bad(base, ((f"{key}.{name}", value),), (f"{key}.{name}",))
        for value in (5, "abc", None, [], [1], {}, True):
            yield Bad(base, ((key, value),), (key,))
        yield Bad(base, ((f"{key}._target_", DELETED),), (key,))
    for part, name, cfg in part_files():
        base = (*ADAPTIVE, f"{'+' if part == 'place' else ''}policy/{part}={name}")
        for argument in (*(one for one in cfg if one not in ("_target_", "fitted", "fitted_start")), "more"):
            for value in (CALL, {"a": CALL}, [CALL], {"_partial_": True}):
                yield Bad(base, ((f"policy.{part}.{argument}", value),), (f"policy.{part}.{argument}",))
    for target in (*TARGETS, *OWN.values()):
        if target != "expertflow.policy.Policy":
            yield Bad(CLAIRVOYANT, (("policy._target_", target),), ("policy",))
    for candidate in ("hybrid", "lookahead", "transition"):
        key = f"policy.predictor.{candidate}"
        for target in ("builtins.dict", "tests.attack.trap.trap", OWN["eviction"], None):
            yield Bad(ADAPTIVE, ((f"{key}._target_", target),), (key,))
        yield Bad(ADAPTIVE, ((key, 5),), (key,))
        yield Bad(ADAPTIVE, ((f"{key}.foo", 5),), (key, "foo"))
    for key in ("policy.effort", "policy.transfer"):
        for value in (5, "abc", [1], True):
            yield Bad(LRU, ((key, value),), (key,))


# -- pairs ---------------------------------------------------------------------------------------------------


def bad_pairs() -> Iterator[Bad]:
    """Keys that exclude each other, and values that only another key makes wrong."""
    yield Bad(LRU, (("residency", 0.25), ("gpu_memory_gb", 20)), ("residency=0.25", "gpu_memory_gb=20"))
    yield Bad(LRU, (("residency", 0.5), ("gpu_memory_gb", 20)), ("residency=0.5", "gpu_memory_gb=20"))
    generated = (
        ("num_tokens", 5),
        ("num_requests", 1),
        ("seed", 0),
        ("params", "p"),
        ("locality", "low"),
        ("reuse", 0.3),
    )
    for name, value in generated:
        for path in ("a.safetensors", ["a.safetensors"]):
            yield Bad(LRU, (("trace.path", path), (f"trace.{name}", value)), (f"trace.{name}", "trace.path"))
    for path in ([], [1], [""], ["a", None], [["a"]]):
        yield Bad(LRU, (("trace.path", path),), ("trace.path",))
    yield Bad(LRU, (("warmup_forwards", 20),), ("warmup_forwards=20", "max_tokens=20"))
    yield Bad(LRU, (("gpu_memory_gb", 86),), ("gpu_memory_gb=86", "hardware.memory_gb"))
    yield Bad(LRU, (("gpu_memory_gb", 0.001),), ("gpu_memory_gb=0.001", "no slot"))
    yield Bad(LRU, (("host_memory_gb", 8),), ("host_memory_gb=8", "storage"))
    yield Bad(STORED, (("host_memory_gb", None),), ("storage", "host_memory_gb"))
    yield Bad(STORED, (("host_memory_gb", 0.001),), ("host_memory_gb=0.001",))
    yield Bad(STORED, (("policy.place", {"_target_": "expertflow.places.cheaper.Cheaper"}),), ("policy.place",))
    for curve in (
        [],
        [[4096, 1], [4096, 2]],
        [[0, 1]],
        [[4096]],
        [[4096, "x"]],
        [[1.5, 1]],
        [[True, 1]],
        [[4096, 0]],
        [5],
    ):
        yield Bad(STORED, (("storage.gb_per_s", curve),), ("storage.gb_per_s",))
    yield Bad(STORED, (("storage.sources", {"nosuch": "x"}),), ("storage.sources.nosuch",))
    for value in (None, 5, "abc", [1], True):
        yield Bad(STORED, (("storage", value),), ("storage",))
    yield Bad(LRU, (("residency", 1e-6),), ("residency=1e-06", "no slot"))
    yield Bad(LRU, (("start", "resident"),), ("start=resident", "residency"))
    yield Bad(LRU, (("chunk_mib", 1 / 1024),), ("chunk_mib=0.000976562", "chunks"))
    yield Bad(LRU, (("hardware.link_gb_per_s", 3000.0),), ("hardware.link_gb_per_s=3000.0", "memory_gb_per_s"))
    for curve in (
        [],
        [1],
        [[1]],
        [[1, 2, 3]],
        [[1, "a"]],
        [[0, 5.0]],
        [[8, 5.0], [4, 6.0]],
        [[8, 1e-9]],
        [[8, math.nan]],
    ):
        yield Bad(LRU, (("hardware.link_gb_per_s", curve),), ("hardware.link_gb_per_s",))
    for tables in (5, [1], {"tiny": 5}, {"tiny": {}}, {"tiny": {"kv": 1}}):
        yield Bad(LRU, (("hardware.kernel_ns", tables),), ("hardware.kernel_ns",))
    for sources in (5, ["x"], {"foo": "x"}, {"tflops": 5}, {"tflops": ""}):
        yield Bad(LRU, (("hardware.sources", sources),), ("hardware.sources",))
    # With the trace named: without one, routing of that topology is assumed.
    for name in ("num_layers", "num_experts"):
        yield Bad(MODEL, ((f"model.{name}", 7), ("trace.path", str(DATA / TRACE))), (f"{name}=7", "trace"))
    for key, value in (("trace.path", "a.safetensors"), ("trace.params", "p")):
        for told in (("trace.locality", "low"), ("trace.reuse", 0.3)):
            yield Bad(MODEL, (told, (key, value)), (told[0], key))
    yield Bad(MODEL, (("trace.locality", "low"), ("trace.reuse", 0.3)), ("trace.locality", "trace.reuse"))
    for reuse in (0.0, 0.01, 0.99, 1.0):
        yield Bad(MODEL, (("trace.reuse", reuse),), (f"trace.reuse={reuse:g}", "low and high"))
    yield Bad(MODEL, (("model.top_k", 33),), ("model.top_k=33", "num_experts"))
    yield Bad(MODEL, (("model.num_kv_heads", 7),), ("model.num_kv_heads=7", "num_heads"))
    yield Bad(MODEL, (("model.kv_rank", 7),), ("model.kv_rank=7", "gqa"))
    yield Bad(MODEL, (("model.dense_intermediate", 7),), ("model.dense_intermediate=7", "num_dense_layers"))
    yield Bad(LRU, (("model.num_layers", 7),), ("model.num_layers", "model=auto"))
    yield Bad(CLAIRVOYANT, (("count_redundant", True),), ("count_redundant=true", "clairvoyant"))
    horizon = (*ADAPTIVE, "policy/horizon=fixed_1")
    yield Bad(horizon, (("policy.horizon.distances", [2]),), ("policy.horizon", "distances"))
    yield Bad(horizon, (("policy.horizon.depth", None),), ("policy.horizon", "depth"))
    least = (*ADAPTIVE, "policy/selection=stall_saved")
    yield Bad(
        least, (("policy.selection.least", 0.5), ("policy.selection.most", 0.4)), ("policy.selection", "least=0.5")
    )
    noisy = (*ADAPTIVE, "policy/predictor=noisy_oracle")
    yield Bad(noisy, (("policy.predictor.a", 2.0),), ("policy.predictor", "a=2.0"))
    for name, value in (("fitted", 5), ("fitted", "/absent"), ("fitted", [1]), ("fitted", ""), ("fitted", None)):
        yield Bad((*ADAPTIVE, "policy/predictor=hybrid"), ((f"policy.predictor.{name}", value),), ("policy.predictor",))
    for value in (5, "/absent", [1], "", True):
        base = (*ADAPTIVE, "policy/predictor=transition")
        yield Bad(base, (("policy.predictor.fitted_start", value),), ("policy.predictor.fitted_start",))
    yield Bad(REPLAY, (("fault_at", 100),), ("fault_at=100", "fault"), "replay")
    yield Bad(REPLAY, (("fault", "failed"),), ("fault=failed", "verify=true"), "replay")
    yield Bad(REPLAY, (("throttle_gb_per_s", 1e-9),), ("throttle_gb_per_s=1e-09",), "replay")


def bad() -> list[Bad]:
    """All of them, in order."""
    return [*bad_values(), *bad_keys(), *bad_parts(), *bad_pairs()]


# -- what Hydra reads ----------------------------------------------------------------------------------------

WORDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("+hardware=[a100,h100]", "+policy=lru"), ("hardware=[a100,h100]", "one file")),
    (("+hardware=[a100]", "+policy=lru"), ("hardware=[a100]", "one file")),
    (("+hardware=a100", "+policy=[lru,adaptive]"), ("policy=[lru,adaptive]", "one file")),
    (("+hardware={a:1}", "+policy=lru"), ("hardware={a:1}", "one file")),
    (("+hardware=null", "+policy=lru"), ("hardware=null", "one file")),
    (("+hardware=5", "+policy=lru"), ("hardware=5", "one file")),
    (("+hardware=true", "+policy=lru"), ("hardware=true", "one file")),
    (("+hardware=", "+policy=lru"), ("hardware=", "one file")),
    (("+hardware=a100,h100", "+policy=lru"), ("+hardware=a100,h100", "-m")),
    (("+hardware=a100", "+policy=lru", "residency=0.2,0.4"), ("residency=0.2,0.4", "-m")),
    (("+hardware=a100", "+policy=lru", "policy/eviction=[lru,lfu]"), ("policy/eviction=[lru,lfu]", "one file")),
    (("+hardware=a100", "+policy=lru", "model=[auto,gpt-oss-20b]"), ("model=[auto", "one file")),
    (("+hardware=a100", "+policy=lru", "stack=null"), ("stack=null", "one file")),
    (("+hardware=nosuch", "+policy=lru"), ("hardware=nosuch", "a100")),
    (("+hardware=gh201", "+policy=lru"), ("hardware=gh201", "did you mean gh200?")),
    (("+hardware=a100", "+policy=nosuch"), ("policy=nosuch", "adaptive")),
    (("+hardware=a100", "+policy=lru", "model=nosuch"), ("model=nosuch", "choose one of: ")),
    (("+hardware=a100", "+policy=lru", "policy/eviction=nosuch"), ("policy/eviction=nosuch", "lru")),
    (("+hardware=a100", "+policy=lru", "+policy/place=nosuch"), ("policy/place=nosuch", "gpu")),
    (("+hardware=a100", "+hardware=h100", "+policy=lru"), ("hardware", "once")),
    (("+hardware=a100", "+policy=lru", "~hardware"), ("hardware is not chosen",)),
    (("+hardware=a100", "+policy=lru", "~policy"), ("policy is not chosen",)),
    (("+hardware=a100", "+policy=lru", "~model"), ("model is missing",)),
    (("+hardware=a100", "+policy=lru", "~nosuch"), ("nosuch",)),
    (("+hardware=a100", "+policy=lru", "~policy.name"), ("policy.name",)),
    (("+hardware=a100", "+policy=lru", "foo=1"), ("foo", "is no key")),
    (("+hardware=a100", "+policy=lru", "+seed=5"), ("seed", "leave out the plus sign")),
    (("hardware=a100", "+policy=lru"), ("hardware", "+hardware=NAME")),
    (("+hardware=a100", "+policy=lru", "residency=${foo}"), ("residency", "foo")),
    (("+hardware=a100", "+policy=lru", "residency=${residency}"), ("residency",)),
    (("+hardware=a100", "+policy=lru", "residency=${seed}", "seed=${residency}"), ("residency",)),
    (("+hardware=a100", "+policy=lru", "residency=${oc.env:EXPERTFLOW_NOSUCH}"), ("residency", "EXPERTFLOW_NOSUCH")),
    (("+hardware=a100", "+policy=lru", "residency=${nosuch:1}"), ("residency", "nosuch")),
    (("+hardware=a100", "+policy=lru", "residency=${"), ("residency=${",)),
    (("+hardware=a100", "+policy=lru", "residency=???"), ("residency",)),
    (("+hardware=a100", "+policy=lru", "hardware.tflops=???"), ("hardware.tflops",)),
    (("+hardware=a100", "+policy=lru", "residency="), ("residency=",)),
    (("+hardware=a100", "+policy=lru", "seed=" + "9" * 5000), ("seed",)),
    (("+hardware=a100", "+policy=lru", "residency=[0.5"), ("residency=[0.5",)),
    (("+hardware=a100", "+policy=lru", "=5"), ("=5",)),
    (("+hardware=a100", "+policy=lru", "turbo"), ("turbo",)),
    (("+hardware=a100", "+policy=lru", "a b=5"), ("a b=5",)),
    (("+hardware=a100", "+policy=lru", "policy.name='a"), ("policy.name='a",)),
    (("+hardware=a100", "+policy=lru", "residency=int(abc)"), ("residency=int(abc)",)),
    (("+hardware=a100", "+policy=lru", "hardware.tflops.x=5"), ("hardware.tflops",)),
    (("+hardware=a100", "+policy=lru", "+hardware.tflops.x=5"), ("hardware.tflops",)),
    (("+hardware=a100", "+policy=lru", "+policy.eviction.scope.x=5"), ("policy.eviction.scope",)),
    (("+hardware@model=a100", "+policy=lru"), ("hardware is not chosen",)),
    (("+hardware=a100", "+hardware@foo=a100", "+policy=lru"), ("foo", "no key")),
    (("+hardware=a100", "+policy=lru", "policy/eviction@policy.order=lru"), ("policy",)),
    ((*LRU, "trace.locality=low"), ("trace.locality='low'", "model=NAME")),
    ((*LRU, "trace.reuse=0.3"), ("trace.reuse=0.3", "model=NAME")),
    ((*MODEL, "trace.locality=low", "batch_size=9"), ("batch_size=9", "trace.num_requests=9")),
    ((*MODEL, "model.num_layers=7", "trace.num_tokens=3", "trace.num_requests=4"), ("trace.num_requests=4",)),
    ((*MODEL, "model.num_layers=10000", "model.num_experts=65535"), ("10000x65535", "trace.path=FILE")),
    (("+hardware=../a100", "+policy=lru"), ("hardware",)),
    (("+hardware=/etc/passwd", "+policy=lru"), ("hardware",)),
)


def bad_words() -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Overrides that cannot be composed, and what the message must name."""
    return list(WORDS)


# -- the judge -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _composed(base: tuple[str, ...], world: str) -> dict[str, Any]:
    if world == "replay":
        return configure(list(base), "replay", declared(ReplayKeys))
    return configure(list(base))


@lru_cache(maxsize=1)
def trace_at_hand() -> Any:
    """The shipped recording, opened once."""
    return open_trace(str(shipped(TRACE)))


def edited(case: Bad) -> dict[str, Any]:
    """The configuration of `case`, as plain values."""
    plain = copy.deepcopy(_composed(case.base, case.world))
    # As composed, not as filled in: the default of one of two keys that exclude each other stands for neither.
    if not any(word.startswith("residency=") for word in case.base):
        plain["residency"] = None
    for dotted, value in case.edits:
        *groups, name = dotted.split(".")
        place = plain
        for group in groups:
            place = place.setdefault(group, {})
        if value is DELETED:
            del place[name]
        else:
            place[name] = copy.deepcopy(value)
    return plain


def ready(case: Bad) -> dict[str, Any]:
    """The same, checked; ValueError for what no run is begun with."""
    plain = edited(case)
    check_run(plain, declared(ReplayKeys) if case.world == "replay" else {})
    return settled(plain)


def judge(case: Bad) -> str | None:
    """The message that refuses `case`, as a command prints it; None if it is accepted.

    Anything but an error that a command knows passes through: it would have been a traceback.
    """
    try:
        plain = ready(case)
        if case.world == "replay":
            Settings.of(plain)
            return None
        # Of a reuse that cannot be the trace itself says so, when it is made.
        is_any = plain["trace"]["path"] is None and plain["trace"].get("reuse") is None
        work = make_workload(plain, trace_at_hand() if is_any else None)
        make_policy(plain["policy"], work, plain["seed"])
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        return line
    return None


def judge_words(words: Sequence[str]) -> str | None:
    """The same for overrides, composed by Hydra."""
    try:
        plain = configure(list(words))
        work = make_workload(plain)
        make_policy(plain["policy"], work, plain["seed"])
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        return line
    return None


def faults(line: str | None, names: Sequence[str]) -> list[str]:
    """What is wrong with a message: that there is none, its length, its lines, what it does not name."""
    if line is None:
        return ["accepted"]
    found = [f"does not name {name!r}" for name in names if name not in line]
    if len(line) > LONGEST:
        found.append(f"{len(line)} characters")
    if "\n" in line or "Traceback" in line or "HYDRA_FULL_ERROR" in line:
        found.append("more than a line")
    return found
