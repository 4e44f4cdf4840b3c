"""How local routing is at each setting: the shares of an expert's score that last, and for how long.

The shipped families were fitted by `python -m traces.assumed fit`; the file says to what.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import lru_cache
from math import exp2
from pathlib import Path
from typing import Any

import numpy as np

from traces.assumed.latent import correlation, overlap
from traces.messages import fault, plain
from traces.reading import read_table

SETTINGS = ("low", "usual", "high")
USUAL = "usual"
FAMILIES = Path(__file__).resolve().parents[1] / "data" / "assumed.families.json"
FORMAT = "expertflow-assumed-routing"
SLOW, FAST = 24.0, 1.0
"""Half-lives, in tokens: of what a passage is about, and of what carries over to the next token."""
_REMEDY = "make it anew: python -m traces.assumed fit"


@dataclass(frozen=True)
class Family:
    """Shares of the variance of an expert's score, and its correlation from layer to layer.

    popularity: the same for every token. request: for one request. slow, fast: forgotten by half in `SLOW` and `FAST`
    tokens. fresh: new with each token. Together 1. depth: correlation of what is not popularity with that of one expert
    of the layer before.
    """

    popularity: float
    request: float
    slow: float
    fast: float
    fresh: float
    depth: float

    @property
    def next_token(self) -> float:
        """Correlation of an expert's score with its own one token later, in the same request."""
        return self.popularity + self.request + self.slow * exp2(-1 / SLOW) + self.fast * exp2(-1 / FAST)


def family_of(locality: str, reuse: float | None, share: float) -> Family:
    """The family of a setting, or the one between the settings whose tokens choose `reuse` of their experts again that
    the token before has chosen. share: top_k / num_experts. ValueError where no family between the settings does."""
    families = shipped_families()
    if reuse is None:
        return families[locality]
    settings = [families[name] for name in SETTINGS]
    known = [setting.next_token for setting in settings]
    if not known[0] <= (found := float(correlation(reuse, share))) <= known[-1]:
        low, high = (float(overlap(one, share)) for one in (known[0], known[-1]))
        raise ValueError(
            f"trace.reuse={plain(f'{reuse:g}')} is not between {low:.2f} and {high:.2f}, the settings low and high of "
            "trace.locality for this topology; choose one of them, or name a recording: trace.path=FILE"
        )
    values = [[getattr(setting, item.name) for setting in settings] for item in fields(Family)]
    return Family(*(float(np.interp(found, known, one)) for one in values))


def load_families(path: Path = FAMILIES) -> dict[str, Family]:
    """The family of each setting. TraceError on a file that is none."""
    table = read_table(path, _REMEDY)
    found = table.get("settings")
    if table.get("format") != FORMAT or not isinstance(found, dict) or set(found) != set(SETTINGS):
        raise fault(path, "settings", f"must be those of {FORMAT}: {', '.join(SETTINGS)}", _REMEDY)
    return {name: _family(path, name, found[name]) for name in SETTINGS}


def _family(path: Path, name: str, given: Any) -> Family:
    names = [item.name for item in fields(Family)]
    values = [given.get(key) for key in names] if isinstance(given, dict) else []
    numbers = [float(value) for value in values if isinstance(value, int | float) and 0 <= value <= 1]
    if len(numbers) < len(names) or abs(sum(numbers[:-1]) - 1) > 1e-6 or numbers[-1] == 1:
        raise fault(path, f"settings.{name}", f"must give {', '.join(names)}, shares that add up to 1", _REMEDY)
    return Family(*numbers)


@lru_cache(maxsize=1)
def shipped_families() -> dict[str, Family]:
    """Those that come with the package."""
    return load_families()


@lru_cache(maxsize=1)
def families_sha256() -> str:
    """Hash of the shipped families, in hex: what is assumed is another when they change."""
    return hashlib.sha256(FAMILIES.read_bytes()).hexdigest()
