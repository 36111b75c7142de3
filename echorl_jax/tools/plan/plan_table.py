"""A plan as a table for people and as a dict for programs."""

import dataclasses
import math
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.table import Table

from echorl_jax.errors import UserError
from echorl_jax.tools.plan.chips import GB
from echorl_jax.tools.plan.plan import Plan, describe
from echorl_jax.tools.plan.roofline import SHARES, exchanges
from echorl_jax.training.capacity import persistent_memory
from echorl_jax.training.run import with_steps

_FIELDS = ("weights", "optimizer", "gradient", "cache", "batch", "temporaries", "total")
_HEADINGS = ("weights", "optim", "grad", "cache", "batch", "temp", "total")


def as_dict(plans: list[Plan], topology: str) -> dict[str, Any]:
    """The last plan in full, and a summary of all that were tried."""
    plan = plans[-1]
    setup, target, lengths = plan.setup, plan.target, plan.lengths
    rows, steps = _rows_per_step(plan), _steps(plan)
    tokens = rows * lengths.completion
    sampling = sum(plan.seconds.get(name, 0.0) for name in ("prefill", "decode"))
    communication = [
        {
            "phase": exchange.phase,
            "axis": exchange.axis,
            "bytes_per_chip": round(exchange.bytes),
            "seconds": None if (s := exchange.seconds(target.chip)) is None else round(s, 4),
        }
        for exchange in exchanges(setup, lengths)
    ]
    return {
        "topology": topology or "local",
        "chip": target.chip.name,
        "chips": target.count,
        "compiler": target.compiler,
        "memory_bytes_per_chip": target.chip.memory_bytes,
        "usable_bytes_per_chip": target.usable_bytes,
        "fits": plan.fits,
        "changes": plan.changes,
        "mesh": dict(setup.mesh.shape),
        "slots": setup.slots,
        "rows_per_step": rows,
        "micro_batch": dict(zip(("rows", "tokens_per_row"), setup.micro_batch, strict=True)),
        "peak_bytes_per_chip": plan.peak_bytes,
        "programs": [dataclasses.asdict(m) | {"total": m.total} for m in plan.memory],
        "roofline": {
            "mean_prompt_tokens": lengths.prompt,
            "mean_completion_tokens": lengths.completion,
            "seconds": {name: round(s, 4) for name, s in plan.seconds.items()},
            "step_seconds": round(plan.step_seconds, 3),
            "rollout_tokens_per_second": round(tokens / sampling) if sampling else 0,
            "step_tokens_per_second": round(tokens / plan.step_seconds),
            "communication_estimate": communication,  # not part of the seconds of the step
        },
        # A guess by comparison: the floor is in "roofline".
        "estimate": {
            "step_seconds": round(plan.likely_seconds, 3),
            "steps": steps,
            "run_hours": None if steps is None else round(plan.likely_seconds * steps / 3600, 3),
            "shares_of_peak": {
                name: dict(zip(("share", "source"), SHARES[name], strict=True))
                for name in plan.seconds
            },
        },
        "tried": [
            {"changes": p.changes, "fits": p.fits, "peak_bytes_per_chip": p.peak_bytes}
            for p in plans
        ],
    }


def print_plan(plans: list[Plan], console: Console) -> None:
    """Prints the table of the last plan, its times and a verdict."""
    plan, figures = plans[-1], as_dict(plans, "")
    chip, setup, roofline = plan.target.chip, plan.setup, figures["roofline"]
    axes = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    where = f"{plan.target.count} x {chip.name}, mesh {axes}"
    unit, unit_name = (GB, "GB") if plan.peak_bytes > GB else (10**6, "MB")
    table = Table(title=f"{setup.config.model.path} on {where}: {unit_name} per chip")
    for heading in ("program", *_HEADINGS, "used"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    for program in figures["programs"]:
        cells = [f"{program[field] / unit:.2f}" for field in _FIELDS]
        used = f"{program['total'] / chip.memory_bytes:.0%}"
        table.add_row(program["program"], *cells, used)
    console.print(table)
    source = "estimated by formula"
    if plan.memory[0].source == "compiler":
        source = f"the compiler's{f' ({plan.target.compiler})' if plan.target.compiler else ''}"
    rows, width = setup.micro_batch
    seconds = "  ".join(f"{name} {s:.3g}" for name, s in plan.seconds.items())
    lines = [
        f"figures are {source}; {setup.slots} slots for {figures['rows_per_step']} rows; "
        f"micro-batches of up to {rows} x {width} tokens",
        f"least seconds per step at the chip's peaks, {plan.lengths.prompt:g} + "
        f"{plan.lengths.completion:g} tokens a row: {seconds}  = {plan.step_seconds:.3g}",
        f"at most {roofline['rollout_tokens_per_second']:,} tokens/s sampled, "
        f"{roofline['step_tokens_per_second']:,} with learning (communication not counted)",
    ]
    speed, estimates = chip.link_bytes_per_second, roofline["communication_estimate"]
    if speed is not None and estimates:
        parts = "  ".join(f"{e['phase']} over {e['axis']} {e['seconds']:.3g}" for e in estimates)
        links = f"at {speed / GB:g} GB/s of links a chip"
        lines.append(f"communication, estimated, seconds {links}: {parts}")
    shares = ", ".join(f"{name} {SHARES[name][0]:.0%}" for name in plan.seconds)
    likely, hours = figures["estimate"], "hours unknown without the rows of data.train"
    if likely["steps"] is not None:
        hours = f"{likely['run_hours']:.3g} h for {likely['steps']} steps"
    lines.append(
        f"estimate, not a bound: {likely['step_seconds']:.3g} s a step, {hours}, at shares of the "
        f"peak measured on other chips ({shares}; sources: --json), communication not hidden; "
        "grading, evaluation and compilation not counted"
    )
    for line in (*lines, verdict(plans)):
        console.print(line, highlight=False, soft_wrap=True)


def _rows_per_step(plan: Plan) -> int:
    """Sampled rows, or demonstrations, of a step."""
    return plan.setup.rows if plan.setup.objective.supervised else plan.setup.sampled_rows


def _steps(plan: Plan) -> int | None:
    """Steps of the whole run; None if its epochs are of rows that cannot be read here."""
    config, rows = plan.setup.config, plan.setup.config.rollout.prompts_per_step
    if plan.setup.objective.supervised:
        rows = config.optim.sft_rows_per_step
    with suppress(UserError):  # a plan may be made where the rows are not
        return with_steps(config, rows).steps


def verdict(plans: list[Plan]) -> str:
    """One line: whether the config fits; if not, changes with which it does, or what it lacks."""
    first, last = plans[0], plans[-1]
    usage = f"{last.peak_bytes / GB:.1f} of {last.target.chip.memory_bytes / GB:.1f} GB"
    if first.fits:
        return f"fits: {usage} at most"
    if last.fits:
        return f"does not fit as it is; fits with {describe(last.changes)} ({usage} at most)"
    best = min(plans, key=lambda plan: plan.peak_bytes)
    tried = f"; best of {len(plans)} tried: {describe(best.changes)}" if best.changes else ""
    need = f"{', '.join(best.too_large)} need up to {best.peak_bytes / GB:.1f} GB"
    memory, mesh = persistent_memory(best.setup), best.setup.mesh.shape
    # One copy of the model is a chip's part times the chips that it is split over.
    model_bytes = (memory.always + memory.trained) * mesh["fsdp"] * mesh["tensor"]
    chips = math.ceil(model_bytes / best.target.usable_bytes)
    return (
        f"does not fit: {need}{tried}; weights, gradient and optimizer alone need {chips} such "
        "chips; shorter completions, fewer prompts per step or more chips help"
    )
