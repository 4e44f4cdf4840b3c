"""The sizes that a Parquet footer claims, read without Arrow, against Arrow's own reading of sound files."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.messages import TraceError
from traces.parquet import open_parquet
from traces.parquet_footer import GroupSize, group_sizes

MIB = 1 << 20


def _write(path: Path, rows: int, group_rows: int, **options: object) -> Path:
    table = pa.table(
        {
            "whole": pa.array(range(rows), pa.int64()),
            "text": [f"é{i}" for i in range(rows)],
            "list": pa.array([[i] * (i % 3) for i in range(rows)], pa.list_(pa.uint16())),
            "real": pa.array([i / 7 if i % 5 else None for i in range(rows)], pa.float64()),
            "flag": [bool(i % 2) for i in range(rows)],
            "nested": pa.array([{"a": i, "b": {"c": str(i)}} for i in range(rows)])
            if rows
            else pa.array([], pa.int8()),
        }
    )
    pq.write_table(table.replace_schema_metadata({"note": "n" * 300}), path, row_group_size=group_rows, **options)
    return path


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
@pytest.mark.parametrize(("rows", "group_rows"), [(0, 10), (1, 1), (50, 3), (400, 400)])
@pytest.mark.parametrize("version", ["1.0", "2.6"])
def test_as_arrow_reads_them(tmp_path: Path, compression: str, rows: int, group_rows: int, version: str) -> None:
    path = _write(
        tmp_path / "x.parquet", rows, group_rows, compression=compression, version=version, write_page_index=True
    )
    metadata = pq.ParquetFile(path).metadata
    expected = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = [group.column(i) for i in range(group.num_columns)]
        num_bytes = max(group.total_byte_size, sum(c.total_uncompressed_size for c in columns))
        expected.append(GroupSize(group.num_rows, sum(c.num_values for c in columns), num_bytes))
    assert group_sizes(path, MIB) == expected


def contradictions(path: Path, content: bytes) -> Iterator[Path]:
    """Files with one number more in a list of two or four, such as a column's level histogram: it has a bucket a level,
    which Arrow compares with the schema where nothing can catch it."""
    size = int.from_bytes(content[-8:-4], "little")
    for place in range(len(content) - 8 - size, len(content) - 8):
        if content[place] in (0x26, 0x46):
            longer = bytes([content[place] + 0x10, 0])
            end = (size + 1).to_bytes(4, "little") + b"PAR1"
            path.write_bytes(content[:place] + longer + content[place + 1 : -8] + end)
            yield path


def test_a_footer_that_contradicts_itself_does_not_end_the_process(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.parquet", 20, 20)
    told = []
    for changed in contradictions(path, path.read_bytes()):
        try:
            list(open_parquet(changed).read_groups())
        except TraceError as error:
            told.append(str(error))
    assert any("histogram size mismatch" in one for one in told)


@given(cut=st.integers(0, 3000), place=st.integers(0, 3000), byte=st.integers(0, 255))
def test_any_damage_is_a_value_error_or_sizes(
    tmp_path_factory: pytest.TempPathFactory, cut: int, place: int, byte: int
):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damaged.parquet"
    if not (whole := folder / "whole.parquet").exists():
        _write(whole, 30, 10)
    content = bytearray(whole.read_bytes())
    content[-1 - place % len(content)] = byte
    path.write_bytes(content[cut % 50 :])
    try:
        sizes = group_sizes(path, MIB)
    except ValueError:
        return
    assert all(min(size.num_rows, size.num_values, size.num_bytes) >= 0 for size in sizes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "missing"),
        (b"PAR1" * 2, "missing"),
        (b"PAR1" + bytes(20), "cut off"),
        (b"PAR1" + (1 << 30).to_bytes(4, "little") + b"PAR1", "cut off"),
        (b"PAR1\x00\x01\x00\x00\x00PAR1", "lacks a size"),
    ],
)
def test_no_footer(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        group_sizes(path, MIB)


def test_a_footer_over_the_bound(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.parquet", 20, 5)
    with pytest.raises(ValueError, match="takes"):
        group_sizes(path, 100)
