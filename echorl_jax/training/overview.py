"""The page at the start of a run: what runs where, how a step's rows add up, where memory goes."""

from collections.abc import Iterator

import jax

from echorl_jax.training.capacity import persistent_memory, sampling_memory
from echorl_jax.training.setup import Setup
from echorl_jax.types import PyTree


def title(setup: Setup, params: PyTree) -> str:
    """Model and devices in one line."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    axes = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    model = setup.config.model
    return (
        f"{model.path}: {count / 1e6:.2f}M parameters, {model.dtype} compute; "
        f"{setup.mesh.size} {jax.default_backend()} device(s), mesh {axes}"
    )


def overview(setup: Setup, *, first_step: int, device_bytes: int) -> list[tuple[str, str]]:
    """Named lines for people.

    Args:
      setup: of the run.
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
    yield f"gradient {size(memory.master)}"
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
