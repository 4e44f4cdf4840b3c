"""An event of a log in words, for a person who looks for a difference."""

from __future__ import annotations

from collections.abc import Sequence

from expertflow.machine import GATE, HOST, LOAD
from replay.lockstep.log_format import (
    Attention,
    Copy,
    Decided,
    Estimated,
    Event,
    Experts,
    Head,
    HostEnded,
    LoggedForward,
    OnHost,
    Reading,
    ReadsTold,
    Waited,
)

_SHOWN = 12
"""Keys, or token counts, that are shown of a longer list."""


def tell(event: Event | LoggedForward, num_experts: int, other: Event | None = None) -> str:
    """One event for a person; a long list of keys from where it differs from that of `other`."""
    if isinstance(event, LoggedForward):
        return f"the begin of forward {event.index}"
    if isinstance(event, Attention):
        return f"attention of layer {event.layer}"
    if isinstance(event, Experts):
        keys = _keys(event.keys, num_experts, other.keys if isinstance(other, Experts) else ())
        tokens = "" if event.counts is None else f" of {', '.join(map(str, event.counts[:_SHOWN]))} tokens"
        return f"experts {keys}{tokens} of layer {event.layer}{' after the shared one' if event.shared else ''}"
    if isinstance(event, Head):
        return "the head"
    if isinstance(event, Copy):
        return (
            f"a copy of expert {_key(event.key, num_experts)}, chunk {event.chunk} of load {event.load}, "
            f"{event.num_bytes} bytes into slot {event.slot} after mark {event.after}"
        )
    if isinstance(event, Reading):
        return (
            f"a read of expert {_key(event.key, num_experts)}, chunk {event.chunk}, {event.num_bytes} bytes into room "
            f"{event.room} of host memory"
        )
    if isinstance(event, ReadsTold):
        return f"the end of {len(event.reads)} reads"
    if isinstance(event, Decided):
        return f"wants {_keys(event.wants, num_experts, other.wants if isinstance(other, Decided) else ())}"
    if isinstance(event, Waited):
        what = {LOAD: f"load {event.ident}", HOST: f"the host's results of task {event.ident}"}.get(event.kind)
        what = what or f"mark {event.ident} {'(routing)' if event.kind == GATE else '(tokens)'}"
        return f"a wait for {what}{' or the next chunk' if event.drain else ''}"
    if isinstance(event, Estimated | OnHost | HostEnded):
        return _of_host(event, num_experts, other)
    return f"a record at {event.now_ns} ns"


def _of_host(event: Estimated | OnHost | HostEnded, num_experts: int, other: Event | None) -> str:
    if isinstance(event, OnHost):
        keys = _keys(event.keys, num_experts, other.keys if isinstance(other, OnHost) else ())
        return f"experts {keys} of {', '.join(map(str, event.tokens[:_SHOWN]))} tokens on the host"
    if isinstance(event, Estimated):
        return f"an estimate of {len(event.tokens)} experts of {', '.join(map(str, event.tokens[:_SHOWN]))} tokens"
    return f"{len(event.results)} results of the host"


def _key(key: int, num_experts: int) -> str:
    return f"{key // num_experts}/{key % num_experts}"


def _keys(keys: Sequence[int], num_experts: int, others: Sequence[int]) -> str:
    """Keys as layer/expert: all of them if few, else those from the first on that differs."""
    first = 0
    if len(keys) > _SHOWN:
        shared = min(len(keys), len(others))
        first = next((place for place in range(shared) if keys[place] != others[place]), shared if others else 0)
    shown = ", ".join(_key(key, num_experts) for key in keys[first : first + _SHOWN]) or "nothing more"
    if first or len(keys) > _SHOWN:
        return f"[from place {first} of {len(keys)}: {shown}]"
    return f"[{shown}]" if keys else "[]"
