"""An update on disk, with all that it takes to compute it again: ``workdir/dumps/``.

A dump is a directory: ``dump.json`` (what the run saw, its config and mesh), ``model/config.json``,
``micro_batches.safetensors`` and ``params/``, the parameters before the update (Orbax).
"""

import dataclasses
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from echorl_jax.config_file import to_dict
from echorl_jax.errors import UserError, one_line
from echorl_jax.models import to_hf
from echorl_jax.models.tensor_files import write_json
from echorl_jax.parallel import any_process, is_first, wait_for_all
from echorl_jax.parallel.mesh import AXES
from echorl_jax.training.setup import Setup
from echorl_jax.training.step import UpdateStats
from echorl_jax.training.workdir import read_json
from echorl_jax.types import PyTree, TrainBatch

FACTS, BATCHES, PARAMS, MODEL = "dump.json", "micro_batches.safetensors", "params", "model"
# Of a dump's facts, those that a replay reads.
KINDS: Mapping[str, Any] = {
    **dict.fromkeys(("step", "update"), int),
    **dict.fromkeys(("loss", "grad_norm", "echo_coef"), float),
    **dict.fromkeys(("mesh", "config"), dict),
}


@dataclasses.dataclass(frozen=True)
class Dump:
    """A dump without its parameters."""

    directory: Path
    facts: Mapping[str, Any]
    micro_batches: Sequence[TrainBatch]  # NumPy


def room_for_dump(workdir: Path, most: int) -> bool:
    """Whether fewer than ``most`` updates are dumped already; the same on all processes."""
    found = len(list((workdir / "dumps").glob("step_*"))) if is_first() else 0
    return not any_process(found >= most)


def begin_dump(workdir: Path, step: int, update: int, params: PyTree) -> Path:
    """Writes the parameters that an update starts from, before they are given away.

    Every process of a multi-process run calls this and :func:`finish_dump`.

    Returns:
      The directory in progress.
    """
    partial = workdir / "dumps" / f"partial_{step:06d}_{update:02d}"
    if is_first():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all("dump begins")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((partial / PARAMS).resolve(), params)
    return partial


def finish_dump(
    partial: Path,
    setup: Setup,
    micro_batches: Iterable[TrainBatch],
    done: UpdateStats,
    *,
    echo_coef: float,
) -> Path:
    """Adds what the update was given and what came of it; returns the finished directory."""
    _, step, update = partial.name.split("_")
    final = partial.with_name(f"step_{step}_update_{update}")
    if is_first():
        arrays = {
            f"{number:05d}/{name}": np.ascontiguousarray(value)
            for number, micro in enumerate(micro_batches)
            for name, value in vars(micro).items()
            if value is not None
        }
        save_file(arrays, partial / BATCHES)
        (partial / MODEL).mkdir()
        write_json(partial / MODEL / "config.json", to_hf(setup.model.config))
        facts = {
            "step": int(step),
            "update": int(update),
            "loss": _number(done.loss),
            "grad_norm": _number(done.grad_norm),
            "finite": bool(done.finite),
            "echo_coef": echo_coef,
            "mesh": dict(setup.mesh.shape),
            "config": to_dict(setup.config),
        }
        write_json(partial / FACTS, facts)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    wait_for_all("dump ends")
    return final


def read_dump(directory: Path) -> Dump:
    """Reads all but the parameters.

    Raises:
      UserError: this is no dump.
    """
    try:
        facts = read_json(directory / FACTS)
        facts |= {name: kind(facts[name]) for name, kind in KINDS.items()}
        facts["mesh"] = {axis: int(facts["mesh"][axis]) for axis in AXES}
        if min(facts["mesh"].values()) < 1:
            raise ValueError(f"mesh {facts['mesh']}")
        arrays = load_file(directory / BATCHES)
        fields: dict[str, dict[str, Any]] = {}
        for name, value in sorted(arrays.items()):
            number, _, field = name.partition("/")
            fields.setdefault(number, {})[field] = value
        micro_batches = [TrainBatch(**values) for values in fields.values()]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"{directory} is no whole dump of an update: {one_line(error)}") from error
    return Dump(directory, facts, micro_batches)


def _number(value: Any) -> float | str:
    """JSON has no NaN and no infinity."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
