"""Mutation of tables: CSV and plain lines by cell and row, Parquet by column, type and metadata."""

from __future__ import annotations

import io
from random import Random
from typing import Any

from tests.attack import draw, raw, trees

Rows = list[list[str]]
CELLS = ("", " ", "-1", "1e3", "1.5", "nan", "inf", '"', '"a', "a,b", "[1, 2]", "[]", "[0,0]", "٣", "0x10", "9" * 30)
QUOTED = ('"%s"', "'%s'", " %s ", "%s\x00", '"%s\n"')


def parse_csv(content: bytes) -> Rows:
    """Cells by their commas alone: quotes stay in them."""
    return [line.split(",") for line in content.decode().splitlines()]


def copy_rows(rows: Rows) -> Rows:
    """A list of its own of the same rows, each copied as well."""
    return [list(row) for row in rows]


def write_csv(rows: Rows) -> bytes:
    """Lines of cells."""
    return "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass") + b"\n"


def change_cell(rng: Random, rows: Rows) -> None:
    """A cell near what it was, at an edge, or of another kind."""
    if not rows:
        return
    row = rng.choice(rows[1:] or rows) if rng.random() < 0.9 else rows[0]
    if not row:
        return
    column = rng.randrange(len(row))
    cell, kind = row[column], rng.random()
    if kind < 0.5 and cell.strip().isdecimal():
        row[column] = str(draw.whole(rng, int(cell[:18])))
    elif kind < 0.7:
        row[column] = rng.choice(CELLS)
    elif kind < 0.85:
        row[column] = draw.text(rng)
    else:
        row[column] = rng.choice(QUOTED) % cell


def change_digit(rng: Random, rows: Rows) -> None:
    """One digit of a row becomes another."""
    row = rng.choice(rows[1:] or rows) if rows else []
    columns = [i for i, cell in enumerate(row) if any(c in "0123456789" for c in cell)]
    if columns:
        column = rng.choice(columns)
        places = [i for i, c in enumerate(row[column]) if c in "0123456789"]
        at = rng.choice(places)
        row[column] = row[column][:at] + rng.choice("0123456789") + row[column][at + 1 :]


def change_rows(rng: Random, rows: Rows) -> None:
    """A row is missing, comes twice, is elsewhere, is empty, a comment, or the header again."""
    if not rows:
        return
    index, kind = rng.randrange(len(rows)), rng.randrange(7)
    if kind == 0:
        del rows[index]
    elif kind == 1:
        rows.insert(rng.randrange(len(rows) + 1), list(rows[index]))
    elif kind == 2:
        rows.append(rows.pop(index))
    elif kind == 3:
        rows.insert(index, rng.choice(([""], [" "], ["# a comment"], ["# model=x n_expert=4"], list(rows[0]))))
    elif kind == 4:
        del rows[index:]
    elif kind == 5:
        rows[index].append(rng.choice(CELLS))
    elif rows[index]:
        rows[index].pop()


def change_columns(rng: Random, rows: Rows) -> None:
    """A column is missing, comes twice, is elsewhere, or has another name."""
    width = min(map(len, rows), default=0)
    if not width:
        return
    column, kind = rng.randrange(width), rng.randrange(4)
    for number, row in enumerate(rows):
        if kind == 0:
            del row[column]
        elif kind == 1:
            row.append(row[column])
        elif kind == 2:
            row.append(row.pop(column))
        elif number == 0:
            row[column] = rng.choice((row[column] + "x", row[column].upper(), "", " " + row[column], "x" * 400))


def strange_lines(rng: Random, rows: Rows) -> bytes:
    """Other ends of lines, other separators, another encoding, a quote that never closes, one huge field."""
    content, kind = write_csv(rows), rng.randrange(7)
    if kind == 0:
        return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"\x0b")))
    if kind == 1:
        return content.replace(b",", rng.choice((b";", b"\t", b", ", b",,")))
    if kind == 2:
        return content.replace(b",", b',"', 1)
    if kind == 3:
        return content + b'"' + b"z" * rng.choice((10, 200_000)) + b'"\n'
    if kind == 4:
        return content.rstrip(b"\n")
    return trees.reencode(rng, content.decode("utf-8", "replace"))


def parse_lines(content: bytes) -> Rows:
    """Plain lines, one cell each."""
    return [[line] for line in content.decode().splitlines()]


# -- Parquet -------------------------------------------------------------------------------------------------


def parse_parquet(content: bytes) -> Any:
    """A sound file."""
    import pyarrow.parquet as pq

    return [pq.read_table(io.BytesIO(content))]


def write_parquet(tables: list[Any]) -> bytes:
    """The bytes of the table."""
    import pyarrow.parquet as pq

    target = io.BytesIO()
    pq.write_table(tables[0], target)
    return target.getvalue()


def change_value(rng: Random, tables: list[Any]) -> None:
    """A value of a column: near what it was, none, or at an edge of its type."""
    import pyarrow as pa

    table = tables[0]
    if not table.num_columns or not table.num_rows:
        return
    column = rng.randrange(table.num_columns)
    field, values = table.schema.field(column), table.column(column).to_pylist()
    index = rng.randrange(len(values))
    old = values[index]
    near = draw.whole(rng, old) if isinstance(old, int) else draw.text(rng) if isinstance(old, str) else old
    values[index] = rng.choice((near, near, None, [] if isinstance(old, list) else near, rng.choice(values)))
    if isinstance(old, list) and old and rng.random() < 0.6:
        values[index] = trees.mutate(rng, list(old))
    try:
        if values[index] is None or (isinstance(old, list) and None in values[index]):
            kind = pa.list_(field.type.value_type) if isinstance(old, list) else field.type
            field = pa.field(field.name, kind)
        tables[0] = table.set_column(column, field, pa.array(values, field.type))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, TypeError, ValueError):
        return


def change_type(rng: Random, tables: list[Any]) -> None:
    """A column in another type."""
    import pyarrow as pa

    table = tables[0]
    if table.num_columns:
        column = rng.randrange(table.num_columns)
        kind = rng.choice((pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float64(), pa.string(), pa.bool_()))
        try:
            cast = table.column(column).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return
        tables[0] = table.set_column(column, table.schema.field(column).name, cast)


def change_shape(rng: Random, tables: list[Any]) -> None:
    """Rows or columns are missing, come twice, stand elsewhere."""
    import pyarrow as pa

    table, kind = tables[0], rng.randrange(7)
    if not table.num_columns:
        return
    column, row = rng.randrange(table.num_columns), rng.randrange(table.num_rows + 1)
    if kind == 0:
        tables[0] = table.remove_column(column)
    elif kind == 1:
        tables[0] = table.append_column(table.schema.field(column), table.column(column))
    elif kind == 2:
        names = [name + "x" if i == column else name for i, name in enumerate(table.column_names)]
        tables[0] = table.rename_columns(names)
    elif kind == 3:
        tables[0] = table.slice(0, row)
    elif kind == 4:
        tables[0] = pa.concat_tables([table.slice(row), table.slice(0, row)])
    elif kind == 5:
        tables[0] = pa.concat_tables([table.slice(0, row), table.slice(max(0, row - 1))])
    else:
        tables[0] = table.slice(row)


def change_metadata(rng: Random, tables: list[Any]) -> None:
    """The metadata of the schema: a value, a key, or all of it."""
    meta = dict(tables[0].schema.metadata or {})
    if not meta or rng.random() < 0.1:
        tables[0] = tables[0].replace_schema_metadata(None)
        return
    key = rng.choice(list(meta))
    if rng.random() < 0.2:
        del meta[key]
    else:
        text = trees.mutate_text(rng, meta[key].decode("utf-8", "replace"))
        meta[key] = text.encode("utf-8", "surrogatepass")
    tables[0] = tables[0].replace_schema_metadata(meta)


def footer(rng: Random, content: bytes) -> bytes:
    """The footer, which says where all is: damaged, or of another length."""
    if len(content) < 12:
        return raw.mutate(rng, content)
    length = int.from_bytes(content[-8:-4], "little")
    if rng.random() < 0.3:
        lie = rng.choice((0, 1, length - 1, length + 1, len(content), (1 << 31) - 1, (1 << 32) - 1))
        return content[:-8] + (lie % (1 << 32)).to_bytes(4, "little") + content[-4:]
    start = max(4, len(content) - 8 - length)
    damaged = raw.mutate(rng, content[start:-8])
    return content[:start] + damaged + len(damaged).to_bytes(4, "little") + content[-4:]
