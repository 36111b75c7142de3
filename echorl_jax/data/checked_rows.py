"""Rows out of parquet and JSON files, each bad one named by file, place and column."""

import bisect
import dataclasses
import datetime
import decimal
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from echorl_jax.data.pictures import located
from echorl_jax.data.rows import BadRow, DataError, Row, normalise_row
from echorl_jax.files import parse_object

# Kinds of files with rows; .json holds a list of objects, or an object on each line.
SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
# Rows that are read from a parquet file, or become Python objects, at a time.
BATCH = 128


@dataclasses.dataclass(frozen=True)
class CheckedRows(Sequence[Row]):
    """The usable rows of one source, and a line about each of the others.

    Rows are brought into shape when they are read; until then, long trajectories stay in the
    source's own compact form.
    """

    raw: Sequence[Mapping[str, Any]]
    # Places in ``raw`` of the usable rows.
    kept: Sequence[int]
    # The data source of rows that name none.
    name: str
    bad: tuple[str, ...] = ()
    # Tells the usable rows from others.
    digest: str = ""
    # Where paths of pictures begin.
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Row:
        return _normal(self.raw[self.kept[index]], self.name, self.folder)


def _normal(raw: Mapping[str, Any], source: str, folder: Path) -> Row:
    return _with_paths(normalise_row(raw, source=source), folder)


def _with_paths(row: Row, folder: Path) -> Row:
    """The row with the paths of its pictures from ``folder``."""
    images = located(row, folder)
    return {**row, "images": images, "image": None} if images else row


class _TableRows(Sequence[dict[str, Any]]):
    """An Arrow table as a sequence of objects."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _objects(self._table.slice(index, 1))[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=BATCH):
            yield from _objects(batch)


class _JoinedRows(Sequence[Mapping[str, Any]]):
    """The raw rows of several files, end to end."""

    def __init__(self, files: Sequence[CheckedRows]) -> None:
        self._files = files
        lengths = [len(file.raw) for file in files]
        *self.starts, self._length = itertools.accumulate(lengths, initial=0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number = bisect.bisect_right(self.starts, index) - 1
        file = self._files[number]
        return _with_paths(dict(file.raw[index - self.starts[number]]), file.folder)


def _objects(rows: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return rows.to_pylist()
    except (ArithmeticError, ValueError, pa.ArrowException):
        cells = [[_value(cell) for cell in column] for column in rows.columns]
        return [dict(zip(rows.schema.names, row, strict=True)) for row in zip(*cells, strict=True)]


def _value(cell: pa.Scalar) -> Any:
    """A value that Arrow may be unable to convert, such as a date after the year 9999.

    Text that is not UTF-8 becomes bytes, other values become their text or None: the row can still
    be used when no known column holds such a value.
    """
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        if isinstance(cell, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar):
            return cell.as_buffer().to_pybytes()
    except (ArithmeticError, ValueError, pa.ArrowException):
        pass
    if isinstance(cell, pa.StructScalar):
        return {name: _value(part) for name, part in cell.items()}
    if isinstance(cell, pa.ListScalar | pa.LargeListScalar):
        return [_value(part) for part in cell.values]
    try:
        return cell.cast(pa.string()).as_py()
    except (ArithmeticError, ValueError, pa.ArrowException):
        return None


def read_file(path: Path, *, skip_bad: bool, label: str = "", name: str = "") -> CheckedRows:
    """Reads a file of one of the :data:`SUFFIXES`.

    Args:
      path: of the file.
      skip_bad: bad rows are left out.
      label: the name of the file in messages; its path unless given.
      name: the data source of rows that name none; the file's name unless given.

    Raises:
      DataError: no such file, another suffix, contents that are not of the format, no usable row,
        or (without ``skip_bad``) the first bad row.
    """
    label = label or str(path)
    if not path.name.endswith(SUFFIXES):
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{label}: unknown kind of file; rows are read from {kinds}")
    if not path.is_file():
        raise DataError(f"{label}: no such file")
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    if path.suffix != ".parquet":
        return _read_json(path, skip_bad, label, name or stem)
    try:
        file = pq.ParquetFile(path)
        # In batches, because Arrow cannot read over 2 GiB of nested text as one array.
        batches = file.iter_batches(batch_size=BATCH)
        table = pa.Table.from_batches(batches, schema=file.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{label}: not a readable parquet file: {reason}") from error
    folder = path.parent
    return check_rows(
        _TableRows(table), label=label, name=name or stem, skip_bad=skip_bad, folder=folder
    )


def check_rows(
    raw: Sequence[Mapping[str, Any]],
    *,
    label: str,
    name: str,
    skip_bad: bool,
    folder: Path = Path(),
) -> CheckedRows:
    """Reads every row once to find the bad ones. ``label`` names the source in messages.

    Raises:
      DataError: no usable row, or (without ``skip_bad``) the first bad row.
    """
    kept, bad, content = [], [], hashlib.blake2b(digest_size=16)
    for place, row in enumerate(raw):
        try:
            _normal(row, name, folder)
            kept.append(place)
            content.update(json.dumps(row, default=_json_value, skipkeys=True).encode())
        except BadRow as error:
            bad.append(_complain(f"{label}, row {place}, {error}", skip_bad))
    return _usable(CheckedRows(raw, kept, name, tuple(bad), content.hexdigest(), folder), label)


def _json_value(value: Any) -> str:
    """The text of a value without a form in JSON; of others than plain ones, the type's name."""
    plain = bytes | decimal.Decimal | datetime.date | datetime.time | datetime.timedelta
    return str(value) if isinstance(value, plain) else type(value).__name__


def _read_json(path: Path, skip_bad: bool, label: str, name: str) -> CheckedRows:
    """A list of objects, or an object on each line; compressed if the name ends with .gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            if ".json" in path.suffixes[-2:] and (rows := _json_list(file)) is not None:
                folder = path.parent
                return check_rows(rows, label=label, name=name, skip_bad=skip_bad, folder=folder)
            return _read_lines(file, skip_bad, label, name, path.parent)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{label}: not a whole gzip file: {error}") from error


def _json_list(file: io.BufferedIOBase) -> list[dict[str, Any]] | None:
    """The objects of one JSON list; None for anything else, with the file at its start again."""
    try:
        content = json.load(file)
    except (ValueError, RecursionError):
        content = None
    file.seek(0)
    listed = isinstance(content, list) and all(isinstance(row, dict) for row in content)
    return content if listed else None


def _read_lines(
    lines: Iterable[bytes], skip_bad: bool, label: str, name: str, folder: Path
) -> CheckedRows:
    rows, bad, content = [], [], hashlib.blake2b(digest_size=16)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_object(line)
            _normal(row, name, folder)
            rows.append(row)
            content.update(line.strip() + b"\n")
        except BadRow as error:
            bad.append(_complain(f"{label}, line {number}, {error}", skip_bad))
        except ValueError as error:
            bad.append(_complain(f"{label}, line {number}: {error}", skip_bad))
    kept = range(len(rows))
    return _usable(CheckedRows(rows, kept, name, tuple(bad), content.hexdigest(), folder), label)


def join_rows(files: Sequence[CheckedRows]) -> CheckedRows:
    """The rows of several files of one source, end to end."""
    if len(files) == 1:
        return files[0]
    raw = _JoinedRows(files)
    kept = [
        start + place for start, file in zip(raw.starts, files, strict=True) for place in file.kept
    ]
    bad = tuple(line for file in files for line in file.bad)
    content = hashlib.blake2b("".join(file.digest for file in files).encode(), digest_size=16)
    return CheckedRows(raw, kept, files[0].name, bad, content.hexdigest())


def _complain(message: str, skip_bad: bool) -> str:
    if not skip_bad:
        raise DataError(message)
    return message


def _usable(rows: CheckedRows, label: str) -> CheckedRows:
    if not rows:
        raise DataError(rows.bad[0] if rows.bad else f"{label}: no rows")
    return rows
