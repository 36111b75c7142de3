"""Rows out of TensorFlow Datasets and Hugging Face datasets, each an optional package.

TFDS is read through array_record, without TensorFlow: a data set must have been prepared with
``file_format="array_record"``, on this machine or any other, for example by ``tfds build
--file_format=array_record gsm8k``.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from echorl_jax.data.errors import DataError
from echorl_jax.data.files import CheckedRows, check_rows
from echorl_jax.data.rows import LETTERS


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

    Raises:
      DataError: TFDS is not installed, the data set is not prepared there, or a bad row.
    """
    tfds = load_optional("tensorflow_datasets", "tensorflow-datasets")
    split = options.get("split", "train")
    label = f"tfds:{name}, split {split}"
    try:
        builder = tfds.builder(name, data_dir=options.get("data_dir"))
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
      DataError: ``datasets`` is not installed, there is no such data set, or a bad row.
    """
    datasets = load_optional("datasets", "datasets")
    split = options.get("split", "train")
    label = f"hf:{name}, split {split}"
    try:
        source = datasets.load_dataset(name, options.get("name"), split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"{label}: cannot be read: {_first_line(error)}") from error
    stem = name.rstrip("/").rpartition("/")[2]
    return check_rows(_Converted(source, plain_row), label=label, name=stem, skip_bad=skip_bad)


def load_optional(module: str, package: str) -> ModuleType:
    """Imports a package that is not among the requirements.

    Raises:
      DataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"this source needs the package {package}: pip install {package}"
        ) from error


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
