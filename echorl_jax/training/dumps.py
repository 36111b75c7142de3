"""An update on disk, with all that it takes to compute it again: ``workdir/dumps/``.

A dump is a directory: ``dump.json`` (what the run saw, its config and mesh), ``model/config.json``,
``micro_batches.safetensors`` and ``params/``, the parameters before the update (Orbax).
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from echorl_jax.training.workdir import read_json
from echorl_jax.types import PyTree, TrainBatch

if TYPE_CHECKING:
    from echorl_jax.training.update import UpdateStats

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


class Dumps:
    """Writes the update of ``debug.dump_step``, and updates that are not finite.

    Every process of a multi-process run makes the same calls.

    Args:
      workdir: of the run.
      setup: of the run.
      say: is called with a line on each dump.
    """

    def __init__(self, workdir: Path, setup: Setup, say: Callable[[str], None]) -> None:
        self._workdir, self._setup, self._say = workdir, setup, say
        self._partial: Path | None = None  # of the update in progress

    def before(self, step: int, update: int, params: PyTree) -> None:
        """Writes the parameters if the update was asked for: they are donated to it."""
        self._partial = None
        if update == 0 and step == self._setup.config.debug.dump_step:
            self._partial = self._write_params(step, update, params)

    def after(
        self,
        step: int,
        update: int,
        params: PyTree,
        done: "UpdateStats",
        micro_batches: Iterable[TrainBatch],
        *,
        echo_coef: float,
    ) -> None:
        """Writes the rest, and the parameters of an update that left them as they were."""
        if self._partial is None and not done.finite and self._has_room():
            self._partial = self._write_params(step, update, params)
        if self._partial is not None:
            path = self._finish(self._partial, micro_batches, done, echo_coef=echo_coef)
            self._say(f"step {step}: update written to {path} for `echorl replay`")

    def _has_room(self) -> bool:
        """Whether fewer than ``debug.max_dumps`` are there; the same on all processes."""
        count = len(list((self._workdir / "dumps").glob("step_*"))) if is_first() else 0
        return not any_process(count >= self._setup.config.debug.max_dumps)

    def _write_params(self, step: int, update: int, params: PyTree) -> Path:
        partial = self._workdir / "dumps" / f"partial_{step:06d}_{update:02d}"
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        wait_for_all("dump begins")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((partial / PARAMS).resolve(), params)
        return partial

    def _finish(
        self,
        partial: Path,
        micro_batches: Iterable[TrainBatch],
        done: "UpdateStats",
        *,
        echo_coef: float,
    ) -> Path:
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
            write_json(partial / MODEL / "config.json", to_hf(self._setup.model.config))
            facts = {
                "step": int(step),
                "update": int(update),
                "loss": _number(done.loss),
                "grad_norm": _number(done.grad_norm),
                "finite": bool(done.finite),
                "echo_coef": echo_coef,
                "mesh": dict(self._setup.mesh.shape),
                "config": to_dict(self._setup.config),
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
