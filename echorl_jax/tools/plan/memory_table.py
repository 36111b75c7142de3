"""Memory of a chip during each program of a step: compiled from shapes alone, or by formula.

The formula is for GPUs, whose compiler is not present, and ranks the changes to try.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.core import token_level
from echorl_jax.models import abstract_params, split_params
from echorl_jax.models.image_features import largest_batch, lower_encode, lower_pull_back
from echorl_jax.rollout import Resources, Sampling
from echorl_jax.rollout.engine import lower_decode, lower_prefill
from echorl_jax.tools.plan.roofline import layer_weights
from echorl_jax.training.capacity import persistent_memory, sampling_memory
from echorl_jax.training.optimizer import abstract_state
from echorl_jax.training.setup import Setup
from echorl_jax.training.update import lower_accumulate, lower_apply, lower_score
from echorl_jax.types import PyTree, RowImages, TrainBatch

# The programs of a step in the order in which they run.
SAMPLING = ("prefill", "decode")
PROGRAMS = ("encode", *SAMPLING, "score", "accumulate", "tower", "apply")
# Tokens whose logits exist at once in the update; see rollout.scoring.
LOGIT_CHUNK = 1024
# Copies of one layer's hidden and MLP features that its backward pass holds, in the compute type:
# inputs, outputs and gradients of its products. Fitted to the compiler's 30.3 GB for Qwen2.5-7B on
# v5p:2x2x2 with 32,768 tokens a chip.
LAYER_COPIES = 10

Prefilled = tuple[jax.stages.Lowered, jax.stages.Compiled]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes in use on one chip while a program runs, those of other programs included."""

    program: str
    weights: int  # master weights, those of the sampler, those of a reference policy
    optimizer: int  # both moments
    gradient: int
    cache: int  # keys and values
    batch: int  # tokens, log-probabilities, outputs
    temporaries: int  # activations and other buffers inside the program
    source: str  # compiler or formula
    compile_s: float = 0.0
    # The compiler's count of the program's arguments and new outputs, which are part of the above.
    # 0 of a formula, and where the compiler ran out of memory.
    arguments: int = 0

    @property
    def total(self) -> int:
        parts = (self.weights, self.optimizer, self.gradient, self.cache, self.batch)
        return sum(parts) + self.temporaries


@dataclasses.dataclass(frozen=True)
class Refused:
    """The bytes of a program that is too large for the compiler."""

    bytes: int
    with_arguments: bool  # False: of temporaries alone


def compile_programs(
    setup: Setup, *, names: Sequence[str], say: Callable[[str], None]
) -> list[Memory]:
    """Compiles the named programs for the mesh of the setup and reads the compiler's figures.

    Args:
      setup: with a mesh of real or described devices.
      names: of :data:`PROGRAMS`, in order; decode needs prefill.
      say: receives a line of progress before and after each program.

    Returns:
      One :class:`Memory` for each program. It is as large as the compiler says if the program does
      not fit. Decode is left out if prefill did not fit.
    """
    found, prefilled = [], None
    for number, name in enumerate(names, 1):
        if name == "decode" and prefilled is None:
            continue
        start = time.monotonic()
        say(f"compiling {name} ({number} of {len(names)}) ...")
        try:
            lowered = lower_program(setup, name, prefilled)
            outcome = lowered.compile()
            prefilled = (lowered, outcome) if name == "prefill" else prefilled
        except jax.errors.JaxRuntimeError as error:
            outcome = refused_bytes(str(error))
            if outcome is None:
                raise
        memory = _compiled_memory(setup, name, outcome, time.monotonic() - start)
        say(f"compiled {name} in {memory.compile_s:.0f} s: {memory.total / 1e9:.2f} GB a chip")
        found.append(memory)
    return found


def lower_program(
    setup: Setup, name: str, prefilled: Prefilled | None = None
) -> jax.stages.Lowered:
    """Lowers one of :data:`PROGRAMS` for the mesh of the setup; decode needs the prefill."""
    config, mesh = setup.config, setup.mesh
    assert isinstance(mesh, Mesh)
    if name in SAMPLING:
        rollout = config.rollout
        sampling = Sampling(
            group_size=setup.sampled_group_size,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            eos_ids=setup.model.config.eos_ids,
        ).checked(setup.model.config.vocab_size)
        resources = Resources(
            slots=setup.slots,
            page_tokens=setup.page_tokens,
            kv_dtype=rollout.kv_dtype,
            mesh=mesh,
        )
        if prefilled is not None:
            return lower_decode(setup.model, sampling, resources, *prefilled)
        prompts, tokens = rollout.prompts_per_step, config.data.max_prompt_tokens
        return lower_prefill(
            setup.model,
            sampling,
            resources,
            prompts=prompts,
            prompt_tokens=tokens,
            image_tokens=setup.image_tokens,
        )
    params = abstract_params(setup.model, mesh)
    if name in ("encode", "tower"):
        return _lower_tower(setup, name, params)
    if name == "apply":
        trained = split_params(setup.model, params)[1]
        return lower_apply(setup, abstract_state(trained, setup.optimizer, mesh))
    lower = lower_score if name == "score" else lower_accumulate
    return lower(setup, params, abstract_batch(setup))


def _lower_tower(setup: Setup, name: str, params: PyTree) -> jax.stages.Lowered:
    """The tower's forward or backward pass over a full batch of the largest images."""
    model, vision = setup.model, setup.model.config.vision
    assert vision is not None
    data, pixels = setup.config.data, (vision.patch_size * vision.merge) ** 2
    most = min(data.max_pixels // pixels, setup.image_tokens)
    _, batch = largest_batch(vision, most_tokens=most, shards=setup.shards)
    batch = _on_mesh(setup, batch, ("data", "fsdp"))
    size = setup.feature_slots, model.config.hidden_size
    frozen, trainable = split_params(model, params)
    with jax.set_mesh(setup.mesh):
        if name == "encode":
            features = _on_mesh(setup, jax.ShapeDtypeStruct(size, model.dtype))
            return lower_encode(model, params, features, batch)
        of_features = _on_mesh(setup, jax.ShapeDtypeStruct(size, np.float32))
        return lower_pull_back(model, frozen, trainable, of_features, batch)


def _on_mesh(setup: Setup, tree: PyTree, *axes: tuple[str, ...]) -> PyTree:
    """Abstract arrays, split along their first axis over mesh axes, or whole on every device."""
    sharding = NamedSharding(setup.mesh, PartitionSpec(*axes))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def abstract_batch(setup: Setup) -> TrainBatch:
    """The largest micro-batch, with the fields that the objective has."""
    assert isinstance(setup.mesh, Mesh)
    rows, width = setup.micro_batch
    # Hints are in the prompt but are targets too.
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
        "advantages": per_token if token_level(objective) else array(rows),
        "old_logprobs": per_token,
        "rollout_logprobs": per_token,
        "token_weights": per_token,
        "echo_weights": per_token,
        "on_policy": array(rows, dtype=np.bool_),
        "nll_weights": per_token if objective.hints else None,
        "ref_logprobs": per_token if objective.kl_coef else None,
        "entropy_scale": array(rows) if objective.entropy_coef else None,
        "selected": array(rows, targets, dtype=np.bool_) if objective.select_tokens else None,
        "solved": array(rows, dtype=np.bool_) if objective.acts_on_solved else None,
    }
    if setup.model.config.vision is not None:
        size = setup.feature_slots, setup.model.config.hidden_size
        fields["images"] = RowImages(
            features=_on_mesh(setup, jax.ShapeDtypeStruct(size, setup.model.dtype)),
            index=array(rows, width, dtype=np.int32),  # pyright: ignore[reportArgumentType]
            positions=array(rows, width, 3, dtype=np.int32),  # pyright: ignore[reportArgumentType]
        )
    return TrainBatch(**fields)  # pyright: ignore[reportArgumentType]


def _resident(setup: Setup, name: str, source: str) -> Memory:
    """The persistent memory and the cache while a program runs; nothing of the program itself."""
    held, sampling = persistent_memory(setup), name in SAMPLING
    return Memory(
        program=name,
        weights=held.master + held.reference + (held.sampler if sampling else 0),
        optimizer=held.moments,
        gradient=held.trained if name in ("accumulate", "tower", "apply") else 0,
        cache=sampling_memory(setup).cache if sampling else 0,
        batch=0,
        temporaries=0,
        source=source,
    )


def _compiled_memory(
    setup: Setup, name: str, outcome: jax.stages.Compiled | Refused, seconds: float
) -> Memory:
    memory, held = _resident(setup, name, "compiler"), persistent_memory(setup)
    arguments = memory.cache + memory.gradient
    if name in SAMPLING:
        arguments += held.sampler or held.master
    else:
        arguments += held.trained + held.moments if name == "apply" else held.master
    if isinstance(outcome, Refused):
        counted = batch = 0
        temporaries = max(0, outcome.bytes - (arguments if outcome.with_arguments else 0))
    else:
        size = outcome.memory_analysis()
        assert size is not None
        counted = size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
        batch, temporaries = max(0, counted - arguments), size.temp_size_in_bytes
    return dataclasses.replace(
        memory,
        batch=batch,
        temporaries=temporaries,
        compile_s=round(seconds, 1),
        arguments=counted,
    )


def refused_bytes(message: str) -> Refused | None:
    """Reads the needed bytes from a compiler's out-of-memory error; None of other errors.

    >>> refused_bytes("RESOURCE_EXHAUSTED: Ran out of memory. Used 2.00K of 1.00K hbm.")
    Refused(bytes=2048, with_arguments=True)
    >>> refused_bytes("RESOURCE_EXHAUSTED: the total for HLO temporaries (2.00K) exceeds (1.00K)")
    Refused(bytes=2048, with_arguments=False)
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    forms = {r"[Uu]sed {} of ": True, r"HLO temporaries \({}\) exceeds": False}
    for form, with_arguments in forms.items():
        if found := re.search(form.format(r"([0-9.]+)([KMGT]?)i?B?"), message):
            unit = 1024 ** " KMGT".index(found[2] or " ")
            return Refused(round(float(found[1]) * unit), with_arguments)
    return None


def estimate(setup: Setup) -> list[Memory]:
    """The programs of a step with the terms that grow with tokens, rows and vocabulary.

    Sampling: see :func:`echorl_jax.rollout.rollout_memory`. Learning, with n tokens on a chip: the
    input of every layer is kept (``n D L`` numbers; without rematerialisation every product), one
    layer's products are held at once, and of the logits of 1,024 tokens three copies; the head's
    gradient is summed in float32 on every chip. Features of images are whole on every chip, the
    tower's activations are left out. With adapters the head has none; frozen kernels
    of another type than that of the products are converted layer by layer.
    """
    rollout, (rows, width) = sampling_memory(setup), setup.micro_batch
    # While the number of slots shrinks, the old slots and the new copy both exist; pages stay.
    half = max(setup.slots // 2, setup.shards)
    shrink = rollout.slots - sampling_memory(dataclasses.replace(setup, slots=half)).slots
    fields = 6 + bool(setup.objective.hints) + bool(setup.objective.kl_coef)
    width_bytes = jnp.dtype(setup.model.dtype).itemsize
    hidden, prompts = setup.model.config.hidden_size, setup.config.rollout.prompts_per_step
    features = hidden * setup.feature_slots
    learnt = rows // setup.shards * width * 4 * fields + features * width_bytes
    if setup.trains_tower:
        learnt += 4 * features
    written = rollout.outputs + hidden * prompts * setup.image_tokens * width_bytes
    terms = {
        "prefill": (written, rollout.logits),
        "decode": (written, max(rollout.logits, shrink)),
        "accumulate": (learnt, activation_bytes(setup)),
        "apply": (0, 0),
    }
    return [
        dataclasses.replace(_resident(setup, name, "formula"), batch=batch, temporaries=temporaries)
        for name, (batch, temporaries) in terms.items()
    ]


def _converted_bytes(setup: Setup) -> int:
    """Bytes of one layer's frozen kernels in the compute type, where they are stored in another."""
    model = setup.model
    if model.lora is None or model.param_dtype == model.dtype:
        return 0
    return layer_weights(model) * jnp.dtype(model.dtype).itemsize // model.config.num_layers


def activation_bytes(setup: Setup) -> int:
    """Bytes on a chip that the backward pass of the largest micro-batch holds."""
    rows, width = setup.micro_batch
    shape, tensor = setup.model.config, setup.mesh.shape["tensor"]
    tokens = rows * width // setup.shards
    size = 2 if setup.model.dtype == "bfloat16" else 4
    kept = tokens * shape.hidden_size * shape.num_layers * size
    features = tokens * (shape.hidden_size + shape.intermediate_size // tensor) * size
    layer = LAYER_COPIES * features
    if setup.model.remat == "none":
        layer *= shape.num_layers
    elif setup.model.remat == "dots":
        layer += 3 * features * shape.num_layers
    vocab = shape.vocab_size // tensor if shape.vocab_size % tensor == 0 else shape.vocab_size
    logits = 3 * max(LOGIT_CHUNK // setup.shards, 1) * vocab * 4
    head = 0 if setup.model.lora else 2 * shape.hidden_size * vocab * 4
    layer += _converted_bytes(setup)
    # The gradient of a micro-batch exists beside the sum of those before it.
    return kept + layer + logits + head + persistent_memory(setup).trained
