"""Reading one file of documents, from its beginning or from any place that an earlier reading had reached.

Every reader is a generator of (row, offset): a `Row`, and the JSON value from which another reading goes on behind it.
Rows that can not be read are given to the policy here; whether a row's fields make a document is decided one level up.
"""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moe_lm.data.documents import BadRows
from moe_lm.errors import InputError

Offset = Any
"""A JSON value: where to go on within a file; null is the file's beginning."""

ROWS_AT_A_TIME = 256
"""Rows of a columnar file that are decoded at once."""

PARQUET_MARK = b"PAR1"
ARROW_FILE_MARK = b"ARROW1"
"""How an IPC file begins, which a stream does not."""

PLAIN_BYTES_AT_A_TIME = 2**12
"""Bytes that are decompressed at once: so many at most are lost in front of a cut, and more is not faster."""


class Row(NamedTuple):
    """A row as it was read."""

    place: str
    """File and line (or row group and row), for messages."""
    name: str
    """What stands behind the file's name in the document's name; empty where a file is one document."""
    fields: dict[str, Any]


Reader = Callable[[Path, Offset, list[str], BadRows], Iterator[tuple[Row, Offset]]]
"""(path, offset, names of the fields wanted, policy) → rows."""


def read_text(path: Path, offset: Offset, fields: list[str], bad: BadRows) -> Iterator[tuple[Row, Offset]]:
    """A file that is one document: bytes as they are, since text mode would change the ends of lines."""
    if offset is not None:
        return
    content = path.read_bytes()
    if not content:
        bad.found("empty_file", str(path), "the file is empty", "remove it")
        return
    try:
        yield Row(str(path), "", {fields[0]: content.decode("utf-8-sig")}), 1
    except UnicodeDecodeError as error:
        bad.found("invalid_utf8", str(path), f"is not UTF-8 text (byte {error.start})", "convert it")


def read_jsonl(path: Path, offset: Offset, fields: list[str], bad: BadRows) -> Iterator[tuple[Row, Offset]]:
    """JSON objects, one a line; `.gz` and `.zst` are decompressed. The offset is [byte, line] of the plain content."""
    start, number = offset or (0, 0)
    any_rows = offset is not None
    with _open(path, start) as file:
        try:
            for line in file:
                start, number = start + len(line), number + 1
                place = f"{path}, line {number}"
                if line.isspace():
                    continue
                any_rows = True
                row = _parse_line(line, place, bad)
                if row is not None:
                    yield Row(place, f":{number}", row), [start, number]
        except InputError:  # a ValueError, too
            raise
        except (OSError, EOFError, ValueError) as error:
            _damaged(error, f"{path}, line {number + 1}", bad)
            return
    if not any_rows:
        bad.found("empty_file", str(path), "the file holds no row", "remove it")


def _parse_line(line: bytes, place: str, bad: BadRows) -> dict[str, Any] | None:
    """A line's object; a line that is none is a bad row."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        bad.found("invalid_utf8", place, f"is not UTF-8 text (byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        if b"\0" in line:
            bad.found("nul", place, f"holds a NUL at byte {line.index(0)} of the line")
        elif line.endswith(b"\n"):
            bad.found("broken_json", place, f"not valid JSON ({error})")
        else:
            bad.found("truncated_tail", place, f"the file ends within this line, which is not valid JSON ({error})")
    else:
        if isinstance(row, dict):
            return row
        bad.found("wrong_type", place, f"a JSON object is needed, found {type(row).__name__}")
    return None


@contextmanager
def _open(path: Path, start: int) -> Iterator[BinaryIO]:
    """The plain content of a file from a byte on."""
    if path.suffix not in (".gz", ".zst"):
        with open(path, "rb") as file:
            file.seek(start)
            yield file
        return
    import pyarrow

    with pyarrow.input_stream(str(path)) as compressed:
        plain = io.BufferedReader(compressed, PLAIN_BYTES_AT_A_TIME)
        while start > 0 and (skipped := plain.read(min(start, 2**20))):
            start -= len(skipped)
        yield plain


def _damaged(error: Exception, place: str, bad: BadRows) -> None:
    """Files that end too early, or hold what their format does not allow; other faults of the system stay errors."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    words = " ".join(str(error).split())
    if any(
        word in words.lower()
        for word in ("truncated", "unexpected end", "eof", "expected to read", "expected to be able to read")
    ):
        bad.found("truncated_file", place, f"the file is cut short here ({words})", "bring a whole copy")
    else:
        bad.found("damaged_file", place, f"the file can not be read further ({words})", "bring a good copy")


def read_parquet(path: Path, offset: Offset, fields: list[str], bad: BadRows) -> Iterator[tuple[Row, Offset]]:
    """A Parquet file, row group by row group; the offset is a row's number in the file.

    What can not be read any more is the rest of a row group: the next one stands by itself.
    """
    import pyarrow
    from pyarrow import parquet

    if _is_empty(path, bad):
        return
    first = offset or 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            present = _columns(path, file.schema_arrow.names, fields, bad)
            if not present:
                return
            begin = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                number = 0
                try:
                    batches = file.iter_batches(ROWS_AT_A_TIME, [group], present) if begin + size > first else ()
                    for batch in batches:
                        yield from _rows_of_batch(path, batch, begin + number, first, f"row group {group}, ", number)
                        number += batch.num_rows
                except (pyarrow.ArrowException, OSError) as error:
                    _damaged(error, f"{path}, row group {group}, row {number}", bad)
                begin += size
            if begin == 0:
                bad.found("empty_file", str(path), "the file holds no row", "remove it")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns
        _damaged(error, str(path), bad)


def read_arrow(path: Path, offset: Offset, fields: list[str], bad: BadRows) -> Iterator[tuple[Row, Offset]]:
    """An Arrow IPC file or stream, batch by batch; the offset is a row's number in the file."""
    import pyarrow

    if _is_empty(path, bad):
        return
    first, begin, place = offset or 0, 0, str(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            mark = source.read(len(ARROW_FILE_MARK))
            is_file = mark == ARROW_FILE_MARK
            if mark.startswith(PARQUET_MARK):
                bad.found("wrong_type", place, "is a Parquet file", "read it as parquet")
                return
            source.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                reader = pyarrow.ipc.open_stream(source)
                batches = iter(reader)
            present = _columns(path, reader.schema.names, fields, bad)
            if not present:
                return
            for whole in batches:
                batch = whole.select(present)
                for column in batch.columns:
                    _check_offsets(column)
                for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                    piece = batch.slice(start, ROWS_AT_A_TIME)
                    yield from _rows_of_batch(path, piece, begin + start, first, "", begin + start)
                begin += batch.num_rows
                place = f"{path}, row {begin}"
            if begin == 0:
                bad.found("empty_file", str(path), "the file holds no row", "remove it")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns
        _damaged(error, place, bad)


def _is_empty(path: Path, bad: BadRows) -> bool:
    """Whether a columnar file has no byte, which its reader would call damaged."""
    empty = path.stat().st_size == 0
    if empty:
        bad.found("empty_file", str(path), "the file is empty", "remove it")
    return empty


def _check_offsets(column: Any) -> None:
    """Refuses a column of an IPC file whose strings would lie outside of it: reading them would end the process.

    Raises:
        ArrowInvalid: The file is damaged.
    """
    import pyarrow

    # As bytes: of strings it would also check that they are UTF-8, which is a matter of single rows.
    as_bytes = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    column.view(as_bytes.get(column.type, column.type)).validate(full=True)


def _columns(path: Path, names: list[str], fields: list[str], bad: BadRows) -> list[str]:
    """The wanted columns; none, as a bad file, where the first of them (the text) is not there once."""
    if names.count(fields[0]) != 1:
        there = ", ".join(sorted(names)) or "none"
        complaint = f"{'several columns' if fields[0] in names else 'no column'} '{fields[0]}' (its columns: {there})"
        bad.found("missing_field", str(path), complaint, "set the text field, leave the file out")
        return []
    return [name for name in dict.fromkeys(fields) if names.count(name) == 1]


def _rows_of_batch(
    path: Path, batch: Any, begin: int, first: int, group: str, number: int
) -> Iterator[tuple[Row, Offset]]:
    """Rows of a batch that begins at row `begin` of the file, from row `first` of the file on.

    `number` is the batch's first row within its row group, named by `group`.
    """
    if begin + batch.num_rows <= first:
        return
    columns = {name: _values(batch.column(index)) for index, name in enumerate(batch.schema.names)}
    for index in range(max(0, first - begin), batch.num_rows):
        fields = {name: values[index] for name, values in columns.items()}
        row = begin + index
        yield Row(f"{path}, {group}row {number + index}", f":{row}", fields), row + 1


def _values(column: Any) -> list[Any]:
    """A column as Python values; in place of a string that is not UTF-8 stands the complaint."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
