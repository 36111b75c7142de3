"""Computes a dumped update again, and finds what is not finite in it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from echorl_jax.config_file import from_dict
from echorl_jax.models import abstract_params, load_decoder
from echorl_jax.parallel import make_mesh, platform_of
from echorl_jax.training.checkpoints import read_weights
from echorl_jax.training.dumps import MODEL, PARAMS, Dump, read_dump
from echorl_jax.training.optimizer import init_state
from echorl_jax.training.setup import Setup, configured_objective, model_options, static_setup
from echorl_jax.training.update import Accumulated, apply_update, micro_gradient
from echorl_jax.types import HostArray, PyTree, TrainBatch

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
    """What the update gives now, beside what the run saw."""

    dump: Dump
    loss: float
    grad_norm: float
    pieces: Sequence[Piece]
    same_mesh: bool

    @property
    def reproduced(self) -> bool:
        """Whether the numbers are the run's: bit for bit on its mesh, else within rounding."""
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
    model = load_decoder(directory / MODEL, **model_options(config))
    objective = configured_objective(config)
    setup = static_setup(config, mesh, model, objective, platform=platform_of(mesh))
    params = read_weights(directory / PARAMS, abstract_params(setup.model, mesh))
    coef = dump.facts["echo_coef"]
    pieces = [_look_at(setup, params, micro, coef) for micro in dump.micro_batches]
    state = init_state(params, setup.optimizer, mesh)
    _, stats = apply_update(setup, state, dump.micro_batches, echo_coef=coef)
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


def _look_at(setup: Setup, params: PyTree, micro: TrainBatch, coef: float) -> Piece:
    found = micro_gradient(setup, params, micro, echo_coef=coef)
    bad_params = tuple(
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(found.gradient)
        if not np.isfinite(leaf).all()
    )
    bad_rows: tuple[int, ...] = ()
    if not _finite(found):
        bad_rows = tuple(_bad_rows(setup, params, micro, coef, np.arange(len(micro.length))))
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
    setup: Setup, params: PyTree, micro: TrainBatch, coef: float, rows: np.ndarray
) -> list[int]:
    """The rows that are not finite on their own, by halves."""
    if _finite(micro_gradient(setup, params, _only(micro, rows), echo_coef=coef)):
        return []
    if len(rows) == 1:
        return rows.tolist()
    halves = np.array_split(rows, 2)
    return [row for half in halves for row in _bad_rows(setup, params, micro, coef, half)]


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
