"""A plan as a table for people and as a dict for programs."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from echorl_jax.tools.plan.memory_table import Memory
from echorl_jax.tools.plan.plan import Plan, chips_needed, describe
from echorl_jax.tools.plan.roofline import exchanges

_GB = 1e9
_MB = 1e6
_COLUMNS = {
    "weights": "weights",
    "optimizer": "optim",
    "gradient": "grad",
    "cache": "cache",
    "batch": "batch",
    "temporaries": "temp",
    "total": "total",
}


def as_dict(plans: list[Plan], topology: str) -> dict[str, Any]:
    """The last plan in full, and in short what was tried before it."""
    best = plans[-1]
    return {
        "topology": topology or "local",
        "chip": best.target.chip.name,
        "chips": best.target.count,
        "memory_bytes_per_chip": best.target.chip.memory_bytes,
        "usable_bytes_per_chip": best.target.usable_bytes,
        **_figures(best),
        "tried": [
            {"changes": p.changes, "fits": p.fits, "peak_bytes_per_chip": p.peak_bytes}
            for p in plans
        ],
    }


def _figures(plan: Plan) -> dict[str, Any]:
    setup = plan.setup
    rows = _rows_per_step(plan)
    tokens = rows * plan.lengths.completion
    sampling = sum(plan.seconds.get(name, 0.0) for name in ("prefill", "decode"))
    return {
        "fits": plan.fits,
        "changes": plan.changes,
        "mesh": dict(setup.mesh.shape),
        "slots": setup.slots,
        "rows_per_step": rows,
        "micro_batch": dict(zip(("rows", "tokens_per_row"), setup.micro_batch, strict=True)),
        "peak_bytes_per_chip": plan.peak_bytes,
        "programs": [dataclasses.asdict(m) | {"total": m.total} for m in plan.memory],
        "roofline": {
            "mean_prompt_tokens": plan.lengths.prompt,
            "mean_completion_tokens": plan.lengths.completion,
            "seconds": {name: round(s, 4) for name, s in plan.seconds.items()},
            "step_seconds": round(plan.step_seconds, 3),
            "rollout_tokens_per_second": round(tokens / sampling) if sampling else 0,
            "step_tokens_per_second": round(tokens / plan.step_seconds),
            "communication_estimate": _communication(plan),
        },
    }


def _communication(plan: Plan) -> list[dict[str, Any]]:
    """What is sent along each axis; not part of the seconds of the step."""
    chip = plan.target.chip
    return [
        {
            "phase": exchange.phase,
            "axis": exchange.axis,
            "bytes_per_chip": round(exchange.bytes),
            "seconds": None if (s := exchange.seconds(chip)) is None else round(s, 4),
        }
        for exchange in exchanges(plan.setup, plan.lengths)
    ]


def _communication_line(plan: Plan) -> list[str]:
    """None where nothing is sent, or the links are not known."""
    speed = plan.target.chip.link_bytes_per_second
    found = _communication(plan)
    if speed is None or not found:
        return []
    parts = "  ".join(f"{e['phase']} over {e['axis']} {e['seconds']:.3g}" for e in found)
    return [f"communication, estimated, seconds at {speed / _GB:g} GB/s of links a chip: {parts}"]


def print_plan(plans: list[Plan], console: Console) -> None:
    """The table of the last plan and one verdict."""
    plan = plans[-1]
    chip, setup = plan.target.chip, plan.setup
    axes = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    where = f"{plan.target.count} x {chip.name}, mesh {axes}"
    unit, name = (_GB, "GB") if plan.peak_bytes > _GB else (_MB, "MB")
    table = Table(title=f"{setup.config.model.path} on {where}: {name} per chip")
    for heading in ("program", *_COLUMNS.values(), "used"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    for memory in plan.memory:
        cells = [f"{_bytes(memory, field) / unit:.2f}" for field in _COLUMNS]
        table.add_row(memory.program, *cells, f"{memory.total / chip.memory_bytes:.0%}")
    console.print(table)
    source = "the compiler's" if plan.memory[0].source == "compiler" else "estimated by formula"
    rows, width = setup.micro_batch
    seconds = "  ".join(f"{name} {s:.3g}" for name, s in plan.seconds.items())
    figures = _figures(plan)["roofline"]
    lines = [
        f"figures are {source}; {setup.slots} slots for {_rows_per_step(plan)} rows; "
        f"micro-batches of up to {rows} x {width} tokens",
        f"least seconds per step at the chip's peaks, {plan.lengths.prompt:g} + "
        f"{plan.lengths.completion:g} tokens a row: {seconds}  = {plan.step_seconds:.3g}",
        f"at most {figures['rollout_tokens_per_second']:,} tokens/s sampled, "
        f"{figures['step_tokens_per_second']:,} with learning (communication not counted)",
        *_communication_line(plan),
        verdict(plans),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _bytes(memory: Memory, field: str) -> int:
    return memory.total if field == "total" else vars(memory)[field]


def _rows_per_step(plan: Plan) -> int:
    """Rows sampled in a step, or demonstrations in one."""
    return plan.setup.rows if plan.setup.objective.supervised else plan.setup.sampled_rows


def verdict(plans: list[Plan]) -> str:
    """Whether it fits, and what to change."""
    first, last = plans[0], plans[-1]
    room = f"{last.peak_bytes / _GB:.1f} of {last.target.chip.memory_bytes / _GB:.1f} GB"
    if first.fits:
        return f"fits: {room} at most"
    if last.fits:
        return f"does not fit as it is; fits with {describe(last.changes)} ({room} at most)"
    best = min(plans, key=lambda plan: plan.peak_bytes)
    tried = f"; best of {len(plans)} tried: {describe(best.changes)}" if best.changes else ""
    need = f"{', '.join(best.too_large)} need up to {best.peak_bytes / _GB:.1f} GB"
    return (
        f"does not fit: {need}{tried}; weights, gradient and optimizer alone need "
        f"{chips_needed(best)} such chips; shorter completions, fewer prompts per step or more "
        "chips help"
    )
