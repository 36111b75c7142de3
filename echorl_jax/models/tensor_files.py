"""Safetensors files, one tensor at a time: headers first, bytes only where they are needed.

The format is eight bytes of header length, a JSON header with each tensor's type, shape and byte
range, then the bytes. Reading goes through a memory map, so that a slice of a tensor costs that
slice; writing streams, so that no more than one tensor is in memory.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from echorl_jax.models.config import ModelError

_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_CODES = {np.dtype(dtype).name: code for code, dtype in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of the file; nothing is read until its elements are."""
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, mode="r", offset=self.offset, shape=self.shape)


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: its values are fetched only when its turn comes."""

    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a model directory, by name.

    Raises:
      ModelError: no safetensors, a shard of the index that is missing, or a file that is damaged.
    """
    index = directory / _INDEX
    if index.exists():
        files = _shards(index)
    elif (directory / _SINGLE).exists():
        files = [directory / _SINGLE]
    else:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never loaded" if pickled else ""
        raise ModelError(f"{directory} holds no {_SINGLE} and no {_INDEX}{hint}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= _read_header(file)
    return tensors


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is not an index of safetensors shards") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index} names a file outside its directory: {outside[0]}")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise ModelError(f"{index} names missing file(s): {', '.join(missing)}")
    return [index.parent / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ModelError(f"{file} is damaged or no safetensors file: its header is cut off")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {name: _entry(file, name, entry, 8 + length, size) for name, entry in header.items()}
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged or no safetensors file: {error!r}") from None


def _entry(file: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ModelError(f"{file}: tensor {name} has unsupported type {entry['dtype']}")
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize or start + last > size or first < 0:
        raise ModelError(f"{file} is damaged: tensor {name} {list(shape)} does not fit its bytes")
    return StoredTensor(file, start + first, shape, dtype)


def write_tensors(
    directory: Path, tensors: Mapping[str, TensorSource], dtype: np.dtype, *, shard_bytes: int
) -> None:
    """Writes ``model.safetensors``, or numbered shards of at most ``shard_bytes`` (or one
    tensor) with their index.
    """
    shards = _cut(tensors, dtype, shard_bytes)
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [_SINGLE]
    for file, names in zip(files, shards, strict=True):
        _write_file(directory / f"{file}.part", tensors, names, dtype)
    # Only now that all is written: a run that stops earlier leaves the old weights whole.
    for old in [*directory.glob("model*.safetensors"), *directory.glob(_INDEX)]:
        old.unlink()
    for file in files:
        (directory / f"{file}.part").rename(directory / file)
    if len(files) > 1:
        weights = zip(files, shards, strict=True)
        weight_map = {name: file for file, names in weights for name in names}
        total = sum(_bytes(source, dtype) for source in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / _INDEX, index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _bytes(source: TensorSource, dtype: np.dtype) -> int:
    return math.prod(source.shape) * dtype.itemsize


def _cut(tensors: Mapping[str, TensorSource], dtype: np.dtype, limit: int) -> list[list[str]]:
    """Consecutive names in shards of at most ``limit`` bytes; a larger tensor has a shard to
    itself.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, source in tensors.items():
        size = _bytes(source, dtype)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_file(
    path: Path, tensors: Mapping[str, TensorSource], names: list[str], dtype: np.dtype
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + _bytes(tensors[name], dtype)
        header[name] = {
            "dtype": _CODES[dtype.name],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    # Readers map the file; a header padded to eight bytes keeps every tensor aligned.
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            values = np.ascontiguousarray(tensors[name].fetch(), dtype)
            stream.write(values.reshape(-1).view(np.uint8).data)
