"""`python -m sim.collect FOLDER`: gather the finished runs below a folder into one table (Parquet and CSV)."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sim.job.given import columns
from sim.job.markdown_table import BESIDE, in_order, markdown
from sim.job.output import write_text
from sim.job.results import REMEDY, check_columns, read_metrics
from traces.files import replace_file
from traces.flags import Parser
from traces.messages import PREFIX, fault, told
from traces.reading import read_table

__all__ = ["collect", "derived", "flatten", "frame_of", "markdown", "row_of", "write_table"]


def flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics as one row: `prefetch.useful` and so on; the runs beside it are left out."""
    row: dict[str, Any] = {}
    for key, value in metrics.items():
        if key == "compare":
            continue
        found = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        if twice := row.keys() & found.keys():
            raise ValueError(f"{min(twice)} stands twice among the metrics, as a key and as a table")
        row |= found
    return row


def derived(metrics: dict[str, Any]) -> dict[str, Any]:
    """The columns people plot: per token in ms, and rates."""
    tokens = max(metrics["num_tokens"], 1)
    accesses = max(metrics["num_accesses"], 1)
    row = {
        "residency": metrics["capacity"]["residency"],
        "tpot_ms": metrics["tpot_ms"]["mean"],
        "ms_per_token": metrics["elapsed_ns"] / tokens / 1e6,
        "stall_ms_per_token": metrics["stall_ns"] / tokens / 1e6,
        "late_ms_per_token": metrics["late_stall_ns"] / tokens / 1e6,
        "miss_ms_per_token": metrics["miss_stall_ns"] / tokens / 1e6,
        "hit_rate": metrics["num_hits"] / accesses,
        "link_utilisation": metrics["link"]["utilisation"],
    }
    if "host_stall_ns" in metrics:
        row["host_ms_per_token"] = metrics["host_stall_ns"] / tokens / 1e6
    if "storage_stall_ns" in metrics:
        row["storage_ms_per_token"] = metrics["storage_stall_ns"] / tokens / 1e6
    bounds = metrics.get("bounds")
    if bounds and bounds["floor_ns"] is not None:
        row["floor_ms_per_token"] = bounds["floor_ns"] / tokens / 1e6
    return row


def row_of(metrics: dict[str, Any], run: str) -> dict[str, Any]:
    """The row of a run. run: its name."""
    return {"run": run, **flatten(metrics), **derived(metrics)}


def _beside(metrics: dict[str, Any], run: str) -> list[dict[str, Any]]:
    """The runs of `compare=full` as rows of their own: same machine, same workload, another policy."""
    rows = []
    for name, other in (metrics["compare"] or {}).items():
        whole = {**metrics, **other, "policy": name, "bounds": None, "uses_future": name.startswith("clairvoyant")}
        rows.append({"run": f"{run} ({name})", **flatten(whole), **derived(whole), BESIDE: metrics["policy"]})
    return rows


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table in which whole numbers stay whole where some rows have none."""
    table = pd.DataFrame(rows)
    for name in table.columns:
        if not table[name].isna().any():
            continue
        held = [row[name] for row in rows if row.get(name) is not None]
        if held and all(type(one) is int for one in held):
            table[name] = pd.array([row.get(name) for row in rows], dtype="Int64")
    return table


def finished_runs(folder: Path) -> tuple[list[Path], int]:
    """The folders of finished runs below `folder` (those with `DONE`), by the numbers in their names; and how many
    with a `DONE` are no run's, as that of a study."""
    found = sorted((done.parent for done in folder.rglob("DONE")), key=lambda path: in_order(str(path)))
    runs = [path for path in found if (path / "metrics.json").exists() or _is_run(path / "DONE")]
    return runs, len(found) - len(runs)


def _is_run(done: Path) -> bool:
    """Whether a `DONE` is that of a run, which says what decided it."""
    try:
        return "asked" in read_table(done)
    except ValueError:
        return False


def collect(folder: Path, beside: bool = False) -> pd.DataFrame:
    """One row a finished run, sorted by run folder, numbers by their value; with `beside` also the runs beside it.
    ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a sweep")
    rows: list[tuple[Path, dict[str, Any]]] = []
    runs: list[int] = []
    for place in finished_runs(folder)[0]:
        path = place / "metrics.json"
        run = str(place.relative_to(folder))
        metrics = read_metrics(path)
        try:
            made = [row_of(metrics, run)]
            if beside:
                made += _beside(metrics, run)
        except ValueError as error:
            raise fault(path, "metrics", str(error), REMEDY) from None
        runs.append(len(made))
        rows += [(path, row) for row in made]
    if not rows:
        raise ValueError(f"{folder}: no finished run below it (none has a DONE file); run a sweep first")
    rows = _with_given_keys(rows, runs)
    check_columns(rows)
    return frame_of([row for _, row in rows])


def _with_given_keys(rows: list[tuple[Path, dict[str, Any]]], runs: list[int]) -> list[tuple[Path, dict[str, Any]]]:
    """The rows with what their command lines gave, behind the name of the run. runs: how many rows each run has: its
    own, and those of the runs beside it, whose policy is another."""
    firsts = [sum(runs[:number]) for number in range(len(runs))]
    taken = {name for _, row in rows for name in row}
    given = columns([rows[first][0].parent for first in firsts], taken)
    found = []
    for first, number, keys in zip(firsts, runs, given, strict=True):
        for place, (path, row) in enumerate(rows[first : first + number]):
            own = {key: None if place and key.startswith(("policy.", "policy/")) else one for key, one in keys.items()}
            found.append((path, {"run": row["run"], **own, **row}))
    return found


def write_table(table: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """`name`.parquet and `name`.csv in `folder`, each whole or not at all."""
    csv, parquet = folder / f"{name}.csv", folder / f"{name}.parquet"
    switches = {name: table[name].map(_switch) for name in table.columns if table[name].dtype in (bool, object)}
    write_text(csv, table.assign(**switches).to_csv(index=False, lineterminator="\n"))
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    replace_file(parquet, buffer.getvalue(), sync=False)
    return [parquet, csv]


def _switch(value: Any) -> Any:
    """A truth value as the command line has it; anything else as it is."""
    return str(value).lower() if isinstance(value, bool | np.bool_) else value


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = Parser(
        prog="python -m sim.collect",
        description=__doc__,
        epilog="example: python -m sim -m +hardware=a100 +policy=lru,adaptive residency=0.25,0.5 hydra.sweep.dir=sweep "
        "compare=none && python -m sim.collect sweep",
    )
    parser.add_argument("folder", type=Path, help="the folder of a sweep (hydra.sweep.dir) or of several")
    parser.add_argument("--name", default="table", help="file name without suffix (default: table)")
    parser.add_argument("--beside", action="store_true", help="also a row for each run beside one (compare=full)")
    parser.add_argument("--markdown", metavar="COLUMN", help="also print this column as a Markdown table")
    args = parser.parse_args(words)
    try:
        table = collect(args.folder, args.beside)
        paths = write_table(table, args.folder, args.name)
        if args.markdown:
            print(markdown(table, args.markdown))
    except (ValueError, OSError, MemoryError) as error:
        print(f"{PREFIX}{told(error)}", file=sys.stderr)
        return 2
    others = finished_runs(args.folder)[1]
    left_out = f"; left out: {others} with a DONE that {'is' if others == 1 else 'are'} no run's" if others else ""
    print(f"{len(table)} runs: {', '.join(str(path) for path in paths)}{left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
