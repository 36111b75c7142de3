"""Reads and writes safetensors files.

Reading uses a memory map, so that a slice of a tensor reads only that slice. Writing holds one
shard in memory.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from echorl_jax.files import replace_json
from echorl_jax.models.config import ModelError

_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Largest JSON file that is read; the index of a model of 1T parameters has some 10 MB.
_JSON_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The file, offset, shape and type of a stored tensor."""

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
    """A tensor to be written; its values are fetched just before."""

    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a model directory, by name.

    Raises:
      ModelError: no safetensors, a missing shard, a damaged file, or two sets of weights.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _files(directory):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ModelError(f"{tensors[name].file} and {file} both hold tensor {name}")
            tensors[name] = tensor
    return tensors


def _files(directory: Path) -> list[Path]:
    """The files that transformers reads: ``model.safetensors`` if it exists, else the shards of the
    index. A directory with both holds two saves, and the newer one cannot be told.
    """
    single, index = directory / _SINGLE, directory / _INDEX
    shards = _shards(index) if index.exists() else []
    if single.exists():
        others = [file.name for file in shards if file != single and file.exists()]
        if others:
            raise ModelError(
                f"{directory} holds {_SINGLE} and {_INDEX}, which names other weights "
                f"({others[0]}); delete the weights that are out of date"
            )
        return [single]
    missing = [file.name for file in shards if not file.exists()]
    if missing:
        raise ModelError(f"{index} names missing file(s): {', '.join(missing)}")
    if not shards:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never loaded" if pickled else ""
        raise ModelError(f"{directory} holds no {_SINGLE} and no {_INDEX}{hint}")
    return shards


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index} is not an index of safetensors shards")
    # A backslash is a separator on some systems; no system allows a null byte.
    outside = [name for name in names if Path(name).name != name or {"\\", "\0"} & set(name)]
    if outside:
        raise ModelError(f"{index} names a file outside its directory: {outside[0]!r:.99}")
    return [index.parent / name for name in sorted(set(names))]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. safetensors checks that they leave no gap and do not overlap, so
    offsets are sums of sizes.
    """
    tensors = {}
    try:
        with file.open("rb") as stream:
            offset = 8 + int.from_bytes(stream.read(8), "little")
        with safe_open(file, framework="numpy") as opened:
            for name in opened.offset_keys():
                entry = opened.get_slice(name)
                shape, code = tuple(entry.get_shape()), entry.get_dtype()
                if code not in _DTYPES:
                    raise ModelError(f"{file}: tensor {name} has unsupported type {code}")
                tensors[name] = StoredTensor(file, offset, shape, np.dtype(_DTYPES[code]))
                offset += math.prod(shape) * tensors[name].dtype.itemsize
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{file} is not a readable safetensors file: {reason:.200}") from None
    return tensors


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
        values = {name: np.ascontiguousarray(tensors[name].fetch(), dtype) for name in names}
        save_file(values, directory / f"{file}.part", {"format": "pt"})
    # Delete the old weights only now: a run that stops earlier leaves them complete.
    for old in [*directory.glob("model*.safetensors"), *directory.glob(_INDEX)]:
        old.unlink()
    for file in files:
        (directory / f"{file}.part").rename(directory / file)
    if len(files) > 1:
        weights = zip(files, shards, strict=True)
        weight_map = {name: file for file, names in weights for name in names}
        total = sum(_bytes(source, dtype) for source in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        replace_json(directory / _INDEX, index)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
      ModelError: no such file, or one that holds anything else or is longer than 100 MB.
    """
    try:
        with path.open("rb") as stream:
            text = stream.read(_JSON_BYTES + 1)
        raw = json.loads(text)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    # ValueError includes text that is not UTF-8 and numbers with too many digits.
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return raw


def _bytes(source: TensorSource, dtype: np.dtype) -> int:
    return math.prod(source.shape) * dtype.itemsize


def _cut(tensors: Mapping[str, TensorSource], dtype: np.dtype, limit: int) -> list[list[str]]:
    """Consecutive names in shards of at most ``limit`` bytes; a larger tensor fills one shard."""
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
