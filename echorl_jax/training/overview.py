"""The page at the start of a run: what runs where, how a step's rows add up, where memory goes."""

from collections.abc import Iterator

import jax

from echorl_jax.training.job import Job
from echorl_jax.types import PyTree


def title(job: Job, params: PyTree) -> str:
    """Model and devices in one line."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    axes = " x ".join(f"{name} {size}" for name, size in job.mesh.shape.items())
    model = job.config.model
    return (
        f"{model.path}: {count / 1e6:.2f}M parameters, {model.dtype} compute; "
        f"{job.mesh.size} {jax.default_backend()} device(s), mesh {axes}"
    )


def overview(job: Job, *, first_step: int, device_bytes: int) -> list[tuple[str, str]]:
    """Named lines for people.

    Args:
      job: the run's.
      first_step: steps done.
      device_bytes: memory of one device.
    """
    config = job.config
    start = f"resumed after step {first_step}" if first_step else "from the start"
    echo = " + EchoRL" if config.echo.enabled else ""
    lines = [("method", f"{config.objective.name}{echo}, {config.steps} steps, {start}")]
    if not job.objective.supervised:
        lines.append(("rollouts", _rollouts(job)))
    lines.append(("update", _update(job)))
    lines.append(("memory", ", ".join(_memory(job, device_bytes))))
    return lines


def _rollouts(job: Job) -> str:
    rollout, experts = job.config.rollout, job.objective.expert_rows
    rows = job.sampled_rows
    beside = f" (and {experts} expert row(s) a prompt)" if experts else ""
    return (
        f"{rollout.prompts_per_step} prompts x {job.group_size} = {rows} rows a step{beside}, "
        f"each up to {job.config.data.max_prompt_tokens} + {rollout.max_new_tokens} tokens; "
        f"{min(job.slots, rows)} decoded at once"
    )


def _update(job: Job) -> str:
    objective, optim = job.config.objective, job.config.optim
    shapes = job.micro_batch_shapes
    rows, width = shapes[0]
    each = job.most_rows // job.mini_batches
    return (
        f"{job.mini_batches} mini-batch(es) of {each} rows x {objective.epochs} epoch(s); "
        f"micro-batches of up to {optim.micro_batch_tokens:,} tokens a device in {len(shapes)} "
        f"shapes, the largest {rows} rows x {width} tokens"
    )


def _memory(job: Job, device_bytes: int) -> Iterator[str]:
    held = job.held
    yield f"each device: weights {size(held.master)}"
    yield f"optimizer {size(held.moments)}"
    yield f"gradient {size(held.master)}"
    if held.reference:
        yield f"reference {size(held.reference)}"
    if not job.objective.supervised:
        yield f"sampler's weights {size(held.sampler)}"
        yield f"cache {size(job.rollout_memory.cache)}"
    yield f"of {size(device_bytes)}; activations: see `echorl plan`"


def size(count: int) -> str:
    """Bytes for people.

    >>> size(12_345_678), size(95_000_000_000)
    ('12.3 MB', '95.0 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
