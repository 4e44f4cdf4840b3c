"""What the simulated machine is made of: a GPU, its link to the host, the host's costs, the software stack.

Data only: `sim.machine.kernels` and `sim.machine.link` turn it into times. Units stand in the names; GB = 1e9 bytes.
Every figure of `conf/hardware` and `conf/stack` carries its origin in `sources`.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Protocol

from expertflow.keys import Rule, check_fields, check_range, from_mapping
from sim.specs.kernel_table import KernelTable, kernel_table

Curve = tuple[tuple[int, float], ...]
"""Points (copy size in bytes, GB/s), sizes rising."""

PINNED = "pinned"
PAGEABLE = "pageable"
"""The host memory that experts wait in."""

LEAST_GB_PER_S = 1e-4
"""No link is slower: a copy of one small expert would last for minutes."""
_MOST_GB_PER_S = 1e6
MOST_NS = 1_000_000_000
"""Of one cost of the host or the stack."""
_LINK_REMEDY = "give GB/s in one direction, as measured with pinned memory"
_CURVE = "a list of [bytes, GB/s]"


def _ns(about: str) -> Rule:
    return Rule(0, MOST_NS, unit="ns", about=about, remedy="give whole nanoseconds, at most a second")


def _rate(unit: str, about: str, low: float = 1e-6) -> Rule:
    return Rule(low, 1e6, unit=unit, about=about, remedy=f"give {about}")


def _link(about: str, remedy: str, extra: str = "") -> Rule:
    return Rule(LEAST_GB_PER_S, _MOST_GB_PER_S, infinite=True, unit="GB/s", about=about, remedy=remedy, extra=extra)


_SHARE = Rule(1e-3, 1, about="share of the peak that kernels reach", remedy="give the share of the peak")


class _Sourced(Protocol):
    """A group of figures, each with its origin in `sources`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def sources(self) -> Mapping[str, str]: ...


def check_sources(group: str, spec: _Sourced) -> None:
    """ValueError for an origin that is no text, or that is of no figure of `spec`."""
    known = {item.name for item in fields(spec)} - {"name", "sources"}
    if not isinstance(spec.sources, Mapping):
        raise ValueError(f"{group}.sources={spec.sources!r} must map each figure's key to its origin")
    for key, text in spec.sources.items():
        if key not in known:
            raise ValueError(f"{group}.sources.{key} is no figure; valid keys: {', '.join(sorted(known))}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{group}.sources.{key}={text!r} must be text: a reference, or 'assumption: …'")


@dataclass(frozen=True)
class Hardware:
    """One GPU with its host.

    tflops: dense bf16, fp32 accumulate. memory_efficiency, compute_efficiency: the share of the two peaks
    (memory_gb_per_s, tflops) that kernels reach.
    memory_gb: as the maker names it, whose gigabytes are of 2^30 bytes. Taken as 10^9 bytes each it is what an engine
    can count on: the 7 % between are left to driver, context and workspace.
    link_gb_per_s: host to device, pinned, one way; an asymptotic figure or a curve by copy size, either
    *without* link_latency_ns, which every copy pays on top (`sim.machine.link`). Infinity is a copy in no time.
    link: the name of the widest link that the card takes; only a choice of another one (`sim.job.link`) reads it.
    link_slowdown: factor on a copy's transfer time while kernels read memory.
    launch_host_ns: a launch keeps the host busy. launch_latency_ns: from enqueuing to the start of the kernel
    on an idle stream. issue_copy_ns: one asynchronous copy call. gate_sync_ns: end of the router kernel until
    the host has the routing. token_sync_ns: the same for the sampled tokens. decide_ns: a decision of
    effort 1, as one that looks rows up in a table (`expertflow.parts.Effort`).
    host_memory_gb_per_s: what copies and experts on the host draw from the host's memory together, at most.
    host_memory_efficiency: the share of it that these experts reach by themselves. host_tflops: what they reach where
    their products, not their weights, take the time. host_round_trip_ns: activations to the host and results back, once
    a layer, beside their bytes. None of the four: nothing is known of the host, and no expert can be placed there.
    host_unpack_gweights_per_s: quantised weights that its cores unpack a second, while they read nothing
    (`sim.machine.host_compute`); None: that time is hidden, or in host_memory_efficiency.
    kernel_ns: measured kernel times by name of the model; they replace the roofline for those models alone.
    """

    name: Annotated[str, Rule(about="of the profile")]
    memory_gb: Annotated[
        float,
        Rule(
            1e-3,
            1e5,
            unit="GB",
            about="GPU memory, the maker's number: what an engine can count on, in 10^9 bytes",
            remedy="give GB of GPU memory",
        ),
    ]
    memory_gb_per_s: Annotated[float, _rate("GB/s", "the peak of the GPU's own memory")]
    tflops: Annotated[float, _rate("TFLOP/s", "dense bf16, without sparsity")]
    link_gb_per_s: Annotated[float | Curve, _link("host to device, pinned, one way", _LINK_REMEDY, _CURVE)]
    pageable_gb_per_s: Annotated[
        float, _link("the same from pageable memory", "give GB/s of a copy from pageable memory")
    ]
    memory_efficiency: Annotated[float, _SHARE]
    compute_efficiency: Annotated[float, _SHARE]
    link_latency_ns: Annotated[int, _ns("paid by every copy")]
    launch_host_ns: Annotated[int, _ns("that a launch keeps the host busy")]
    launch_latency_ns: Annotated[int, _ns("from enqueuing to the start of a kernel")]
    issue_copy_ns: Annotated[int, _ns("of the host for one asynchronous copy call")]
    gate_sync_ns: Annotated[int, _ns("from the router kernel's end until the host has the routing")]
    token_sync_ns: Annotated[int, _ns("the same for the sampled tokens")]
    decide_ns: Annotated[int, _ns("of a decision of effort 1")]
    link: Annotated[
        str | None,
        Rule(
            about="the widest link that the card takes, a file of conf/link",
            null="unknown, so that no other can be chosen",
        ),
    ] = None
    link_slowdown: Annotated[
        float, Rule(1, 1000, about="factor on a copy while kernels read memory", remedy="1: compute slows no copy")
    ] = 1.0
    host_memory_gb_per_s: Annotated[
        float | None, Rule(1e-3, 1e6, unit="GB/s", null="unknown", about="of the host's memory, read by all together")
    ] = None
    host_memory_efficiency: Annotated[
        float | None, Rule(1e-3, 1, null="unknown", about="share of it that experts on the host reach by themselves")
    ] = None
    host_tflops: Annotated[
        float | None, Rule(1e-6, 1e6, unit="TFLOP/s", null="unknown", about="that experts on the host reach")
    ] = None
    host_round_trip_ns: Annotated[
        int | None,
        Rule(0, 1_000_000_000, unit="ns", null="unknown", about="of activations to the host and results back"),
    ] = None
    host_unpack_gweights_per_s: Annotated[
        float | None,
        Rule(
            1e-3, 1e6, unit="G weights/s", null="hidden", about="that the host's cores unpack, where they are quantised"
        ),
    ] = None
    kernel_ns: Annotated[
        Mapping[str, KernelTable], Rule(extra="a mapping of models to tables", about="measured kernel times")
    ] = field(default_factory=dict, hash=False)
    sources: Annotated[Mapping[str, str], Rule(extra="a mapping of keys to texts", about="origin of each figure")] = (
        field(default_factory=dict, compare=False)
    )

    def __post_init__(self) -> None:
        check_fields(self, "hardware")
        self._check_link()
        self._check_kernels()
        check_sources("hardware", self)

    def _check_link(self) -> None:
        link = self.link_gb_per_s
        if not isinstance(link, tuple):
            if self.memory_gb_per_s < link < math.inf:
                raise ValueError(
                    f"hardware.link_gb_per_s={link} is above memory_gb_per_s={self.memory_gb_per_s}, into "
                    f"which it copies; {_LINK_REMEDY}"
                )
            return
        if not link:
            raise ValueError(f"hardware.link_gb_per_s=() has no points; {_LINK_REMEDY}")
        last_bytes = 0
        for num_bytes, gb_per_s in link:
            key = f"hardware.link_gb_per_s[{num_bytes} bytes]"
            check_range(key, gb_per_s, LEAST_GB_PER_S, _MOST_GB_PER_S, remedy=_LINK_REMEDY)
            if num_bytes <= last_bytes:
                raise ValueError(f"{key} follows {last_bytes} bytes; sizes must rise and be at least 1")
            last_bytes = num_bytes

    def _check_kernels(self) -> None:
        if not isinstance(self.kernel_ns, Mapping):
            raise ValueError(f"hardware.kernel_ns={self.kernel_ns!r} must map the name of a model to its tables")
        for model, table in self.kernel_ns.items():
            if not isinstance(model, str) or not model:
                raise ValueError(f"hardware.kernel_ns: {model!r} must be the name of a model")
            if not isinstance(table, KernelTable):
                raise ValueError(
                    f"hardware.kernel_ns.{model}={table!r} must be a KernelTable, as hardware_from_dict "
                    "makes of a mapping"
                )
            table.check(f"hardware.kernel_ns.{model}")


@dataclass(frozen=True)
class Stack:
    """The software that runs the model: time on the compute stream beside the kernels' own, and on the host.

    layer_overhead_ns: per MoE layer, before its attention (Python, small kernels, gaps between kernels).
    head_overhead_ns: per forward, before the head (sampling, bookkeeping between tokens).
    resident_tpot_ms: time between tokens with all experts in GPU memory; both overheads are then solved from it, in
    place of those that stand here (`sim.machine.solved`).
    kv_grid: the KV tokens that a layer reads in a decode forward are rounded up to a multiple of it, since kernels
    are captured for certain lengths (`kv_on_grid`); 0 = they are read as they are.
    The rest is the host's own time, 0 unless measured (`sim.machine.host_bound`).
    classify_ns: once a layer, from the routing being known to the first action. observe_ns: after every other
    wake (a load has landed, a chunk has ended, the tokens are read back). forward_ns: once a forward, before
    anything of it is launched or copied. group_ns: on the stream, by each launch itself before its kernels run; it
    counts as their running. copy_start_ns: from issuing a copy until an idle link begins with it.
    release_ns: in a forward of one token experts are launched before it is known which, behind the attention of their
    layer and again while some of the layer are missing; to tell those to begin takes the host so long, and
    release_latency_ns later their kernels start. 0: they are launched when they are known.
    """

    name: Annotated[str, Rule(about="of the stack")]
    layer_overhead_ns: Annotated[int, _ns("on the compute stream, before each MoE layer")]
    head_overhead_ns: Annotated[int, _ns("on the compute stream, before the head")]
    kv_grid: Annotated[
        int,
        Rule(
            0,
            1_000_000,
            unit="tokens",
            about="KV lengths are rounded up to a multiple of it",
            remedy="give whole tokens of KV; 0: no grid",
        ),
    ] = 0
    classify_ns: Annotated[int, _ns("of the host, from the routing to the first action")] = 0
    observe_ns: Annotated[int, _ns("of the host, after every other wake")] = 0
    forward_ns: Annotated[int, _ns("of the host, before each forward")] = 0
    group_ns: Annotated[int, _ns("on the stream, before the kernels of each launch")] = 0
    copy_start_ns: Annotated[int, _ns("from issuing a copy until an idle link begins with it")] = 0
    release_ns: Annotated[int, _ns("of the host, to let experts begin that are launched ahead")] = 0
    release_latency_ns: Annotated[int, _ns("from that to the start of their kernels")] = 0
    resident_tpot_ms: Annotated[
        float | None,
        Rule(
            0,
            1_000_000,
            above=True,
            unit="ms",
            null="the two overheads say it",
            about="between tokens with all experts in GPU memory, batch 1: both overheads are solved from it",
        ),
    ] = None
    sources: Annotated[Mapping[str, str], Rule(extra="a mapping of keys to texts", about="origin of each figure")] = (
        field(default_factory=dict, compare=False)
    )

    def __post_init__(self) -> None:
        check_fields(self, "stack")
        check_sources("stack", self)
        if self.release_latency_ns and not self.release_ns:
            raise ValueError(
                f"stack.release_latency_ns={self.release_latency_ns} follows a release, and release_ns is 0; give "
                "both, or neither"
            )
        if self.release_ns and self.resident_tpot_ms is not None:
            raise ValueError(
                f"stack.resident_tpot_ms={self.resident_tpot_ms:g} is solved for a stack whose release_ns is 0; give "
                "one of the two"
            )


HOST_COSTS = tuple(item.name for item in fields(Stack) if item.default == 0 and item.name.endswith("_ns"))
"""The figures of a stack that `sim.machine.host_bound` charges, 0 unless measured."""
HOST_COMPUTE = ("host_memory_gb_per_s", "host_memory_efficiency", "host_tflops", "host_round_trip_ns")
"""The figures of a machine that computing experts on its host takes."""
_OPTIONAL = {
    *("link", "kernel_ns", "kv_grid", "resident_tpot_ms", "host_unpack_gweights_per_s"),
    *(*HOST_COSTS, *HOST_COMPUTE),
}


def unsourced(spec: Hardware | Stack) -> list[str]:
    """Figures of `spec` without a line in `sources`, in the order of the fields; one left out needs none."""
    left_out = {name for name in _OPTIONAL if hasattr(spec, name) and not getattr(spec, name)}
    return [item.name for item in fields(spec) if item.name not in {"name", "sources", *left_out, *spec.sources}]


def hardware_from_dict(values: Mapping[str, object]) -> Hardware:
    """Hardware from the keys of a `conf/hardware` file; ValueError names an unknown, missing or wrong key."""
    link = values.get("link_gb_per_s")
    if isinstance(link, list | tuple):
        values = {**values, "link_gb_per_s": tuple(_point(point) for point in link)}
    kernels = values.get("kernel_ns")
    if isinstance(kernels, Mapping):
        tables = {model: kernel_table(f"hardware.kernel_ns.{model}", table) for model, table in kernels.items()}
        values = {**values, "kernel_ns": tables}
    return from_mapping(Hardware, values, "hardware")


def _point(point: object) -> tuple[int, float]:
    match point:
        case [int(num_bytes), int() | float() as gb_per_s] if not isinstance(num_bytes, bool):
            return num_bytes, float(gb_per_s)
    raise ValueError(f"hardware.link_gb_per_s: {point!r} must be a point [bytes, GB/s] with whole bytes")


def stack_from_dict(values: Mapping[str, object]) -> Stack:
    """A stack from the keys of a `conf/stack` file; ValueError names an unknown, missing or wrong key."""
    return from_mapping(Stack, values, "stack")


def kv_on_grid(kv_tokens: int, grid: int, most: int = sys.maxsize) -> int:
    """KV tokens that one layer reads in a decode forward of a stack with that `kv_grid`, all rows together.

    kv_tokens: those that it needs; of a windowed layer at most a window of each row. most: its bound, window * rows
    for a windowed layer. The simulation takes its times from this number, a replay captures its kernels for it.
    """
    return min(-(-kv_tokens // grid) * grid, most) if grid else kv_tokens
