"""Operations and bytes of a training step by formula, and the time they take at a chip's peaks.

The compiler's own count is of no use here: it counts the body of a loop once, and layers,
micro-batches and tokens are loops. Communication between chips (see ``communication.py``) and
grading are not counted, so the times are lower bounds.
"""

import dataclasses
import math

import jax

from echorl_jax.models import Decoder
from echorl_jax.rollout import turn_cost
from echorl_jax.rollout.cost import layer_weights
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


def decode_turns(setup: Setup, lengths: Lengths) -> float:
    """Turns of the decode loop in a step, all slots busy: N rows of c tokens take N c / M."""
    return setup.sampled_rows * lengths.completion / setup.slots


def _decode(setup: Setup, lengths: Lengths) -> Phase:
    cost = turn_cost(
        setup.model,
        slots=setup.slots,
        prompt_tokens=lengths.prompt,
        completion_tokens=lengths.completion / 2,
        group_size=setup.sampled_group_size if setup.slots >= setup.sampled_rows else 1,
        kv_dtype=setup.config.rollout.kv_dtype,
    )
    turns = decode_turns(setup, lengths)
    chips = setup.mesh.size
    # Weights are split over tensor only: each group of chips reads them all.
    read = cost.weight_bytes / setup.mesh.shape["tensor"] + cost.cache_bytes / chips
    return Phase("decode", cost.flops * turns / chips, read * turns)
