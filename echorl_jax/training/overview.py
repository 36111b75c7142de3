"""The page at the start of a run: what runs where, how a step's rows add up, where memory goes."""

from collections.abc import Iterator

import jax

from echorl_jax.training.micro_batches import micro_batch_shapes
from echorl_jax.training.programs import Job, cache_bytes, job_held
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


def overview(
    job: Job, *, rows_per_step: int, first_step: int, device_bytes: int
) -> list[tuple[str, str]]:
    """Named lines for people.

    Args:
      job: the run's.
      rows_per_step: rows that a step learns from, over its mini-batches.
      first_step: steps done.
      device_bytes: memory of one device.
    """
    config = job.config
    start = f"resumed after step {first_step}" if first_step else "from the start"
    echo = " + EchoRL" if config.echo.enabled else ""
    lines = [("method", f"{config.objective.name}{echo}, {config.steps} steps, {start}")]
    if not job.objective.supervised:
        lines.append(("rollouts", _rollouts(job)))
    lines.append(("update", _update(job, rows_per_step)))
    lines.append(("memory", ", ".join(_memory(job, device_bytes))))
    return lines


def _rollouts(job: Job) -> str:
    rollout, experts = job.config.rollout, job.objective.expert_rows
    rows = rollout.prompts_per_step * job.group_size
    beside = f" (and {experts} expert row(s) a prompt)" if experts else ""
    return (
        f"{rollout.prompts_per_step} prompts x {job.group_size} = {rows} rows a step{beside}, "
        f"each up to {job.config.data.max_prompt_tokens} + {rollout.max_new_tokens} tokens; "
        f"{min(job.slots, rows)} decoded at once"
    )


def _update(job: Job, rows: int) -> str:
    objective, optim = job.config.objective, job.config.optim
    count = len(run_shapes(job, rows))
    most = job.micro_batch
    return (
        f"{objective.mini_batches} mini-batch(es) of {rows // objective.mini_batches} rows x "
        f"{objective.epochs} epoch(s); micro-batches of up to {optim.micro_batch_tokens:,} tokens "
        f"a device in {count} shapes, the largest {most[0]} rows x {most[1]} tokens"
    )


def run_shapes(job: Job, rows: int) -> list[tuple[int, int]]:
    """Every shape of micro-batch of a run whose steps have at most ``rows`` rows."""
    return micro_batch_shapes(
        rows=max(rows // job.config.objective.mini_batches, 1),
        longest=job.longest,
        token_budget=job.config.optim.micro_batch_tokens * job.shards,
        row_multiple=job.shards,
    )


def _memory(job: Job, device_bytes: int) -> Iterator[str]:
    held = job_held(job)
    yield f"each device: weights {size(held.master)}"
    yield f"optimizer {size(held.moments)}"
    yield f"gradient {size(held.master)}"
    if held.reference:
        yield f"reference {size(held.reference)}"
    if not job.objective.supervised:
        yield f"sampler's weights {size(held.sampler)}"
        yield f"cache {size(cache_bytes(job))}"
    yield f"of {size(device_bytes)}; activations: see `echorl plan`"


def size(count: int) -> str:
    """Bytes for people.

    >>> size(12_345_678), size(95_000_000_000)
    ('12.3 MB', '95.0 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
