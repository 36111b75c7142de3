"""Rows out of parquet and JSONL files, each bad one named by file, place and column."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from echorl_jax.data.errors import DataError
from echorl_jax.data.rows import BadRow, Row, normalise_row

# Rows that become Python objects at a time while a parquet file is checked.
BATCH_ROWS = 512


@dataclasses.dataclass(frozen=True)
class FileRows(Sequence[Row]):
    """The usable rows of one file, and a line about each of the others."""

    rows: Sequence[Row]
    bad: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]


@dataclasses.dataclass(frozen=True)
class ParquetRows(Sequence[Row]):
    """Chosen rows of a table; long texts stay in Arrow's compact form until they are read."""

    table: pa.Table
    kept: tuple[int, ...]
    source: str

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return dataclasses.replace(self, kept=self.kept[index])
        (raw,) = self.table.slice(self.kept[index], 1).to_pylist()
        return normalise_row(raw, source=self.source)


def read_file(path: Path, *, skip_bad: bool) -> FileRows:
    """Reads ``.parquet``, ``.jsonl`` or ``.json`` with one object a line.

    Raises:
      DataError: no such file, another suffix, contents that are not of the format, no usable row,
      or (without ``skip_bad``)
        the first bad row.
    """
    if path.suffix not in (".parquet", ".jsonl"):
        raise DataError(f"{path}: unknown kind of file; rows are read from .parquet and .jsonl")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    file = (
        _read_parquet(path, skip_bad) if path.suffix == ".parquet" else _read_jsonl(path, skip_bad)
    )
    if not file:
        raise DataError(file.bad[0] if file.bad else f"{path}: no rows")
    return file


def _read_parquet(path: Path, skip_bad: bool) -> FileRows:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{path}: not a readable parquet file: {reason}") from error
    kept, bad = [], []
    for place, raw in enumerate(_objects(table)):
        try:
            normalise_row(raw, source=path.stem)
            kept.append(place)
        except BadRow as error:
            bad.append(_complain(f"{path}, row {place}, {error}", skip_bad))
    return FileRows(ParquetRows(table, tuple(kept), path.stem), tuple(bad))


def _objects(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        yield from batch.to_pylist()


def _read_jsonl(path: Path, skip_bad: bool) -> FileRows:
    rows, bad = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(normalise_row(_parse_line(line), source=path.stem))
            except BadRow as error:
                bad.append(_complain(f"{path}, line {number}, {error}", skip_bad))
            except ValueError as error:
                bad.append(_complain(f"{path}, line {number}: {error}", skip_bad))
    return FileRows(rows, tuple(bad))


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def _complain(message: str, skip_bad: bool) -> str:
    if not skip_bad:
        raise DataError(message)
    return message
