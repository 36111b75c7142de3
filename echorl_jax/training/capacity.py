"""Memory of one device, the slots that fit into it, and the table at the start of a run."""

import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, Mesh

from echorl_jax.config import ConfigError
from echorl_jax.models import Decoder, split_params
from echorl_jax.parallel import local_bytes
from echorl_jax.rollout import RolloutMemory, choose_capacity, rollout_memory
from echorl_jax.rollout.cache import block_sizes
from echorl_jax.rollout.memory import shares_weights
from echorl_jax.training.optimizer import orthogonalised
from echorl_jax.training.setup import Setup
from echorl_jax.types import PyTree

# Share of a device's memory that may be filled; the runtime and fragmentation take the rest.
USABLE = 0.95
# Share of the remaining memory that slots may take. When work runs out, they are copied to half as
# many while the old ones still exist, and the decode loop has temporaries.
_SLOT_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class PersistentMemory:
    """Bytes on one device that every program of a run finds in use.

    The sampler's weights exist only while it samples.
    """

    master: int  # all weights
    trained: int  # those of them that are trained, so also the gradient
    moments: int
    sampler: int
    reference: int

    @property
    def always(self) -> int:
        """Bytes in use during the whole step."""
        return self.master + self.moments + self.reference


def persistent_memory(setup: Setup) -> PersistentMemory:
    """Weights and moments on one device, from shapes and the sharding table alone."""
    first_moment = 2 if setup.config.optim.moment_dtype == "bfloat16" else 4
    return weight_memory(
        setup.model,
        setup.mesh,
        moment_bytes=first_moment + 4,
        saved_bytes=4 if setup.config.optim.optimizer == "muon" else 0,
        reference=setup.objective.kl_coef != 0,
        shares_weights=shares_weights(
            setup.model,
            devices=setup.mesh.size,
            platform=setup.platform,
            kv_dtype=setup.config.rollout.kv_dtype,
        ),
    )


def weight_memory(
    model: Decoder,
    mesh: Mesh | AbstractMesh,
    *,
    moment_bytes: int,
    reference: bool,
    shares_weights: bool,
    saved_bytes: int = 0,
) -> PersistentMemory:
    """Weights and moments on one device.

    Args:
      mesh: its axes.
      moment_bytes: of both moments of one parameter.
      saved_bytes: of these, what a parameter that Muon makes orthogonal does not need.
      reference: whether a KL term keeps a copy in the compute type; adapters spare it.
      shares_weights: whether the sampler reads the master weights themselves.
    """
    axes, shapes = model.param_axes(), model.param_shapes()
    narrow = jax.eval_shape(model.cast, shapes)
    trained_axes, trained_shapes = (split_params(model, tree)[1] for tree in (axes, shapes))
    trained = local_bytes(trained_axes, trained_shapes, mesh, "train")
    width = jax.tree.leaves(trained_shapes)[0].dtype.itemsize
    shape_of = dict(jax.tree_util.tree_leaves_with_path(trained_shapes))
    spared = local_bytes(
        [_axes_at(trained_axes, path) for path in shape_of if orthogonalised(path)],
        [shape for path, shape in shape_of.items() if orthogonalised(path)],
        mesh,
        "train",
    )
    reference = reference and model.lora is None
    text = model.text  # samples from the features of images
    sampled = jax.eval_shape(text.cast, text.param_shapes())
    return PersistentMemory(
        master=local_bytes(axes, shapes, mesh, "train"),
        trained=trained,
        moments=(trained * moment_bytes - spared * saved_bytes) // width,
        sampler=0 if shares_weights else local_bytes(text.param_axes(), sampled, mesh, "rollout"),
        reference=local_bytes(axes, narrow, mesh, "train") if reference else 0,
    )


def _axes_at(axes: PyTree, path: tuple) -> tuple[str, ...]:
    for entry in path:
        axes = axes[entry.key]
    return axes


def sampling_memory(setup: Setup) -> RolloutMemory:
    """Bytes that sampling adds on one device."""
    rollout = setup.config.rollout
    return rollout_memory(
        setup.model,
        slots=setup.slots,
        prompts=rollout.prompts_per_step,
        group_size=setup.sampled_group_size,
        prompt_tokens=setup.config.data.max_prompt_tokens,
        max_new_tokens=rollout.max_new_tokens,
        page_tokens=setup.page_tokens,
        block=_page(setup),
        kv_dtype=rollout.kv_dtype,
        mesh=setup.mesh,
    )


def _page(setup: Setup) -> int:
    """Positions in a page of completions."""
    config = setup.config
    prompt, longest = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    return block_sizes(prompt, longest, platform=setup.platform)[1]


def with_slots(setup: Setup, *, device_bytes: int) -> Setup:
    """The setup with ``config.rollout.slots`` and pages for them; for 0 with a slot for each row of
    a round if they fit beside the persistent memory, else with as many as do.

    Args:
      setup: with any number of slots.
      device_bytes: memory of one device.

    Raises:
      ConfigError: not even one slot for each device fits.
    """
    rollout = setup.config.rollout
    persistent = persistent_memory(setup)
    least = sampling_memory(dataclasses.replace(setup, slots=setup.shards, page_tokens=0))
    used = persistent.always + persistent.sampler + least.prompts + least.outputs + least.logits
    room = int(USABLE * device_bytes) - used
    try:
        capacity = choose_capacity(
            setup.model,
            rows=setup.sampled_rows,
            max_new_tokens=rollout.max_new_tokens,
            block=_page(setup),
            slots=rollout.slots,
            expected_tokens=rollout.expected_tokens,
            kv_dtype=rollout.kv_dtype,
            mesh=setup.mesh,
            slot_bytes=max(0, int(_SLOT_SHARE * room)),
            reads_longest=setup.platform == "cpu",
        )
    except ValueError as error:
        raise ConfigError(
            f"config.rollout.max_new_tokens = {rollout.max_new_tokens}: {error}; weights, "
            f"optimizer and prompts take {used / 1e9:.2f} of {device_bytes / 1e9:.2f} GB; "
            "`echorl plan` says what to change"
        ) from error
    return dataclasses.replace(setup, slots=capacity.slots, page_tokens=capacity.page_tokens)


def title(setup: Setup, params: PyTree) -> str:
    """Model and devices in one line."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    axes = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    model = setup.config.model
    trained = sum(leaf.size for leaf in jax.tree.leaves(split_params(setup.model, params)[1]))
    adapters = f" ({trained / 1e6:.2f}M in adapters)" if setup.model.lora else ""
    return (
        f"{model.path}: {count / 1e6:.2f}M parameters{adapters}, {model.dtype} compute; "
        f"{setup.mesh.size} {jax.default_backend()} device(s), mesh {axes}"
    )


def overview(setup: Setup, *, first_step: int, device_bytes: int) -> list[tuple[str, str]]:
    """Named lines for people.

    Args:
      first_step: steps done.
      device_bytes: memory of one device.
    """
    config = setup.config
    start = f"resumed after step {first_step}" if first_step else "from the start"
    echo = " + EchoRL" if config.echo.enabled else ""
    lines = [("method", f"{config.objective.name}{echo}, {config.steps} steps, {start}")]
    if not setup.objective.supervised:
        lines.append(("rollouts", _rollouts(setup)))
    lines.append(("update", _update(setup)))
    lines.append(("memory", ", ".join(_memory(setup, device_bytes))))
    return lines


def _rollouts(setup: Setup) -> str:
    rollout, experts = setup.config.rollout, setup.objective.expert_rows
    rows = setup.sampled_rows
    beside = f" (and {experts} expert row(s) a prompt)" if experts else ""
    return (
        f"{rollout.prompts_per_step} prompts x {setup.sampled_group_size} = {rows} rows a step"
        f"{beside}, "
        f"each up to {setup.config.data.max_prompt_tokens} + {rollout.max_new_tokens} tokens; "
        f"{min(setup.slots, rows)} decoded at once"
    )


def _update(setup: Setup) -> str:
    objective, optim = setup.config.objective, setup.config.optim
    shapes = setup.micro_batch_shapes
    rows, width = shapes[0]
    each = setup.max_rows // setup.mini_batches
    return (
        f"{setup.mini_batches} mini-batch(es) of {each} rows x {objective.epochs} epoch(s); "
        f"micro-batches of up to {optim.micro_batch_tokens:,} tokens a device in {len(shapes)} "
        f"shapes, the largest {rows} rows x {width} tokens"
    )


def _memory(setup: Setup, device_bytes: int) -> Iterator[str]:
    memory = persistent_memory(setup)
    yield f"each device: weights {size(memory.master)}"
    yield f"optimizer {size(memory.moments)}"
    yield f"gradient {size(memory.trained)}"
    if memory.reference:
        yield f"reference {size(memory.reference)}"
    if not setup.objective.supervised:
        yield f"sampler's weights {size(memory.sampler)}"
        yield f"cache {size(sampling_memory(setup).cache)}"
    yield f"of {size(device_bytes)}; activations: see `echorl plan`"


def size(count: int) -> str:
    """Bytes for people.

    >>> size(12_345_678), size(95_000_000_000)
    ('12.3 MB', '95.0 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
