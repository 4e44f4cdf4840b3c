"""Links that a host may give a card: the peak by generation and lanes, and the share of it that copies reach.

Data only. Files of `conf/link` hold one each; `sim.job.link` puts one in the place of a hardware profile's figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from expertflow.keys import Rule, check_fields, from_mapping
from sim.specs.hardware import check_sources

PCIE = "pcie"
C2C = "c2c"
PROFILE = "profile"
"""The name of the file that leaves the link as the hardware profile has it."""
PCIE_GT_PER_S = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0}
"""Transfers per second and lane of each generation, in 10^9."""


def pcie_peak_gb_per_s(generation: int, lanes: int) -> float:
    """GB/s in one direction: a bit a transfer and lane, coded as 8 bits in 10 (generations 1, 2) or 128 in 130."""
    return PCIE_GT_PER_S[generation] * lanes * (0.8 if generation < 3 else 128 / 130) / 8


@dataclass(frozen=True)
class LinkPreset:
    """One kind of link between host and GPU.

    Card and host agree on the lower generation and on the fewer lanes of the two, if they are of one family.
    peak_gb_per_s: in one direction. share: of it that pinned copies reach, without `hardware.link_latency_ns`.
    """

    name: Annotated[str, Rule(about="of the link")]
    family: Annotated[str, Rule(choices=(PCIE, C2C), about="card and host must be of one")]
    generation: Annotated[int, Rule(1, 9, about="the lower one of card and host counts")]
    lanes: Annotated[int, Rule(1, 64, unit="lanes", about="the fewer of card and host count")]
    peak_gb_per_s: Annotated[float, Rule(1e-3, 1e6, unit="GB/s", about="in one direction")]
    share: Annotated[float, Rule(0.01, 1, about="of the peak that pinned copies reach")]
    sources: Annotated[Mapping[str, str], Rule(extra="a mapping of keys to texts", about="origin of each figure")] = (
        field(default_factory=dict, compare=False)
    )

    def __post_init__(self) -> None:
        check_fields(self, "link")
        check_sources("link", self)

    @property
    def gb_per_s(self) -> float:
        """What pinned copies reach."""
        return round(self.peak_gb_per_s * self.share, 3)

    def exceeds(self, card: LinkPreset) -> bool:
        """Whether `card` cannot use all of this link."""
        return self.generation > card.generation or self.lanes > card.lanes


def link_from_dict(values: Mapping[str, object]) -> LinkPreset:
    """A link from the keys of a `conf/link` file; ValueError names an unknown, missing or wrong key."""
    return from_mapping(LinkPreset, values, "link")
