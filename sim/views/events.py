"""A run as a table of accesses: one Parquet row per expert that a layer of a forward demanded.

Written in row groups as the run goes, so memory does not grow with it. Knows nothing of machines or policies.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from expertflow.forward import DECODE, PREFILL, Forward
from expertflow.observer import Observer
from traces.files import writing
from traces.processes.whole import Unfinished

PHASES = (DECODE, PREFILL)
CLASSES = ("hit", "late", "miss", "host")
HIT, LATE, MISS, HOST = range(4)
NOT_COPIED = -1

_WORD = pa.dictionary(pa.int8(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("forward", pa.int32(), nullable=False),
        pa.field("phase", _WORD, nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("expert", pa.int32(), nullable=False),
        pa.field("class", _WORD, nullable=False),
        pa.field("known_ns", pa.int64(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("stall_ns", pa.int64(), nullable=False),
        pa.field("landed_ns", pa.int64(), nullable=True),
    ]
)

READ_SCHEMA = SCHEMA.append(pa.field("read_ns", pa.int64(), nullable=True))
"""Of a run whose experts lie on storage."""


class _Columns:
    """Rows not yet written, column by column. has_reads: with the last column of `READ_SCHEMA`."""

    def __init__(self, has_reads: bool = False) -> None:
        self.has_reads = has_reads
        self.read_ns = array("q")
        self.forward = array("i")
        self.phase = array("b")
        self.layer = array("i")
        self.expert = array("i")
        self.outcome = array("b")
        self.known_ns = array("q")
        self.tokens = array("i")
        self.stall_ns = array("q")
        self.landed_ns = array("q")

    def table(self) -> pa.Table:
        landed = np.array(self.landed_ns, dtype=np.int64)
        columns = [
            pa.array(np.array(self.forward, dtype=np.int32)),
            _words(np.array(self.phase, dtype=np.int8), PHASES),
            pa.array(np.array(self.layer, dtype=np.int32)),
            pa.array(np.array(self.expert, dtype=np.int32)),
            _words(np.array(self.outcome, dtype=np.int8), CLASSES),
            pa.array(np.array(self.known_ns, dtype=np.int64)),
            pa.array(np.array(self.tokens, dtype=np.int32)),
            pa.array(np.array(self.stall_ns, dtype=np.int64)),
            pa.array(landed, mask=landed == NOT_COPIED),
        ]
        if not self.has_reads:
            return pa.Table.from_arrays(columns, schema=SCHEMA)
        read = np.array(self.read_ns, dtype=np.int64)
        return pa.Table.from_arrays([*columns, pa.array(read, mask=read == NOT_COPIED)], schema=READ_SCHEMA)


def _words(indices: npt.NDArray[np.int8], words: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(list(words)))


class Events(Observer):
    """Keeps every access in memory, 34 bytes each: the rows of `EventTable`. num_experts: of a layer. has_reads: of a
    run whose experts lie on storage, 42 bytes each."""

    def __init__(self, num_experts: int, has_reads: bool = False) -> None:
        if num_experts < 1:
            raise ValueError(f"{type(self).__name__} num_experts={num_experts}: must be 1 or more")
        self.num_experts = num_experts
        self._columns = _Columns(has_reads)
        self._read_ns: dict[int, int] = {}
        """End of the last read of each key since it was last demanded."""
        self._open: dict[int, int] = {}
        """Row of each key of the layer that is running: its stall and its landing are yet to come."""

    def demanded(
        self,
        forward: Forward,
        layer: int,
        now_ns: int,
        hits: Sequence[int],
        late: Sequence[int],
        missing: Sequence[int],
    ) -> None:
        self._settle()
        columns, first_key = self._columns, layer * self.num_experts
        phase = PHASES.index(forward.phase)
        counts = None if forward.counts is None else forward.counts[layer]
        outcomes = dict.fromkeys(hits, HIT) | dict.fromkeys(late, LATE) | dict.fromkeys(missing, MISS)
        for key in forward.demands[layer]:
            self._open[key] = len(columns.forward)
            columns.forward.append(forward.index)
            columns.phase.append(phase)
            columns.layer.append(layer)
            columns.expert.append(key - first_key)
            columns.outcome.append(outcomes.get(key, HOST))
            columns.known_ns.append(now_ns)
            columns.tokens.append(1 if counts is None else counts[key])
            columns.stall_ns.append(0)
            columns.landed_ns.append(NOT_COPIED)
            if columns.has_reads:
                columns.read_ns.append(self._read_ns.pop(key, NOT_COPIED))

    def was_read(self, key: int, chunk: int, start_ns: int, end_ns: int) -> None:
        row = self._open.get(key)
        if row is None:
            self._read_ns[key] = end_ns
        elif self._columns.has_reads:
            self._columns.read_ns[row] = end_ns

    def stalled(self, start_ns: int, end_ns: int, key: int, kind: int) -> None:
        row = self._open.get(key)
        if row is None:
            raise AssertionError(f"a stall on expert key {key}, which the running layer does not demand")
        self._columns.stall_ns[row] += end_ns - start_ns

    def copied(self, key: int, chunk: int, cause: int, start_ns: int, end_ns: int) -> None:
        row = self._open.get(key)
        if row is not None and self._columns.outcome[row] in (LATE, MISS):
            # The last chunk to be reported is the one that completes the expert.
            self._columns.landed_ns[row] = end_ns

    def computed_on_host(self, key: int, start_ns: int, end_ns: int) -> None:
        self._columns.landed_ns[self._open[key]] = end_ns

    def end_forward(self, forward: Forward, now_ns: int) -> None:
        self._settle()

    def _settle(self) -> None:
        """Nothing more is to come for the rows of the layer that has run."""
        self._open.clear()

    def frame(self) -> pd.DataFrame:
        """The rows kept: phase and class as categories, landed_ns as whole numbers, or missing for a hit."""
        return _frame(self._columns.table())


class EventTable(Events):
    """Writes `path` (Parquet), one row per access, a layer's rows in touch order, warm-up included.

    forward, phase (decode, prefill), layer, expert, class (hit, late, miss, host: computed on the host); known_ns: when
    the routing became known; tokens routed to the expert; stall_ns: how long the compute stream waited for it;
    landed_ns: device end of the copy that was waited for, of an expert on the host the end of its computation, null for
    a hit. The stall column sums to the run's stall. has_reads: a last column read_ns, end of the last read of the
    expert from storage since it was demanded before, null where there was none.

    Until `close` the rows stand in a temporary file beside `path`; `abort` removes it. Memory holds
    `rows_per_group` rows, 34 bytes each, and the rows of one layer.
    """

    def __init__(
        self, path: str | Path, num_experts: int, rows_per_group: int = 1 << 16, has_reads: bool = False
    ) -> None:
        if num_experts < 1 or rows_per_group < 1:
            raise ValueError(
                f"EventTable num_experts={num_experts}, rows_per_group={rows_per_group}: both must be 1 or more"
            )
        super().__init__(num_experts, has_reads)
        self.path = Path(path)
        self.rows_per_group = rows_per_group
        with writing(self.path):
            self._unfinished = Unfinished(self.path)
            schema = READ_SCHEMA if has_reads else SCHEMA
            self._writer: pq.ParquetWriter | None = pq.ParquetWriter(self._unfinished.path, schema, compression="zstd")

    def _settle(self) -> None:
        """Nothing more is to come for the rows held: write them if they fill a group."""
        self._open.clear()
        if len(self._columns.forward) >= self.rows_per_group:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            raise AssertionError(f"{self.path} is closed")
        with writing(self.path):
            self._writer.write_table(self._columns.table())
        self._columns = _Columns(self._columns.has_reads)

    def close(self) -> None:
        """Write the rest and give the file its name."""
        self._open.clear()
        if len(self._columns.forward):
            self._flush()
        if self._writer is None:
            raise AssertionError(f"{self.path} is closed")
        with writing(self.path):
            self._writer.close()
            self._writer = None
            self._unfinished.finish()

    def abort(self) -> None:
        """The run failed: leave no file behind. Does nothing after `close`."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None
            self._unfinished.abandon()


def _frame(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.drop_columns(["landed_ns"]).to_pandas()
    landed = table["landed_ns"]
    missing = landed.is_null().to_numpy()
    # Through floating point the last digits of long times would be lost.
    values = landed.fill_null(NOT_COPIED).to_numpy()
    return frame.assign(landed_ns=pd.Series(pd.arrays.IntegerArray(values.copy(), missing.copy())))
