"""Dumps updates, computes them again, and finds the rows and parameters that are not finite.

A dump is a directory in ``workdir/dumps/``: ``dump.json`` (what the run saw, its config and mesh),
``model/config.json``, ``micro_batches.safetensors`` and ``params/``, the parameters before the
update (Orbax).
"""

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from echorl_jax.config import Config
from echorl_jax.config_file import from_dict, to_dict
from echorl_jax.errors import UserError, one_line
from echorl_jax.files import read_json, replace_directory, replace_json
from echorl_jax.models import abstract_params, load_decoder, split_params, to_hf
from echorl_jax.parallel import any_process, is_first, make_mesh, platform_of, wait_for_all
from echorl_jax.parallel.mesh import AXES
from echorl_jax.training.checkpoints import read_weights
from echorl_jax.training.inputs import weights_digest
from echorl_jax.training.optimizer import init_state
from echorl_jax.training.setup import (
    Setup,
    configured_model,
    configured_objective,
    load_policy,
    model_options,
    static_setup,
)
from echorl_jax.training.update import Accumulated, UpdateStats, apply_update, micro_gradient
from echorl_jax.types import HostArray, PyTree, TrainBatch

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

    Updates with pictures are not written, and a line says so: their features depend on the tower,
    so a replay would need the pictures too. Every process of a run makes the same calls.

    Args:
      say: is called with a line on each dump.
      weights: digest of the frozen parameters, which are not part of a dump.
    """

    def __init__(
        self, workdir: Path, setup: Setup, say: Callable[[str], None], weights: str = ""
    ) -> None:
        self._workdir, self._setup, self._say, self._weights = workdir, setup, say, weights
        self._partial: Path | None = None  # of the update in progress

    def before(self, step: int, update: int, params: PyTree) -> None:
        """Writes the parameters if the update was asked for: they are donated to it."""
        self._partial = None
        if update == 0 and step == self._setup.config.debug.dump_step and self._possible(step):
            self._partial = self._write_params(step, update, params)

    def after(
        self,
        step: int,
        update: int,
        params: PyTree,
        done: UpdateStats,
        micro_batches: Iterable[TrainBatch],
        *,
        echo_coef: float,
    ) -> None:
        """Writes the rest, and the parameters of an update that left them as they were."""
        if self._partial is None and not done.finite and self._has_room() and self._possible(step):
            self._partial = self._write_params(step, update, params)
        if self._partial is not None:
            path = self._finish(self._partial, micro_batches, done, echo_coef=echo_coef)
            self._say(f"step {step}: update written to {path} for `echorl replay`")

    def _possible(self, step: int) -> bool:
        """False, with a line, for a model with a vision tower."""
        if self._setup.model.config.vision is None:
            return True
        self._say(f"step {step}: updates with pictures are not written for `echorl replay`")
        return False

    def _has_room(self) -> bool:
        """True if fewer than ``debug.max_dumps`` are there; the same on all processes."""
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
        done: UpdateStats,
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
            replace_json(partial / MODEL / "config.json", to_hf(self._setup.model.config))
            facts = {
                "step": int(step),
                "update": int(update),
                "loss": _number(done.loss),
                "grad_norm": _number(done.grad_norm),
                "finite": bool(done.finite),
                "echo_coef": echo_coef,
                "weights": self._weights,
                "mesh": dict(self._setup.mesh.shape),
                "config": to_dict(self._setup.config),
            }
            replace_json(partial / FACTS, facts)
            replace_directory(partial, final)
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


# Accepted relative difference on another mesh than the run's, where sums have another order.
OTHER_MESH = 1e-2


@dataclasses.dataclass(frozen=True)
class Piece:
    """One micro-batch of the update."""

    rows: int  # without padding
    width: int  # tokens
    loss: float
    grad_norm: float
    bad_params: tuple[str, ...]  # whose gradient is not finite
    bad_rows: tuple[int, ...]  # that make it so, each on its own
    bad_fields: tuple[str, ...]  # of these rows, that were not finite to begin with


@dataclasses.dataclass(frozen=True)
class Replayed:
    """The results of a replayed update beside those of the run."""

    dump: Dump
    loss: float
    grad_norm: float
    pieces: Sequence[Piece]
    same_mesh: bool

    @property
    def reproduced(self) -> bool:
        """True if the numbers equal the run's: bit for bit on its mesh, else within rounding."""
        seen = [float(self.dump.facts[name]) for name in ("loss", "grad_norm")]
        pairs = list(zip((self.loss, self.grad_norm), seen, strict=True))
        if self.same_mesh:
            return all(now == then or math.isnan(now) and math.isnan(then) for now, then in pairs)
        return all(
            math.isclose(now, then, rel_tol=OTHER_MESH, abs_tol=1e-6)
            or not (math.isfinite(now) or math.isfinite(then))
            for now, then in pairs
        )


def replay(directory: Path) -> Replayed:
    """Computes the update with the run's programs, on the run's mesh where there are the devices.

    Raises:
      UserError: this is no dump, or its parameters cannot be read.
    """
    dump = read_dump(directory)
    config = from_dict(dump.facts["config"])
    mesh, same_mesh = _mesh(dump.facts["mesh"])
    base = load_decoder(directory / MODEL, **model_options(config))
    model = configured_model(config, base)
    objective = configured_objective(config)
    setup = static_setup(config, mesh, model, objective, platform=platform_of(mesh))
    frozen = _frozen(dump, config, setup)
    _, like = split_params(setup.model, abstract_params(setup.model, mesh))
    params = read_weights(directory / PARAMS, like)
    coef = dump.facts["echo_coef"]
    gradient = functools.partial(micro_gradient, setup, params, echo_coef=coef, frozen=frozen)
    pieces = [_look_at(gradient, micro) for micro in dump.micro_batches]
    state = init_state(params, setup.optimizer, mesh)
    _, stats = apply_update(setup, state, dump.micro_batches, echo_coef=coef, frozen=frozen)
    return Replayed(dump, float(stats.loss), float(stats.grad_norm), pieces, same_mesh)


def describe(replayed: Replayed) -> Iterator[str]:
    """The lines that ``echorl replay`` prints."""
    facts = replayed.dump.facts
    yield f"step {facts['step']}, update {facts['update']}: {len(replayed.pieces)} micro-batch(es)"
    for number, piece in enumerate(replayed.pieces):
        yield (
            f"  micro-batch {number}: {piece.rows} rows of {piece.width} tokens, "
            f"loss {piece.loss:.9g}, gradient norm {piece.grad_norm:.9g}"
        )
        if piece.bad_params:
            more = f" and {len(piece.bad_params) - 3} more" if len(piece.bad_params) > 3 else ""
            yield f"    gradient not finite: {', '.join(piece.bad_params[:3])}{more}"
        if piece.bad_rows:
            yield f"    by row(s): {', '.join(map(str, piece.bad_rows))}"
        elif not math.isfinite(piece.loss) or piece.bad_params:
            yield "    by no row on its own: only their sum is not finite"
        if piece.bad_fields:
            yield f"    not finite in the data: {', '.join(piece.bad_fields)}"
    yield f"loss           {replayed.loss:.9g}   the run saw {facts['loss']}"
    yield f"gradient norm  {replayed.grad_norm:.9g}   the run saw {facts['grad_norm']}"
    where = "" if replayed.same_mesh else f" (another mesh: within {OTHER_MESH:g})"
    yield f"reproduced{where}" if replayed.reproduced else f"NOT reproduced{where}"


def _mesh(sizes: dict[str, int]) -> tuple[Mesh, bool]:
    """The run's mesh, or all devices on the parameters where there are too few."""
    devices = jax.devices()
    count = math.prod(sizes.values())
    if count <= len(devices):
        return make_mesh(**sizes, devices=devices[:count]), True
    return make_mesh(data=1, fsdp=len(devices), tensor=1), False


def _frozen(dump: Dump, config: Config, setup: Setup) -> PyTree:
    """The frozen parameters, from where the run had them; None if it trained all.

    Raises:
      UserError: those are others now.
    """
    if setup.model.lora is None:
        return None
    frozen, _ = split_params(*load_policy(config, setup.mesh))
    if dump.facts.get("weights") != weights_digest(config, frozen):
        raise UserError(
            f"{dump.directory}: the weights under config.model.path = {config.model.path!r} are "
            "not those of the run"
        )
    return frozen


def _look_at(gradient: Callable[[TrainBatch], Accumulated], micro: TrainBatch) -> Piece:
    found = gradient(micro)
    bad_params = tuple(
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(found.gradient)
        if not np.isfinite(leaf).all()
    )
    bad_rows: tuple[int, ...] = ()
    if not _finite(found):
        bad_rows = tuple(_bad_rows(gradient, micro, np.arange(len(micro.length))))
    return Piece(
        rows=int(np.sum(np.asarray(micro.length) > 1)),
        width=int(micro.tokens.shape[1]),
        loss=float(found.loss),
        grad_norm=float(optax.tree.norm(found.gradient)),
        bad_params=bad_params,
        bad_rows=bad_rows,
        bad_fields=tuple(_bad_fields(micro, bad_rows)),
    )


def _finite(found: Accumulated) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found.loss, found.gradient)))


def _bad_rows(
    gradient: Callable[[TrainBatch], Accumulated], micro: TrainBatch, rows: np.ndarray
) -> list[int]:
    """The rows that are not finite on their own, by halves."""
    if _finite(gradient(_only(micro, rows))):
        return []
    if len(rows) == 1:
        return rows.tolist()
    halves = np.array_split(rows, 2)
    return [row for half in halves for row in _bad_rows(gradient, micro, half)]


def _only(micro: TrainBatch, rows: np.ndarray) -> TrainBatch:
    """The micro-batch with all other rows blank, in the same shapes."""

    def blank(path: tuple[Any, ...], value: HostArray) -> HostArray:
        fill = 1 if path[0].name in ("prompt_length", "length") else 0
        kept = np.full_like(value, fill)
        kept[rows] = value[rows]
        return kept

    return jax.tree_util.tree_map_with_path(blank, micro)


def _bad_fields(micro: TrainBatch, rows: Sequence[int]) -> Iterator[str]:
    for row in rows:
        for name, value in vars(micro).items():
            if value is not None and not np.isfinite(value[row]).all():
                yield f"{name}[{row}]"
