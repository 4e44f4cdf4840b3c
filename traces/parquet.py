"""Opening Parquet files of unknown origin; Arrow's own errors, sizes and texts stay behind this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from traces.container import check_file
from traces.jsontext import REWRITE
from traces.limits import check_bytes
from traces.messages import fault, plain
from traces.parquet_footer import GroupSize, group_sizes

_MAX_THRIFT_BYTES = 64 << 20
_MAX_THRIFT_ITEMS = 1 << 20
VALUE_BYTES = 64
"""What a number takes at most while it is read: decoded, in Arrow's form and as a Python object."""


@dataclass(frozen=True)
class Parquet:
    """A file whose footer was read and agrees with itself; no data yet."""

    path: Path
    file: pq.ParquetFile
    groups: tuple[GroupSize, ...]
    remedy: str

    def read_group(self, group: int) -> pa.Table:
        """One row group, whole and valid. TraceError where it is damaged or would take too much memory."""
        where, claimed = f"row group {group}", self.groups[group]
        numbers = max(claimed.num_values, claimed.num_rows)
        check_bytes(self.path, where, max(claimed.num_bytes, VALUE_BYTES * numbers))
        with reading(self.path, where, self.remedy):
            table = self.file.read_row_group(group).combine_chunks()
            table.validate(full=True)
        return table

    def read_groups(self) -> Iterator[pa.Table]:
        """All row groups in their order."""
        return (self.read_group(group) for group in range(len(self.groups)))


def open_parquet(path: Path, remedy: str = REWRITE) -> Parquet:
    """The file, its footer read, no data. TraceError where it is none."""
    check_file(path)
    with reading(path, "file", remedy):
        file = pq.ParquetFile(
            path,
            thrift_string_size_limit=_MAX_THRIFT_BYTES,
            thrift_container_size_limit=_MAX_THRIFT_ITEMS,
            page_checksum_verification=False,
        )
        groups = tuple(group_sizes(path, _MAX_THRIFT_BYTES))
        if len(groups) != file.num_row_groups:
            raise ValueError("the footer counts its row groups in two ways")
    return Parquet(path, file, groups, remedy)


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
