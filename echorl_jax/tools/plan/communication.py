"""An estimate of what the chips of a mesh send each other in a training step, axis by axis.

Counted are the exchanges that grow with weights or tokens, as the sharding table implies them; not
latency, vocabulary sums, the embedding, or what a compiler merges or avoids. A chip is taken to use
all its links at once. What is hidden behind computation is unknown, so that these seconds stand
beside the roofline's and are not added to them.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax

from echorl_jax.parallel import local_bytes
from echorl_jax.tools.plan.chips import Chip
from echorl_jax.tools.plan.roofline import Lengths, decode_turns
from echorl_jax.training.setup import Setup


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a phase of a step sends along one mesh axis."""

    phase: str
    axis: str
    bytes: float  # by one chip in a step

    def seconds(self, chip: Chip) -> float | None:
        """Time at the speed of the chip's links; None where that is not known."""
        speed = chip.link_bytes_per_second
        return None if speed is None else self.bytes / speed


def gathered(whole: float, chips: int) -> float:
    """Bytes a chip sends for an array of ``whole`` bytes to be gathered, or reduced and scattered.

    On a ring each chip passes on all parts but one: ``(n - 1) / n`` of the whole.

    >>> gathered(80.0, 4)
    60.0
    """
    return whole * (chips - 1) / chips


def all_reduced(whole: float, chips: int) -> float:
    """Bytes a chip sends to add up arrays of ``whole`` bytes: reduce and scatter, then gather.

    >>> all_reduced(80.0, 4)
    120.0
    """
    return 2 * gathered(whole, chips)


def exchanges(setup: Setup, lengths: Lengths) -> list[Exchange]:
    """What a chip sends in a step with rows of these mean lengths; none where an axis is 1.

    With W bytes of weights in the compute type on a chip that has its part of ``tensor`` only, and
    A bytes of hidden states of the tokens on a chip:

    * ``weights``: the sampler's copy is gathered over ``fsdp`` once, W.
    * ``prefill``, ``decode``, each turn: two all-reduces of A in a layer over ``tensor``.
    * ``score``: W gathered over ``fsdp`` for each micro-batch, two all-reduces in a layer.
    * ``accumulate``, each micro-batch: W gathered over ``fsdp`` forward and backward, gradients
      reduced and scattered; what is then on a chip all-reduced over ``data``; two all-reduces in a
      layer over ``tensor`` forward, two backward, two where layers are recomputed.
    """
    found = _learning(setup, lengths)
    if not setup.objective.supervised:
        found = [*_sampling(setup, lengths), *found]
    return [exchange for exchange in found if exchange.bytes]


def _sampling(setup: Setup, lengths: Lengths) -> Iterator[Exchange]:
    prompts = setup.config.rollout.prompts_per_step
    yield Exchange("weights", "fsdp", gathered(_weight_bytes(setup), setup.mesh.shape["fsdp"]))
    yield Exchange("prefill", "tensor", _layers(setup, prompts * lengths.prompt / setup.shards))
    turn = _layers(setup, setup.slots / setup.shards)
    yield Exchange("decode", "tensor", turn * decode_turns(setup, lengths))


def _learning(setup: Setup, lengths: Lengths) -> Iterator[Exchange]:
    config, mesh = setup.config, setup.mesh.shape
    weights = _weight_bytes(setup)
    tokens = setup.rows * (lengths.prompt + lengths.completion)
    layers = _layers(setup, tokens / setup.shards)
    parts = setup.mini_batches
    micro = parts * math.ceil(tokens / parts / math.prod(setup.micro_batch))
    if passes := setup.scoring_passes:
        yield Exchange("score", "fsdp", passes * micro * gathered(weights, mesh["fsdp"]))
        yield Exchange("score", "tensor", passes * layers)
    epochs = config.objective.epochs
    micro *= epochs
    yield Exchange("accumulate", "fsdp", 3 * micro * gathered(weights, mesh["fsdp"]))
    own = weights / mesh["fsdp"]
    yield Exchange("accumulate", "data", micro * all_reduced(own, mesh["data"]))
    times = 3 if setup.model.remat == "layer" else 2
    yield Exchange("accumulate", "tensor", times * epochs * layers)


def _weight_bytes(setup: Setup) -> int:
    """All weights in the compute type, split over ``tensor`` alone."""
    narrow = jax.eval_shape(setup.model.cast, setup.model.param_shapes())
    return local_bytes(setup.model.param_axes(), narrow, setup.mesh, "rollout")


def _layers(setup: Setup, tokens: float) -> float:
    """One pass through all layers: attention and MLP each add up their parts."""
    size = 2 if setup.model.dtype == "bfloat16" else 4
    shape = setup.model.config
    one = all_reduced(tokens * shape.hidden_size * size, setup.mesh.shape["tensor"])
    return 2 * shape.num_layers * one
