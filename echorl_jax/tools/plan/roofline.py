"""Operations, bytes and exchanges of a training step by formula, and their least times on a chip.

The compiler's count does not serve here: it counts the body of a loop once, and layers,
micro-batches and tokens are loops. Grading is not counted, so the times are lower bounds. What
chips send each other stands beside the roofline's seconds and is not added to them, because the
share that hides behind computation is unknown. Exchanges are those that grow with weights or
tokens, as the sharding table implies them; latency, vocabulary sums, the embedding, and what a
compiler merges or avoids are not counted. A chip is taken to use all its links at once.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax

from echorl_jax.models import Decoder
from echorl_jax.parallel import local_bytes
from echorl_jax.rollout import decode_step_cost
from echorl_jax.rollout.memory import layer_weights
from echorl_jax.tools.plan.chips import Chip
from echorl_jax.training.setup import Setup


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Mean tokens of a row: what the time depends on, while memory depends on the bounds."""

    prompt: float
    completion: float


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the step on one chip."""

    name: str
    flops: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / chip.flops_per_second, self.bytes / chip.bytes_per_second)


def forward_flops(model: Decoder, *, length: float, targets: float) -> float:
    """Operations of one row's forward pass.

    With W weights in the layers' matrices, L layers, H heads of size K and n tokens:
    ``2 W n + 2 L H K n^2`` (a causal mask leaves half of ``4 L H K n^2``), and ``2 D V`` for each
    of the ``targets``, the only positions with logits.
    """
    config = model.config
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * length**2
    head = 2 * config.hidden_size * config.vocab_size * targets
    return 2 * layer_weights(model) * length + attention + head


def step_phases(setup: Setup, lengths: Lengths) -> list[Phase]:
    """Sampling, scoring if the config asks for it, and learning, all rows with a gradient."""
    config, chips = setup.config, setup.mesh.size
    rollout, objective = config.rollout, config.objective
    rows = setup.rows
    length = lengths.prompt + lengths.completion
    whole = forward_flops(setup.model, length=length, targets=lengths.completion)
    layers = forward_flops(setup.model, length=length, targets=0)
    # Backward costs two forward passes; logits are always computed again, layers as remat says.
    learn = 3 * whole + (whole - layers) + (layers if setup.model.remat == "layer" else 0)
    passes = setup.scoring_passes
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.model.param_shapes()))
    updates = setup.mini_batches * objective.epochs
    # Parameters, both moments: read and written; gradient: read. Float32.
    apply = Phase("apply", 0.0, 28 * params * updates / (chips / setup.mesh.shape["data"]))
    return [
        Phase(
            "prefill",
            forward_flops(setup.model, length=lengths.prompt, targets=0)
            * rollout.prompts_per_step
            / chips,
            0.0,
        ),
        _decode(setup, lengths),
        *([Phase("score", whole * rows * passes / chips, 0.0)] if passes else []),
        Phase("accumulate", learn * rows * objective.epochs / chips, 0.0),
        apply,
    ]


def decode_steps(setup: Setup, lengths: Lengths) -> float:
    """Decode steps in a training step, all slots busy: N rows of c tokens take N c / M."""
    return setup.sampled_rows * lengths.completion / setup.slots


def _decode(setup: Setup, lengths: Lengths) -> Phase:
    cost = decode_step_cost(
        setup.model,
        slots=setup.slots,
        prompt_tokens=lengths.prompt,
        completion_tokens=lengths.completion / 2,
        group_size=setup.sampled_group_size if setup.slots >= setup.sampled_rows else 1,
        kv_dtype=setup.config.rollout.kv_dtype,
    )
    steps = decode_steps(setup, lengths)
    chips = setup.mesh.size
    # Weights are split over tensor only: each group of chips reads them all.
    read = cost.weight_bytes / setup.mesh.shape["tensor"] + cost.cache_bytes / chips
    return Phase("decode", cost.flops * steps / chips, read * steps)


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
    * ``prefill``, ``decode``, each decode step: two all-reduces of A in a layer over ``tensor``.
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
    decode_step = _layers(setup, setup.slots / setup.shards)
    yield Exchange("decode", "tensor", decode_step * decode_steps(setup, lengths))


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
