"""What experts lie on below host memory: a disk, as latency, bandwidth by request size and queue depth.

Data only: `sim.specs.disk` turns it into times. Files of `conf/storage` hold one each, every figure with its
origin in `sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from expertflow.host_memory import EVICTIONS, LRU
from expertflow.keys import Rule, check_fields, check_range, from_mapping
from sim.specs.hardware import Curve, check_sources

_LEAST_GB_PER_S = 1e-4
_MOST_GB_PER_S = 1e4
_REMEDY = "give GB/s of reads"


@dataclass(frozen=True)
class Storage:
    """One disk, read by one process.

    latency_ns: from a request until its first byte; those of requests that are under way together overlap. gb_per_s:
    what reads reach, without the latency: one figure, or a curve by request size. A request is a chunk of an expert
    (`chunk_mib`). queue_depth: requests under way at once. issue_read_ns: one request keeps the host busy.
    eviction: who leaves host memory (`expertflow.host_memory`).
    """

    name: Annotated[str, Rule(about="of the storage")]
    latency_ns: Annotated[int, Rule(0, 1_000_000_000, unit="ns", about="of a request until its first byte")]
    gb_per_s: Annotated[
        float | Curve,
        Rule(
            _LEAST_GB_PER_S,
            _MOST_GB_PER_S,
            unit="GB/s",
            about="of reads, without the latency",
            extra="a list of [bytes, GB/s]",
            remedy=_REMEDY,
        ),
    ]
    queue_depth: Annotated[int, Rule(1, 1024, unit="requests", about="under way at once, each a chunk of an expert")]
    issue_read_ns: Annotated[int, Rule(0, 1_000_000_000, unit="ns", about="of the host for one request")]
    eviction: Annotated[str, Rule(choices=EVICTIONS, about="who leaves host memory")] = LRU
    sources: Annotated[Mapping[str, str], Rule(extra="a mapping of keys to texts", about="origin of each figure")] = (
        field(default_factory=dict, compare=False)
    )

    def __post_init__(self) -> None:
        check_fields(self, "storage")
        check_sources("storage", self)
        if isinstance(self.gb_per_s, tuple):
            _check_curve(self.gb_per_s)

    @property
    def curve(self) -> Curve:
        """GB/s by request size; one point where it is one figure."""
        return self.gb_per_s if isinstance(self.gb_per_s, tuple) else ((1, self.gb_per_s),)


def _check_curve(curve: Curve) -> None:
    if not curve:
        raise ValueError(f"storage.gb_per_s=[] has no points; {_REMEDY}")
    last_bytes = 0
    for num_bytes, gb_per_s in curve:
        key = f"storage.gb_per_s[{num_bytes} bytes]"
        check_range(key, gb_per_s, _LEAST_GB_PER_S, _MOST_GB_PER_S, remedy=_REMEDY)
        if not last_bytes < num_bytes <= 2**40:
            raise ValueError(f"{key} follows {last_bytes} bytes; sizes must rise, from 1 to 2^40")
        last_bytes = num_bytes


def storage_from_dict(values: Mapping[str, object]) -> Storage:
    """A disk from the keys of a `conf/storage` file; ValueError names an unknown, missing or wrong key."""
    rate = values.get("gb_per_s")
    if isinstance(rate, list | tuple):
        values = {**values, "gb_per_s": tuple(_point(point) for point in rate)}
    return from_mapping(Storage, values, "storage")


def _point(point: object) -> tuple[int, float]:
    match point:
        case [int(num_bytes), int() | float() as gb_per_s] if not isinstance(num_bytes, bool | float):
            return num_bytes, gb_per_s
    raise ValueError(f"storage.gb_per_s: {point!r:.60} must be a point [bytes, GB/s] with whole bytes")
