"""Importer of llama.cpp's MoE traces in CSV: a row for each expert that a token chose.

Columns `layer,expert`, as llama.cpp writes them: a layer's rows of one forward are its tokens', `top_k=` each; a layer
number that falls begins the next forward; a forward of several tokens is a prompt, one of a single token decodes, and a
prompt after a decoded token begins a request. A last layer with fewer tokens than the others has those of the last
ones, for the engine computes only these: `incomplete=drop` (default) counts the others as context, `incomplete=repeat`
fills them with the next token's choice.

Forks write `phase,token,layer,rank,expert` (and sometimes `weight`): there the token is told, and `rank` 0 is best. A
token number that does not rise begins the next request.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from traces.container import fault
from traces.importers.assemble import Source, write_choices
from traces.importers.columns import Columns
from traces.importers.common import UNKNOWN_LICENSE, ImportReport, files_of
from traces.importers.rows import RowFile
from traces.importers.table import Options, read_table

_FIELDS = ("phase", "token", "layer", "rank")


def import_llama_csv(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    *,
    top_k: int = 0,
    model: str = "",
    num_experts: int = 0,
    incomplete: str = "drop",
    license: str = UNKNOWN_LICENSE,
) -> ImportReport:
    """Write the CSV file, or a folder of them, as one trace. TraceError names file and line."""
    files = [RowFile(path, "csv") for path in files_of(source, ".csv")]
    there = files[0].columns()
    if "layer" not in there or "expert" not in there:
        problem = f"has the columns {', '.join(there)[:120]}"
        raise fault(files[0].path, "line 1", problem, "give layer,expert or phase,token,layer,rank,expert")
    named = {name: name for name in _FIELDS if name in there}
    weight = ("weight",) if "weight" in there else ()
    columns = Columns(**named, expert=("expert",), weight=weight)
    options = Options(top_k, positions=bool(columns.token))
    choices, notes = read_table(files, columns, options, progress)
    what = Source(files[0].path, "llama.cpp MoE trace CSV", license, model, num_experts, incomplete, notes=tuple(notes))
    return write_choices(choices, what, output)
