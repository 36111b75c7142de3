"""A chip's memory by formula: for GPUs, whose compiler is not here, and to rank what to try."""

import dataclasses
import functools

from echorl_jax.tools.plan.programs import Memory
from echorl_jax.training.capacity import persistent_memory, sampling_memory
from echorl_jax.training.setup import Setup

# Tokens whose logits exist at once in the update; see rollout.scoring.
LOGIT_CHUNK = 1024
# Copies of one layer's hidden and MLP features that its backward pass holds, in the compute type:
# inputs, outputs and gradients of its products. Fitted to the compiler's 30.3 GB for Qwen2.5-7B on
# v5p:2x2x2 with 32,768 tokens a chip.
LAYER_COPIES = 10


def estimate(setup: Setup) -> list[Memory]:
    """The programs of a step with the terms that grow with tokens, rows and vocabulary.

    Sampling: see :func:`echorl_jax.rollout.rollout_memory`. Learning, with n tokens on a chip: the
    input of every layer is kept (``n D L`` numbers; without rematerialisation every product), one
    layer's products are held at once, and of the logits of 1,024 tokens three copies; the head's
    gradient is summed in float32 on every chip.
    """
    held, rollout = persistent_memory(setup), sampling_memory(setup)
    sampling = functools.partial(
        Memory,
        weights=held.master + held.reference + held.sampler,
        optimizer=held.moments,
        gradient=0,
        cache=rollout.cache,
        batch=rollout.outputs,
        source="formula",
    )
    learning = functools.partial(
        Memory,
        weights=held.master + held.reference,
        optimizer=held.moments,
        gradient=held.master,
        cache=0,
        source="formula",
    )
    # A smaller number of slots is a copy: both are there while it is made.
    shrink = sampling_memory(dataclasses.replace(setup, slots=max(setup.slots // 2, 1))).slots
    return [
        sampling("prefill", temporaries=rollout.logits),
        sampling("decode", temporaries=max(rollout.logits, shrink)),
        learning("accumulate", batch=_batch_bytes(setup), temporaries=activation_bytes(setup)),
        learning("apply", batch=0, temporaries=0),
    ]


def activation_bytes(setup: Setup) -> int:
    """What the backward pass of the largest micro-batch holds on a chip."""
    rows, width = setup.micro_batch
    shape, tensor = setup.model.config, setup.mesh.shape["tensor"]
    tokens = rows * width // setup.shards
    size = 2 if setup.model.dtype == "bfloat16" else 4
    kept = tokens * shape.hidden_size * shape.num_layers * size
    layer = LAYER_COPIES * tokens * (shape.hidden_size + shape.intermediate_size // tensor) * size
    if setup.model.remat == "none":
        layer *= shape.num_layers
    elif setup.model.remat == "dots":
        layer += (
            tokens
            * (shape.hidden_size + shape.intermediate_size // tensor)
            * (3 * size * shape.num_layers)
        )
    vocab = shape.vocab_size // tensor if shape.vocab_size % tensor == 0 else shape.vocab_size
    logits = 3 * max(LOGIT_CHUNK // setup.shards, 1) * vocab * 4
    head = 2 * shape.hidden_size * vocab * 4
    # The new gradient exists beside the sum that it is added to.
    return kept + layer + logits + head + persistent_memory(setup).master


def _batch_bytes(setup: Setup) -> int:
    rows, width = setup.micro_batch
    fields = 6 + bool(setup.objective.hints) + bool(setup.objective.kl_coef)
    return rows // setup.shards * width * 4 * fields
