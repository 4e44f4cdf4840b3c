"""`python -m sim.collect FOLDER`: gather the finished runs below a folder into one table (Parquet and CSV)."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from expertflow.keys import near_to, nearest
from sim.job.given import columns
from sim.job.output import write_text
from sim.job.results import REMEDY, check_columns, read_metrics
from traces.files import replace_file
from traces.flags import Parser
from traces.messages import PREFIX, fault, told


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
        rows.append({"run": f"{run} ({name})", **flatten(whole), **derived(whole)})
    return rows


def collect(folder: Path, beside: bool = False) -> pd.DataFrame:
    """One row a finished run (those with `DONE`), sorted by run folder; with `beside` also the runs beside it.
    ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a sweep")
    rows: list[tuple[Path, dict[str, Any]]] = []
    runs: list[int] = []
    for done in sorted(folder.rglob("DONE")):
        path = done.parent / "metrics.json"
        run = str(done.parent.relative_to(folder))
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
    return pd.DataFrame([row for _, row in rows])


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


def markdown(table: pd.DataFrame, value: str) -> str:
    """A Markdown table of one column: a row a policy, a column a (hardware with its link, stack, residency), the model
    where it differs, and what else the runs were given that differs."""
    if value not in table.columns:
        raise ValueError(
            f"--markdown={value} is no column{near_to(value, table.columns)}; "
            f"there are: {nearest(value, list(table.columns))}"
        )
    if table[value].isna().all():
        why = " (max_tokens ends inside the prompt?)" if value == "tpot_ms" else ""
        raise ValueError(f"--markdown={value}: {value} is empty in every run{why}; take another column")
    if not is_numeric_dtype(table[value]):
        raise ValueError(f"--markdown={value} is no column of figures; take one such as tpot_ms")
    # The model by its own name, which also a trace or a file may have given.
    told = [*(["model"] if "model" in table.columns else []), *_given(table)]
    swept = [name for name in dict.fromkeys(told) if name != "link" and table[name].nunique(dropna=False) > 1]
    table = table.assign(**{name: table[name].map(lambda one: "–" if pd.isna(one) else str(one)) for name in swept})
    table = table.assign(hardware=[_place(row) for _, row in table.iterrows()])
    keys = ["hardware", "stack", "residency", *swept]
    repeated = table[table.duplicated([*keys, "policy"])]
    if len(repeated):
        raise ValueError(f"two runs of {repeated['policy'].iloc[0]} at one place; --markdown takes one of each")
    wide = table.pivot(index="policy", columns=keys, values=value).reindex(table["policy"].unique())
    places = [tuple(column) for column in wide.columns.to_list()]
    titles = [
        " ".join([hardware, stack, f"{residency:.0%}", *map("{}={}".format, swept, more)])
        for hardware, stack, residency, *more in places
    ]
    lines = ["| policy | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for policy, row in wide.iterrows():
        lines.append(f"| {policy} | " + " | ".join("–" if pd.isna(x) else f"{x:.3f}" for x in row) + " |")
    return "\n".join(lines)


def _place(row: pd.Series[Any]) -> str:
    """The hardware of a run, with the link that was chosen for it and, where that is more, the one asked for."""
    link, asked = row.get("link_preset.name"), row.get("link_preset.asked")
    if not isinstance(link, str):
        return str(row["hardware"])
    return f"{row['hardware']} {link}" + ("" if asked == link else f" of {asked}")


def _given(table: pd.DataFrame) -> list[str]:
    """The columns of what command lines gave: those between the name of the run and the version of its metrics."""
    names = list(table.columns)
    return names[names.index("run") + 1 : names.index("schema")] if "schema" in names else []


def write_table(table: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """`name`.parquet and `name`.csv in `folder`, each whole or not at all."""
    csv, parquet = folder / f"{name}.csv", folder / f"{name}.parquet"
    write_text(csv, table.to_csv(index=False, lineterminator="\n"))
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    replace_file(parquet, buffer.getvalue(), sync=False)
    return [parquet, csv]


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
    print(f"{len(table)} runs: {', '.join(str(path) for path in paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
