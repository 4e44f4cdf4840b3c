"""`link=NAME`: the link that the host gives the card, in place of that of its hardware profile.

Card and host run at the lower generation and the fewer lanes of the two, so a link that is more than the card takes is
cut to that, and the result says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertflow.keys import nearest, shown
from sim.job.compose import composed_file
from sim.paths import config_files
from sim.specs.links import PCIE, PROFILE, LinkPreset, link_from_dict

_WORD = re.compile(r"[+~]*([\w./]+)(?:@[\w.:@/]*)?=(.*)", re.DOTALL)
_SET = ("hardware.link_gb_per_s", "hardware.pageable_gb_per_s")
"""Keys that a link sets."""
_ASSUMPTION = "assumption: "


@dataclass(frozen=True)
class Chosen:
    """The link that copies go over, and the one that was asked for, which may be more than the card takes."""

    link: LinkPreset
    asked: str

    @property
    def source(self) -> str:
        """Origin of the rate, as a hardware profile says it: an assumption is called so first."""
        link = self.link
        cut = "" if self.asked == link.name else f" (the card takes no more of {self.asked})"
        told = link.sources.get("share", "as given")
        assumed = _ASSUMPTION if told.startswith(_ASSUMPTION) else ""
        figures = f"link={link.name}{cut}, {link.share:g} of {link.peak_gb_per_s:g} GB/s"
        return f"{assumed}{figures}: {told.removeprefix(_ASSUMPTION)}"

    def metrics(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"name": self.link.name, "asked": self.asked, "gb_per_s": self.link.gb_per_s, "source": self.source}


def check_link_words(words: Sequence[str]) -> None:
    """ValueError where the words of a command choose a link and give one of the figures that it sets."""
    given = {match[1]: match[2].strip() for match in map(_WORD.match, words) if match}
    name = given.get("link", PROFILE)
    for key in _SET:
        if name != PROFILE and key in given:
            raise ValueError(
                f"link={name[:60]} and {key}={given[key][:60]} both say how fast copies are; leave one out "
                "(link.share=SHARE changes what a link reaches of its peak)"
            )


def with_link(plain: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with the figures of the chosen link among those of its hardware. Twice is as once."""
    chosen = chosen_link(plain)
    hardware = plain["hardware"]
    if chosen is None or "link_gb_per_s" not in hardware:
        return plain
    rate = chosen.link.gb_per_s
    changed = {**hardware, "link_gb_per_s": rate}
    sources = {**hardware.get("sources", {}), "link_gb_per_s": chosen.source}
    pageable = hardware.get("pageable_gb_per_s")
    if isinstance(pageable, int | float) and pageable > rate:
        changed["pageable_gb_per_s"] = rate
        sources["pageable_gb_per_s"] = f"not above link_gb_per_s, which link={chosen.link.name} says"
    return {**plain, "hardware": {**changed, "sources": sources}}


def chosen_link(plain: Mapping[str, Any]) -> Chosen | None:
    """The link of a configuration; None where it is the hardware profile's.

    ValueError where the card is not known to take any of it, or takes another kind.
    """
    told, hardware = plain["link"], plain["hardware"]
    if told.get("name") == PROFILE:
        extra = sorted(set(told) - {"name"})
        if extra:
            raise ValueError(f"link.{extra[0]} means nothing with link={PROFILE}; choose a link to change its figures")
        return None
    asked = link_from_dict(told)
    if "link_gb_per_s" not in hardware:
        return Chosen(asked, asked.name)
    card = _card(hardware, asked.name)
    if card.family != asked.family:
        raise ValueError(
            f"link={asked.name}: hardware={shown(hardware.get('name'))} is joined by {card.name}, which is of another "
            f"kind; choose link={PROFILE}"
        )
    return Chosen(_agreed(asked, card, hardware) if asked.exceeds(card) else asked, asked.name)


def _card(hardware: Mapping[str, Any], asked: str) -> LinkPreset:
    """The widest link that the card takes."""
    name = hardware.get("link")
    if name is None:
        raise ValueError(
            f"link={asked}: hardware={shown(hardware.get('name'))} does not say which link its card takes; add "
            "+hardware.link=NAME, such as pcie4x16"
        )
    return _of_file(str(name), "hardware.link")


def _agreed(asked: LinkPreset, card: LinkPreset, hardware: Mapping[str, Any]) -> LinkPreset:
    """What a link that is more than the card takes comes to."""
    if asked.family != PCIE:
        return card
    name = f"pcie{min(asked.generation, card.generation)}x{min(asked.lanes, card.lanes)}"
    files = config_files("link")
    if asked.name not in files or asked != link_from_dict(composed_file("link", asked.name)):
        raise ValueError(
            f"link={asked.name} is more than hardware={shown(hardware.get('name'))} takes ({card.name}), so that its "
            f"changed figures do not count; change those of link={name}"
        )
    return _of_file(name, f"link={asked.name} on {card.name}")


def _of_file(name: str, key: str) -> LinkPreset:
    files = config_files("link")
    files.pop(PROFILE, None)
    if name not in files:
        raise ValueError(f"{key}: {shown(name)} is no link; choose one of: {nearest(name, sorted(files))}")
    return link_from_dict(composed_file("link", name))
