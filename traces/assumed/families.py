"""How local routing is at each setting: the shares of an expert's score that last, and for how long.

The shipped families were fitted by `python -m traces.assumed fit`; the file says to what.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from traces.messages import fault
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
