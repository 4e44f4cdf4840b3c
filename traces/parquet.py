"""Opening Parquet files of unknown origin; Arrow's own errors, sizes and texts stay behind this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from traces.container import check_file
from traces.jsontext import REWRITE
from traces.limits import check_bytes
from traces.messages import fault, plain

_MAX_THRIFT_BYTES = 64 << 20
_MAX_THRIFT_ITEMS = 1 << 20
VALUE_BYTES = 64
"""What a number takes at most while it is read: decoded, in Arrow's form and as a Python object."""


def open_parquet(path: Path, remedy: str = REWRITE) -> pq.ParquetFile:
    """The file, its footer read, no data. TraceError where it is none."""
    check_file(path)
    with reading(path, "file", remedy):
        return pq.ParquetFile(
            path,
            thrift_string_size_limit=_MAX_THRIFT_BYTES,
            thrift_container_size_limit=_MAX_THRIFT_ITEMS,
            page_checksum_verification=False,
        )


def read_group(path: Path, file: pq.ParquetFile, group: int, remedy: str = REWRITE) -> pa.Table:
    """One row group, whole and valid. TraceError where it is damaged or would take too much memory."""
    where = f"row group {group}"
    with reading(path, where, remedy):
        about = file.metadata.row_group(group)
        columns = [about.column(index) for index in range(about.num_columns)]
        sizes = [column.total_uncompressed_size for column in columns]
        counts = [column.num_values for column in columns]
    if min([*sizes, *counts, about.num_rows], default=0) < 0:
        raise fault(path, where, "claims sizes below 0", remedy)
    check_bytes(path, where, max(sum(sizes), VALUE_BYTES * sum(counts)))
    with reading(path, where, remedy):
        table = file.read_row_group(group).combine_chunks()
        table.validate(full=True)
    return table


@contextmanager
def reading(path: Path, where: str, remedy: str) -> Iterator[None]:
    """Arrow's errors as a TraceError with the place."""
    try:
        yield
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        MemoryError,
    ) as error:
        raise fault(path, where, f"no readable Parquet file ({_reason(error)})", remedy) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "a name in it is not UTF-8"
    text = plain(str(error))
    return text[:100] or type(error).__name__
