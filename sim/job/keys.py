"""The keys of a run, declared: what each may hold, and which exclude each other.

Those of hardware, stack and model are declared where these are (`sim.specs.hardware`, `expertflow.model`), those of a
policy's parts by the parts' constructors, those of a replay alone in `replay.settings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from expertflow.keys import Key, Rule, declared, shown, unknown_key

COMPARE = ("full", "floor", "none")
LOCALITIES = ("low", "usual", "high")
STARTS = ("cold", "popular", "resident", "pinned", "pinned_layers")
PINS = ("pinned", "pinned_layers")
"""Starts whose experts never leave."""
GROUPS = ("hardware", "link", "policy", "model", "stack", "trace")
"""Keys that hold a file of conf/, or one of the user's own, changed key by key."""
STORAGE = "storage"
"""A group that a run may lack, and lacks unless a word adds it."""
CHOSEN_BY_NAME = (*GROUPS, STORAGE)
DEFAULT_RESIDENCY = 0.5
AS_RECORDED = "as_recorded"
"""In place of a batch size."""
_ON_GPU = "expertflow.places.gpu.Gpu"
MOST_TOKENS = 1_000_000
"""Of a trace that is generated in memory."""
LONGEST_RUN_S = 1e7
_COUNT = 2**31 - 1


@dataclass(frozen=True)
class RunKeys:
    """What a simulation and a replay have in common, beside the groups."""

    residency: Annotated[
        float | None,
        Rule(0, 1, above=True, null="0.5, unless gpu_memory_gb is given", about="share of all experts with a slot"),
    ]
    gpu_memory_gb: Annotated[
        float | None,
        Rule(
            1e-3,
            1e5,
            unit="GB",
            null="residency says it",
            about="for all weights, KV and workspace; at most memory_gb in units of 2^30 bytes, of which an engine can "
            "count on memory_gb",
        ),
    ]
    host_memory_gb: Annotated[
        float | None,
        Rule(
            0,
            1e6,
            above=True,
            unit="GB",
            null="all experts fit; in a replay, what is prudent",
            about="of host memory for the experts: a cache above storage; in a replay, pinned memory",
        ),
    ]
    batch_size: Annotated[
        int | str,
        Rule(
            1,
            65_536,
            unit="requests",
            word=AS_RECORDED,
            about=f"decoded together; {AS_RECORDED}: the forwards that the trace recorded (forward_id)",
        ),
    ]
    prefill_chunk: Annotated[int, Rule(1, 1_000_000, unit="tokens", about="of a prompt in one forward")]
    speculate: Annotated[
        list[float] | None,
        Rule(
            null="no speculation",
            extra="drafted tokens in [1, 64] and the acceptance of each in [0, 1], as 4,0.8",
            about="decode forwards verify drafted tokens",
        ),
    ]
    draft_ms: Annotated[
        float, Rule(0, 1e5, unit="ms", about="of the draft model before each forward that verifies; with speculate")
    ]
    max_tokens: Annotated[int | None, Rule(1, _COUNT, unit="tokens", null="all", about="of the trace that are run")]
    chunk_mib: Annotated[
        float,
        Rule(1 / 1024, 4096, unit="MiB", about="an expert is copied in chunks of at most this, at most 1024 of them"),
    ]
    channel_depth: Annotated[int, Rule(1, 1024, unit="chunks", about="issued ahead")]
    start: Annotated[str, Rule(choices=STARTS, about="what the cache holds at first")]
    warmup_forwards: Annotated[int, Rule(0, _COUNT, unit="forwards", about="not measured; fewer than there are")]
    seed: Annotated[int, Rule(0, 2**63 - 1, about="of parts that draw at random, and of what speculation accepts")]
    compare: Annotated[str, Rule(choices=COMPARE, about="what is run beside")]
    count_redundant: Annotated[bool, Rule(about="count prefetches that were not needed, by a run without prefetch")]
    timeline: Annotated[bool, Rule(about="write timeline.json")]
    events: Annotated[bool, Rule(about="write events.parquet")]
    skip_done: Annotated[bool, Rule(about="leave a folder alone that holds this very run's result")]
    timeout_s: Annotated[
        float | None,
        Rule(0, LONGEST_RUN_S, above=True, unit="s", null="no limit", about="of wall time, for a run and those beside"),
    ]


@dataclass(frozen=True)
class TraceKeys:
    """The group `trace`."""

    path: Annotated[
        str | list[str] | None,
        Rule(
            null="generated, or the shipped recording",
            extra="a list of files",
            about="a file, a glob, or a list of files",
        ),
    ] = None
    num_tokens: Annotated[int | None, Rule(1, MOST_TOKENS, unit="tokens", null="1024", about="that are generated")] = (
        None
    )
    num_requests: Annotated[int | None, Rule(1, MOST_TOKENS, null="8", about="at most num_tokens")] = None
    seed: Annotated[int | None, Rule(0, 2**63 - 1, null="0", about="of what is generated")] = None
    params: Annotated[str | None, Rule(null="the shipped ones", about="a file of python -m traces fit")] = None
    locality: Annotated[
        str | None,
        Rule(
            choices=LOCALITIES,
            null="usual, and the range from low to high",
            about="of assumed routing: a model, and no trace of its topology",
        ),
    ] = None
    reuse: Annotated[
        float | None,
        Rule(
            0,
            1,
            null="locality says it",
            about="of assumed routing: share of a token's experts that the one before has chosen in that layer",
        ),
    ] = None


@dataclass(frozen=True)
class ModelKeys:
    """The group `model`, beside the sizes."""

    path: Annotated[
        str | None,
        Rule(
            null="the model that is named, or that the trace names",
            about="a Hugging Face config.json, its folder, or a GGUF file; other keys change what is read",
        ),
    ] = None


@dataclass(frozen=True)
class PolicyKeys:
    """The group `policy`, beside its parts."""

    name: Annotated[str, Rule(about="of the policy, in results")]


def check_run(plain: Mapping[str, Any], more: Mapping[str, Key]) -> None:
    """ValueError for a key of a run that is unknown, missing or holds what it may not, or for two that exclude each
    other. more: the keys that a command has beside `RunKeys`."""
    own = {**declared(RunKeys), **more}
    known = [*GROUPS, *own]
    for name in plain:
        if name not in known and name != STORAGE:
            raise unknown_key("", name, [*known, STORAGE])
    for name in known:
        if name not in plain:
            raise ValueError(f"{name} is missing; it cannot be taken out, only given another value")
    for name in (*GROUPS, *(one for one in plain if one == STORAGE)):
        if not isinstance(plain[name], dict):
            told = f"{name}={shown(plain[name])}"
            raise ValueError(f"{told} must be the name of a file of the group {name}; --help lists them")
    for name, key in own.items():
        key.check(plain[name], name)
    check_trace(plain["trace"])
    for name, key in declared(PolicyKeys).items():
        if name not in plain["policy"]:
            raise ValueError(f"policy.{name} is missing; it cannot be taken out, only given another value")
        key.check(plain["policy"][name], f"policy.{name}")
    _check_pairs(plain)
    # A replay, which has keys of its own, takes it for the budget of its buffers.
    if not more and plain["host_memory_gb"] is not None and STORAGE not in plain:
        raise ValueError(
            f"host_memory_gb={shown(plain['host_memory_gb'])} is of a cache above storage, and there is none; add "
            "+storage=NAME, or leave it out"
        )


def check_trace(trace: Mapping[str, Any]) -> None:
    """The same for the keys of the trace."""
    known = declared(TraceKeys)
    for name, value in trace.items():
        if name not in known:
            raise unknown_key("trace", name, list(known))
        known[name].check(value, f"trace.{name}")
    path = trace.get("path")
    if isinstance(path, list | tuple) and not (path and all(isinstance(one, str) and one for one in path)):
        raise ValueError(f"trace.path={shown(path)} must be a file, a glob, or a list of files")
    told = [name for name, value in trace.items() if name != "path" and value is not None]
    if path is not None and told:
        raise ValueError(
            f"trace.{told[0]}={shown(trace[told[0]])} is of a trace that is generated, and trace.path={shown(path)} is "
            f"read; leave one out{' (max_tokens cuts a trace)' if told[0] == 'num_tokens' else ''}"
        )
    for name in ("locality", "reuse"):
        if "params" in told and name in told:
            raise ValueError(
                f"trace.{name}={shown(trace[name])} is of assumed routing, trace.params={shown(trace['params'])} "
                "of routing with fitted parameters; leave one out"
            )
    if "locality" in told and "reuse" in told:
        raise ValueError(
            f"trace.locality={shown(trace['locality'])} and trace.reuse={shown(trace['reuse'])} both say how local "
            "the routing is; leave one out"
        )


def _check_pairs(plain: Mapping[str, Any]) -> None:
    """ValueError for two keys of which one would be ignored."""
    residency, gigabytes = plain["residency"], plain["gpu_memory_gb"]
    if residency is not None and gigabytes is not None:
        raise ValueError(
            f"residency={shown(residency)} and gpu_memory_gb={shown(gigabytes)} both say how many experts have a slot; "
            "leave one out"
        )
    check_storage_pair(plain)
    warmup, tokens = plain["warmup_forwards"], plain["max_tokens"]
    if tokens is not None and warmup >= tokens:
        raise ValueError(
            f"warmup_forwards={warmup} leaves nothing to measure of max_tokens={tokens}: a forward has a token at least"
        )
    if plain["count_redundant"] and "_target_" in plain["policy"]:
        raise ValueError(
            "count_redundant=true compares with the same policy without its predictor; "
            f"policy={shown(plain['policy']['name'])} has no parts: leave it false"
        )


def check_storage_pair(plain: Mapping[str, Any]) -> None:
    """ValueError for a storage without the host memory above it, or with a place on the host."""
    if STORAGE not in plain:
        return
    name = plain[STORAGE].get("name")
    if plain["host_memory_gb"] is None:
        raise ValueError(f"storage={shown(name)} needs the host memory above it; give host_memory_gb=GB")
    place = plain["policy"].get("place")
    if place is not None and not (isinstance(place, dict) and place.get("_target_") == _ON_GPU):
        raise ValueError(
            f"storage={shown(name)} and policy.place exclude each other: a place on the host computes experts that all "
            "lie in host memory; leave one out"
        )
