"""Two timelines in one file: what was simulated above what was measured, for Perfetto."""

from __future__ import annotations

import json
from pathlib import Path

from sim.job.output import write_text
from sim.views.timeline import Timeline


def write_overlay(path: Path, measured: Timeline, predicted: Timeline) -> None:
    """Write both as processes of one Chrome trace, atomically; each has its own clock, both begin at 0."""
    lines = []
    for number, timeline in ((1, predicted), (2, measured)):
        for event in timeline.events():
            # Every event of a timeline belongs to process 1.
            parsed = json.loads(event)
            parsed["pid"] = number
            lines.append(json.dumps(parsed, separators=(",", ":")))
        order = {"ph": "M", "pid": number, "name": "process_sort_index", "args": {"sort_index": number}}
        lines.append(json.dumps(order, separators=(",", ":")))
    write_text(path, '{"displayTimeUnit":"ns","traceEvents":[\n' + ",\n".join(lines) + "\n]}\n")
