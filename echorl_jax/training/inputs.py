"""The rows, prompts and weights that a run reads at each start, told from others of the same name.

A run goes on bit for bit only with the inputs that it began with. Their digests are saved in each
checkpoint and compared at the next start, and between the processes at every start.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jax
import jax.numpy as jnp

from echorl_jax.config import Config, ConfigError
from echorl_jax.data import Rows, Template, encode_rows, load_rows
from echorl_jax.data.tokens import keep_date
from echorl_jax.parallel import require_same, texts_from_shares
from echorl_jax.training.setup import Setup
from echorl_jax.types import Array, PyTree


def digest(content: Any) -> str:
    """SHA-256 of the JSON text of a value.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    True
    """
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def checksums(tree: PyTree) -> dict[str, int]:
    """One number below 2**32 for each array, by its path in the tree.

    It is the sum of the array's words, each times an odd number that belongs to its place, modulo
    2**32: exact in any order, so that the sharding does not matter, and computed where the array
    lives. A change of any single word changes it.
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    values = jax.device_get(_checksums(jax.tree.leaves(tree)))
    return {path: int(value) for path, value in zip(paths, values, strict=True)}


@jax.jit
def _checksums(leaves: list[Array]) -> list[Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(array: Array) -> Array:
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    words = words.astype(jnp.uint32)
    place, stride = jnp.ones(array.shape, jnp.uint32), 2
    for axis in reversed(range(array.ndim)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place += steps * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(words * place, dtype=jnp.uint32)


ROWS, PROMPTS, WEIGHTS = "rows", "prompts", "weights"
# The time of the first start, which chat templates may write into prompts.
STARTED = "started"
# Rows whose prompts are compared: enough to notice another tokenizer or chat template.
SAMPLE = 16


def weights_digest(config: Config, params: PyTree) -> str:
    """Tells the initial weights from others, or the frozen ones of a run with adapters; empty where
    they are drawn, from ``config.seed``.
    """
    return digest(checksums(params)) if config.model.init == "pretrained" else ""


def read_inputs(
    setup: Setup, rows: Rows, weights: str, before: Mapping[str, str]
) -> dict[str, str]:
    """Digests of what this start reads. A chat template's date becomes that of the first start.

    Args:
      weights: from :func:`weights_digest`.
      before: the inputs of the checkpoint that the run goes on from; empty in a new run.

    Raises:
      UserError: the processes have different inputs.
    """
    now = datetime.now().isoformat(timespec="seconds")
    started = before.get(STARTED) or texts_from_shares([now], jax.process_count(), most_bytes=32)[0]
    keep_date(setup.tokenizer, datetime.fromisoformat(started))
    data = setup.config.data
    sample = [rows[place] for place in range(min(SAMPLE, len(rows)))]
    prompts = encode_rows(
        setup.tokenizer, sample, Template.of(data), setup.processor, source="data.train"
    )
    found = {ROWS: rows.digest, PROMPTS: digest(prompts), WEIGHTS: weights}
    if setup.config.eval.every:
        found[data.eval] = load_rows(data.eval, on_bad_row=data.on_bad_row).digest
    require_same({_name(key, setup.config): value for key, value in found.items()})
    return {**found, STARTED: started}


def compare_inputs(
    now: Mapping[str, str],
    before: Mapping[str, str],
    config: Config,
    *,
    weights_in_use: bool,
    warn: Callable[[str], None],
) -> None:
    """Refuses inputs with which the run would not go on as it began; warns of others.

    Args:
      now: from :func:`read_inputs`.
      before: those of the checkpoint; a name that is missing there is not compared.
      weights_in_use: whether the initial weights stay in use, beside adapters or as the reference
        of a KL term.
      warn: takes a line.

    Raises:
      ConfigError: names the input that has changed.
    """
    for key, value in now.items():
        if key == STARTED or value == before.get(key, value):
            continue
        name = _name(key, config)
        if key in (ROWS, PROMPTS) or (key == WEIGHTS and weights_in_use):
            raise ConfigError(
                f"the {name} are not those that the run began with, so that it cannot go on as it "
                "would have; put them back, or take another --workdir"
            )
        warn(f"warning: the {name} are not those that the run began with")


def _name(key: str, config: Config) -> str:
    return {
        ROWS: f"rows under config.data.train = {config.data.train!r}",
        PROMPTS: f"prompts that the tokenizer of config.model.path = {config.model.path!r} makes",
        WEIGHTS: f"weights under config.model.path = {config.model.path!r}",
    }.get(key, f"rows under config.data.eval = {key!r}")
