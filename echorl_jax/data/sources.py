"""Rows of a source: a file, generated rows, a catalogue, or a mixture of sources.

TFDS is read through array_record, without TensorFlow: a data set must have been prepared with
``file_format="array_record"``, on this machine or any other, for example by ``tfds build
--file_format=array_record gsm8k``.
"""

import bisect
import dataclasses
import glob
import hashlib
import itertools
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from echorl_jax.data.checked_rows import (
    SUFFIXES,
    CheckedRows,
    check_rows,
    join_rows,
    read_file,
)
from echorl_jax.data.rows import LETTERS, DataError, Row
from echorl_jax.errors import nearest, require_package
from echorl_jax.remote import find_files, is_remote, local_copy

# The function that reads the options of each kind of generated rows.
GENERATED = {
    "countdown": "echorl_jax.data.countdown_rows:parse_countdown",
    "reduce": "echorl_jax.data.reduce_rows:parse_reduce",
    "shapes": "echorl_jax.data.shapes_rows:parse_shapes",
}


class _Converted(Sequence[Mapping[str, Any]]):
    """A random-access source whose elements are changed when they are read."""

    def __init__(self, source: Any, convert: Callable[[Any], Mapping[str, Any]]) -> None:
        self._source = source
        self._convert = convert

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        return self._convert(self._source[index])


def read_tfds(name: str, options: Mapping[str, str], *, skip_bad: bool) -> CheckedRows:
    """Reads a prepared TFDS data set; options are ``split`` and ``data_dir``.

    ``echorl_countdown`` is prepared when it is first read.

    Raises:
      UserError: the data set is not prepared there, or a bad row.
    """
    import tensorflow_datasets as tfds  # takes a second, and few runs read such a source

    split, data_dir = options.get("split", "train"), options.get("data_dir")
    label = f"tfds:{name}, split {split}"
    try:
        if name == "echorl_countdown":
            from echorl_jax.data import tfds_countdown

            tfds_countdown.prepare(data_dir)
        builder: Any = tfds.builder(name, data_dir=data_dir)
        source = builder.as_data_source(split=split)
    # TFDS raises a dozen kinds of error here, most of them for a missing or unprepared data set.
    except Exception as error:
        raise DataError(f"{label}: cannot be read: {_first_line(error)}") from error
    raw = _Converted(source, plain_row)
    return check_rows(raw, label=label, name=name.partition("/")[0], skip_bad=skip_bad)


def plain_row(example: Mapping[str, Any]) -> dict[str, Any]:
    """Plain Python values for bytes and arrays, and ``options`` and ``answer`` for ARC's choices.

    >>> choices = {"text": [b"ice", b"steam"], "label": [0, 1]}
    >>> plain_row({"question": b"Hot?", "choices": choices, "answerKey": 1})["answer"]
    'B'
    """
    row = {name: _plain(value) for name, value in example.items()}
    choices = row.get("choices")
    if isinstance(choices, Mapping) and "text" in choices:
        row["options"] = choices["text"]
        labels = choices.get("label", list(range(len(choices["text"]))))
        if row.get("answerKey") in labels:
            row["answer"] = LETTERS[labels.index(row["answerKey"])]
    return row


def read_hf(name: str, options: Mapping[str, str], *, skip_bad: bool) -> CheckedRows:
    """Reads a Hugging Face data set; options are ``split`` and ``name``, the configuration.

    Raises:
      UserError: ``datasets`` is not installed, there is no such data set, or a bad row.
    """
    datasets = require_package("datasets", "datasets", f"hf:{name}")
    split = options.get("split", "train")
    label = f"hf:{name}, split {split}"
    try:
        source = datasets.load_dataset(name, options.get("name"), split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"{label}: cannot be read: {_first_line(error)}") from error
    stem = name.rstrip("/").rpartition("/")[2]
    return check_rows(_Converted(source, plain_row), label=label, name=stem, skip_bad=skip_bad)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# "FILE@0.7": a source and its share of the mixture.
WEIGHTED = re.compile(r"(?P<name>.*)@(?P<weight>\d+(\.\d*)?|\.\d+)")

FILTERS = ("level", "source", "limit")


@dataclasses.dataclass(frozen=True)
class _Catalogue:
    """A kind of named data set: its reader and the options it takes."""

    read: Callable[..., CheckedRows]
    options: tuple[str, ...]


CATALOGUES = {
    "tfds": _Catalogue(read_tfds, ("split", "data_dir")),
    "hf": _Catalogue(read_hf, ("split", "name")),
}


@dataclasses.dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows of one or several sources, end to end."""

    parts: tuple[Sequence[Row], ...]
    # Shares of the parts in a training stream; None takes every row equally often.
    weights: tuple[float, ...] | None = None
    # A line about each row that was left out: file, place, column, reason.
    bad: tuple[str, ...] = ()

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each part, and, last, the number of rows."""
        return (0, *itertools.accumulate(len(part) for part in self.parts))

    @property
    def digest(self) -> str:
        """Tells the rows from others that the same spec may name at another time or place."""
        parts = [part.digest if isinstance(part, CheckedRows) else part for part in self.parts]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self.starts, position) - 1
        return self.parts[part][position - self.starts[part]]


def load_rows(spec: str, *, on_bad_row: Literal["error", "skip"] = "error") -> Rows:
    """Reads the rows that a spec names.

    A spec is a comma-separated list of sources:

    - a file (``.parquet``, ``.jsonl``, ``.json``, the last two also with ``.gz``), a folder of such
      files, a pattern with ``*``, or one of these under ``s3://`` or ``gs://``;
    - ``countdown:operands=4&max_number=50&seed=2`` or ``reduce:max_operands=10``, generated; the
      options are the fields of :class:`CountdownRows` and :class:`ReduceRows`;
    - ``tfds:NAME?split=train&data_dir=DIR``, prepared as array_record files;
    - ``hf:OWNER/NAME?name=CONFIGURATION&split=train``.

    After ``?``, all but the generated ones also take filters: ``level=3-5`` (the number in the
    column ``level``), ``source=aime|amc`` (the column ``data_source``) and ``limit=100``. With
    weights, as in ``hard.jsonl@0.8,easy.jsonl@0.2``, a training stream draws from each by its
    share; every source then needs one.

    Places are counted as the formats do: rows of a parquet file from 0, lines of a JSONL file from
    1.

    Raises:
      DataError: a source that cannot be read or, unless ``on_bad_row`` is ``skip``, its first bad
      row.

    >>> rows = load_rows("countdown:seed=1&count=2,countdown:seed=2&count=3")
    >>> len(rows), rows[2]["extra_info"]["seed"]
    (5, 2)
    """
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"on_bad_row={on_bad_row!r}: must be error or skip")
    names, weights = zip(*map(_split_weight, _split_spec(spec)), strict=True)
    parts = tuple(_load_part(name, skip_bad=on_bad_row == "skip") for name in names)
    bad = [line for part in parts if isinstance(part, CheckedRows) for line in part.bad]
    return Rows(parts, _settle_weights(spec, weights), tuple(bad))


def _split_spec(spec: str) -> list[str]:
    names = [name.strip() for name in spec.split(",")]
    if not all(names):
        raise DataError(f"data source {spec!r}: a name is empty")
    return names


def _split_weight(name: str) -> tuple[str, float | None]:
    match = WEIGHTED.fullmatch(name)
    return (match["name"], float(match["weight"])) if match else (name, None)


def _settle_weights(spec: str, weights: Sequence[float | None]) -> tuple[float, ...] | None:
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) < len(weights) or min(given) <= 0:
        raise DataError(f"data source {spec!r}: give every source a weight above 0, or none")
    return tuple(weight / sum(given) for weight in given)


def _load_part(name: str, *, skip_bad: bool) -> Sequence[Row]:
    kind, colon, rest = name.partition(":")
    if colon and kind in GENERATED:
        return pkgutil.resolve_name(GENERATED[kind])(rest)
    place, _, query = name.partition("?")
    kind, colon, rest = place.partition(":")
    reader = CATALOGUES.get(kind) if colon else None
    options = _parse_options(name, query, (*FILTERS, *(reader.options if reader else ())))
    if reader:
        rows = reader.read(rest, options, skip_bad=skip_bad)
    else:
        rows = join_rows([*_read_files(place, skip_bad=skip_bad)])
    return _filter(rows, options, name)


def _read_files(place: str, *, skip_bad: bool) -> Iterator[CheckedRows]:
    """The files of a path, a folder, a pattern with ``*`` or the address of one of these.

    Rows of several files that name no data source get the name of the folder.
    """
    if is_remote(place):
        names = find_files(place, SUFFIXES)
        files = [(name, local_copy(name)) for name in names]
    else:
        files = [(str(path), path) for path in _local_files(Path(place).expanduser(), place)]
    folder = "" if len(files) == 1 else re.sub(r"/[^/]*\*.*", "", place.rstrip("/"))
    for label, path in files:
        name = folder.rpartition("/")[2]
        yield read_file(path, skip_bad=skip_bad, label=label, name=name)


def _local_files(path: Path, place: str) -> list[Path]:
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES)]
        if not found:
            raise DataError(f"{place}: a folder without files of rows ({', '.join(SUFFIXES)})")
    elif "*" in place:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not found:
            raise DataError(f"{place}: no such file")
    elif not path.exists():
        raise DataError(f"{place}: no such file{_hint(path)}")
    else:
        found = [path]
    return sorted(found)


def _parse_options(name: str, query: str, allowed: Sequence[str]) -> dict[str, str]:
    options = dict(_split_pair(pair) for pair in query.split("&") if pair)
    for key in options:
        if key not in allowed:
            raise DataError(f"{name}: unknown option {key!r}; one of {', '.join(allowed)}")
    return options


def _split_pair(pair: str) -> tuple[str, str]:
    key, _, value = pair.partition("=")
    return key, value


def _filter(rows: CheckedRows, options: Mapping[str, str], name: str) -> CheckedRows:
    """Keeps the rows that the options ask for, in their order."""
    low, high = _numbers(options.get("level", "0-999"), name, "level")
    (limit,) = _numbers(options.get("limit", str(len(rows))), name, "limit", count=1)
    sources = options["source"].split("|") if "source" in options else None
    kept = []
    for place, row in zip(rows.kept, rows, strict=True):
        if len(kept) == limit:
            break
        if "level" in options and not low <= _level(row, name) <= high:
            continue
        if sources is None or row["data_source"] in sources:
            kept.append(place)
    if not kept:
        raise DataError(f"{name}: no row is left by its filters")
    return dataclasses.replace(rows, kept=kept)


def _numbers(text: str, name: str, option: str, *, count: int = 2) -> list[int]:
    parts = text.split("-")
    if not all(part.isdecimal() for part in parts) or len(parts) > count:
        form = "LOW-HIGH" if count == 2 else "a whole number"
        raise DataError(f"{name}: {option}={text!r}: must be {form}")
    return [int(part) for part in (parts * count)[:count]]


def _level(row: Row, name: str) -> int:
    found = re.search(r"\d+", str(row.get("level")))
    if found is None:
        raise DataError(f"{name}: level={row.get('level')!r}: a row has no number there")
    return int(found[0])


def _hint(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor the folder {path.parent})"
    close = nearest(path.name, (file.name for file in path.parent.iterdir()))
    return f"; did you mean {path.parent / close}?" if close else ""
