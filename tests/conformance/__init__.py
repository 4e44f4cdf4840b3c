"""Are the counts those of references that share no code with us? Here: the figures of such references.

`contract.json`: hits, misses and evictions of the event-atomic cache contract on tiny traces, and what near-miss
semantics would give. `statistics.json`: the statistics of recorded traces, counted by `tests.conformance.figures`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CONTRACT: dict[str, Any] = json.loads((FOLDER / "contract.json").read_text(encoding="utf-8"))
STATISTICS_FILE = FOLDER / "statistics.json"


def statistics_of(name: str) -> dict[str, Any]:
    """Figures of the trace whose file is called `name`; KeyError where nobody counted them."""
    found: dict[str, Any] = json.loads(STATISTICS_FILE.read_text(encoding="utf-8"))[name]
    return found
