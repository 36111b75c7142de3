"""A chip's memory during each program of a step: by the compiler from shapes alone, or by formula.

The formula serves GPUs, whose compiler is not present, and ranks the changes to try.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.models import abstract_params
from echorl_jax.rollout import Resources, Sampling
from echorl_jax.rollout.engine import lower_decode, lower_prefill
from echorl_jax.training.capacity import persistent_memory, sampling_memory
from echorl_jax.training.optimizer import abstract_state
from echorl_jax.training.setup import Setup
from echorl_jax.training.update import lower_accumulate, lower_apply, lower_score
from echorl_jax.types import TrainBatch

# The order in which a step runs them.
PROGRAMS = ("prefill", "decode", "score", "accumulate", "apply")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip while a program runs, whatever else the run holds included."""

    program: str
    weights: int  # master weights, those of the sampler, those of a reference policy
    optimizer: int  # both moments
    gradient: int
    cache: int  # keys and values
    batch: int  # tokens, log-probabilities, outputs
    temporaries: int  # activations and what else the program makes for itself
    source: str  # compiler or formula
    compile_s: float = 0.0
    # By the compiler's count what the program itself is given, and returns in new memory; parts of
    # the above. 0 of a formula, and where the compiler refused.
    arguments: int = 0

    @property
    def total(self) -> int:
        parts = (self.weights, self.optimizer, self.gradient, self.cache, self.batch)
        return sum(parts) + self.temporaries


def compile_programs(
    setup: Setup, *, names: tuple[str, ...], say: Callable[[str], None]
) -> list[Memory]:
    """Compiles the named programs for the mesh of the setup and reads the compiler's figures.

    Args:
      setup: with a mesh of real or described devices.
      names: of :data:`PROGRAMS`, in order; decode needs prefill.
      say: told what is being compiled, and how long it took.

    Returns:
      One :class:`Memory` for each; of a program that the compiler refuses for want of memory, with
      the bytes that it asked for.
    """
    compilers = {
        "score": lambda: _update_program(setup, "score"),
        "accumulate": lambda: _update_program(setup, "accumulate"),
        "apply": lambda: _update_program(setup, "apply"),
    }
    found, prefilled = [], None
    for name in names:
        start = time.monotonic()
        say(f"compiling {name} ...")
        try:
            if name == "prefill":
                lowered = _prefill(setup)
                prefilled = lowered, lowered.compile()
                compiled = prefilled[1]
            elif name == "decode":
                if prefilled is None:
                    continue  # there is nothing to go on from
                compiled = _decode(setup, *prefilled).compile()
            else:
                compiled = compilers[name]().compile()
        except jax.errors.JaxRuntimeError as error:
            refused = refused_bytes(str(error))
            if refused is None:
                raise
            found.append(_memory(setup, name, refused, time.monotonic() - start))
        else:
            found.append(_memory(setup, name, compiled, time.monotonic() - start))
        seconds, total = found[-1].compile_s, found[-1].total
        say(f"compiled {name} in {seconds:.0f} s: {total / 1e9:.2f} GB a chip")
    return found


def _sampler(setup: Setup) -> tuple[Sampling, Resources]:
    rollout = setup.config.rollout
    assert isinstance(setup.mesh, Mesh)
    sampling = Sampling(
        group_size=setup.sampled_group_size,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        eos_ids=setup.model.config.eos_ids,
    )
    resources = Resources(slots=setup.slots, kv_dtype=rollout.kv_dtype, mesh=setup.mesh)
    return sampling.checked(setup.model.config.vocab_size), resources


def _prefill(setup: Setup) -> jax.stages.Lowered:
    return lower_prefill(
        setup.model,
        *_sampler(setup),
        prompts=setup.config.rollout.prompts_per_step,
        prompt_tokens=setup.config.data.max_prompt_tokens,
    )


def _decode(
    setup: Setup, prefill: jax.stages.Lowered, prefilled: jax.stages.Compiled
) -> jax.stages.Lowered:
    return lower_decode(setup.model, *_sampler(setup), prefill, prefilled)


def _update_program(setup: Setup, name: str) -> jax.stages.Lowered:
    assert isinstance(setup.mesh, Mesh)
    params = abstract_params(setup.model, setup.mesh)
    if name == "apply":
        return lower_apply(setup, abstract_state(params, setup.optimizer, setup.mesh))
    micro = abstract_batch(setup)
    if name == "score":
        return lower_score(setup, params, micro)
    return lower_accumulate(setup, params, micro)


def abstract_batch(setup: Setup) -> TrainBatch:
    """The largest micro-batch, with the fields that the objective has."""
    assert isinstance(setup.mesh, Mesh)
    rows, width = setup.micro_batch
    # Hints belong to the prompt but are targets too.
    targets = width if setup.objective.hints else min(width, setup.config.rollout.max_new_tokens)
    split = NamedSharding(setup.mesh, PartitionSpec(("data", "fsdp")))

    def array(*shape: int, dtype: object = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

    objective, per_token = setup.objective, array(rows, targets)
    fields = {
        "tokens": array(rows, width, dtype=np.int32),
        "prompt_length": array(rows, dtype=np.int32),
        "length": array(rows, dtype=np.int32),
        "loss_mask": per_token,
        "advantages": array(rows),
        "old_logprobs": per_token,
        "rollout_logprobs": per_token,
        "token_weights": per_token,
        "echo_weights": per_token,
        "on_policy": array(rows, dtype=np.bool_),
        "nll_weights": per_token if objective.hints else None,
        "ref_logprobs": per_token if objective.kl_coef else None,
        "entropy_scale": array(rows) if objective.entropy_coef else None,
        "selected": array(rows, targets, dtype=np.bool_) if objective.select_tokens else None,
    }
    return TrainBatch(**fields)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Refused:
    """What a program asked for when the compiler ran out of memory."""

    bytes: int
    with_arguments: bool  # or temporaries alone


def _memory(
    setup: Setup, name: str, compiled: jax.stages.Compiled | Refused, seconds: float
) -> Memory:
    """What is held, and the rest of what the compiler counts."""
    held = persistent_memory(setup)
    sampling = name in ("prefill", "decode")
    weights = held.master + held.reference + (held.sampler if sampling else 0)
    gradient = held.master if name in ("accumulate", "apply") else 0
    if sampling:
        arguments = held.sampler or held.master
    elif name == "apply":
        arguments = held.master + held.moments + gradient
    else:
        arguments = held.master + gradient
    cache = sampling_memory(setup).cache if sampling else 0
    if isinstance(compiled, Refused):
        batch = whole = 0
        given = arguments + cache if compiled.with_arguments else 0
        rest = max(0, compiled.bytes - given)
    else:
        size = compiled.memory_analysis()
        assert size is not None
        whole = size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
        batch = max(0, whole - arguments - cache)
        rest = size.temp_size_in_bytes
    return Memory(
        program=name,
        weights=weights,
        optimizer=held.moments,
        gradient=gradient,
        cache=cache,
        batch=batch,
        temporaries=rest,
        source="compiler",
        compile_s=round(seconds, 1),
        arguments=whole,
    )


def refused_bytes(message: str) -> Refused | None:
    """What the compiler says that a program needs more than there is; None of other errors.

    >>> refused_bytes("RESOURCE_EXHAUSTED: Ran out of memory. Used 2.00K of 1.00K hbm.")
    Refused(bytes=2048, with_arguments=True)
    >>> refused_bytes("RESOURCE_EXHAUSTED: the total for HLO temporaries (2.00K) exceeds (1.00K)")
    Refused(bytes=2048, with_arguments=False)
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    forms = {r"[Uu]sed {} of ": True, r"HLO temporaries \({}\) exceeds": False}
    for form, with_arguments in forms.items():
        if found := re.search(form.format(r"([0-9.]+)([KMGT]?)i?B?"), message):
            return Refused(round(float(found[1]) * units[found[2]]), with_arguments)
    return None


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
