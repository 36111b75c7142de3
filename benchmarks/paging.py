"""Least time of one rollout with pages and with a ring for each slot, by simulation.

    python benchmarks/paging.py --chip=h100 --model=Qwen/Qwen2.5-7B-Instruct --mean=600

Prints one JSON object. Rows end at log-normal lengths (sigma 1, cut at T, the mean restored).
Slots, pages, admission and eviction follow ``rollout/memory.py`` and ``rollout/pages.py``; a decode
step takes the larger of operations / peak and bytes / bandwidth (docs/performance.md). The ring is
the sampler before it had pages: T positions and a copy of the prompt for each slot, 1, 2, 3, 4, 6,
8, 12 ... slots, half as many when rows run out; the GPU's kernel reads what each row has filled,
other platforms as many blocks as the longest row's for all slots.
"""

import argparse
import dataclasses
import json
from typing import Any

import numpy as np

from echorl_jax.models import Decoder
from echorl_jax.models.published import architecture
from echorl_jax.rollout import choose_capacity
from echorl_jax.rollout.cache import BLOCK
from echorl_jax.rollout.host import FEWEST_SLOTS
from echorl_jax.rollout.memory import SLOT_SHARE, position_bytes
from echorl_jax.rollout.pages import RESERVE
from echorl_jax.rollout.request import slot_counts
from echorl_jax.tools.plan.chips import GPUS, TPUS, Chip
from echorl_jax.tools.plan.roofline import decode_step_cost


def lengths(mean: float, longest: int, rows: int, seed: int) -> np.ndarray:
    """Log-normal lengths, i64 ``[rows]``, whose mean after the cut is ``mean``."""
    probe = np.exp(np.random.default_rng(0).standard_normal(200_000))
    low, high = 0.0, 1e6
    for _ in range(60):
        scale = (low + high) / 2
        short = np.minimum(scale * probe, longest).mean() < mean
        low, high = (scale, high) if short else (low, scale)
    draws = np.exp(np.random.default_rng(seed).standard_normal(rows))
    return np.clip(draws * low, 1, longest).astype(int)


@dataclasses.dataclass
class Case:
    """A model on equal chips that share the rows, each with whole weights."""

    model: Decoder
    chip: Chip
    chips: int
    prompt: int  # filled positions of a prompt
    prompt_tokens: int  # S
    longest: int  # T

    @property
    def block(self) -> int:
        return BLOCK[self.chip.platform]

    @property
    def per_row(self) -> bool:
        """Whether attention of the ring reads what each row has filled."""
        return self.chip.platform == "gpu"

    def seconds(self, slots: int, context: float, read: float) -> float:
        """A decode step of the fullest chip: its slots, positions attended to and read."""
        cost = decode_step_cost(
            self.model, slots=slots, prompt_tokens=0, completion_tokens=context / max(slots, 1)
        )
        per_position = position_bytes(self.model, None)
        bytes_ = cost.weight_bytes + (read + slots) * per_position
        return max(cost.flops / self.chip.flops_per_second, bytes_ / self.chip.bytes_per_second)


class Slots:
    """Rows in slots of several parts, and the totals of the simulation."""

    def __init__(self, case: Case, length: np.ndarray, slots: int) -> None:
        self.case, self.length = case, length
        self.parts = case.chips
        self.row = np.full((self.parts, slots // self.parts), -1)
        self.position = np.zeros_like(self.row)
        self.waiting = list(range(len(length)))[::-1]
        self.steps, self.seconds, self.live, self.reserved = 0, 0.0, 0.0, 0.0
        self.useful, self.read, self.restarted = 0.0, 0.0, 0
        self.sizes = slot_counts(slots, smallest=max(FEWEST_SLOTS, self.parts))
        self.levels = len(self.sizes)

    @property
    def busy(self) -> np.ndarray:
        return self.row >= 0

    def take(self, part: int, slot: int) -> None:
        self.row[part, slot] = self.waiting.pop()
        self.position[part, slot] = 0

    def shrink(self) -> None:
        """Fewer slots when no row waits and the busy ones fit."""
        while not self.waiting and len(self.sizes) > 1:
            if self.busy.sum(1).max() * self.parts > self.sizes[1]:
                return
            self.sizes = self.sizes[1:]
            order = np.argsort(~self.busy, axis=1, kind="stable")[:, : self.sizes[0] // self.parts]
            self.row = np.take_along_axis(self.row, order, 1)
            self.position = np.take_along_axis(self.position, order, 1)

    def advance(self, most: int, read: Any, reserved: float) -> None:
        """Decode steps until a row ends, at most ``most``; ``read(position)`` gives the positions
        that each part reads.
        """
        left = np.where(self.busy, self.length[self.row] - self.position, most)
        steps = int(min(most, left.min()))
        at = self.position + (steps - 1) / 2
        reads = read(at)
        live = np.where(self.busy, at + self.case.prompt, 0).sum(1)
        self.seconds += steps * self.case.seconds(self.row.shape[1], live.max(), reads.max())
        self.steps += steps
        if len(self.sizes) == self.levels:  # the last rows leave memory idle, however it is divided
            self.live += steps * np.where(self.busy, at, 0).sum()
            self.reserved += steps * reserved
        self.useful += steps * live.sum()
        self.read += steps * reads.sum()
        self.position = np.where(self.busy, self.position + steps, 0)
        self.row[self.busy & (self.position >= self.length[self.row])] = -1

    def result(self, **others: float) -> dict[str, float]:
        return {
            "seconds": round(self.seconds, 1),
            "steps": self.steps,
            "live_share_of_reserved": round(self.live / self.reserved, 3),
            "useful_share_of_read": round(self.useful / self.read, 3),
            "restarted_rows": self.restarted,
            **others,
        }


def ring(case: Case, length: np.ndarray, slot_bytes: float) -> dict[str, float]:
    """The sampler before pages."""
    rows, parts = len(length), case.chips
    each = position_bytes(case.model, None) * (case.prompt_tokens + case.longest)
    fit = int(slot_bytes // each)
    allowed = [n for power in range(12) for n in (2**power, 3 * 2**power) if n <= fit]
    slots = rows if fit * parts >= rows else max(allowed) * parts
    state = Slots(case, length, slots)

    def read(at: np.ndarray) -> np.ndarray:
        busy, block = state.busy, case.block
        if case.per_row:
            filled = np.ceil(at / block + 0.5) * block + case.prompt
            return np.where(busy, filled, 0).sum(1)
        longest = (np.ceil(at[busy].max() / block) + 0.5) * block
        return np.full(parts, at.shape[1] * (longest + 0.75 * case.prompt_tokens))

    while state.waiting or state.busy.any():
        for part, slot in np.argwhere(~state.busy):
            if state.waiting:
                state.take(part, slot)
        state.shrink()
        state.advance(16, read, reserved=state.row.size * case.longest)
    return state.result(slots=slots)


def paged(case: Case, length: np.ndarray, slot_bytes: float, expected: int) -> dict[str, float]:
    """The sampler with pages."""
    block, parts = case.block, case.chips
    capacity = choose_capacity(
        case.model,
        rows=len(length),
        max_new_tokens=case.longest,
        block=block,
        expected_tokens=expected,
        mesh=mesh_of(parts),
        slot_bytes=int(slot_bytes),
    )
    state = Slots(case, length, capacity.slots)
    pages = capacity.page_tokens // block
    held = np.zeros_like(state.row)
    used = np.zeros(parts)

    def read(at: np.ndarray) -> np.ndarray:
        count = state.busy.sum(1) if case.per_row else state.row.shape[1]
        # Pages of rows that ended since the last full block are read too, but by the kernel.
        in_pages = held.sum(1) if case.per_row else used
        return (in_pages + count) * block + state.busy.sum(1) * case.prompt

    while state.waiting or state.busy.any():
        held[~state.busy] = 0
        for part in range(parts):
            free = pages - int(RESERVE * pages) - held[part].sum() - state.busy[part].sum()
            idle = np.flatnonzero(~state.busy[part])
            for slot in idle[: max(int(free), int(len(idle) == state.row.shape[1]))]:
                if state.waiting:
                    state.take(part, slot)
        before = state.row.shape[1]
        state.shrink()
        if state.row.shape[1] < before:
            held = np.where(state.busy, -(-np.maximum(state.position, 0) // block), 0)
        reserved = parts * pages * block + state.row.size * block
        state.advance(min(16, block - state.steps % block), read, reserved)
        if state.steps % block:
            continue
        held[~state.busy] = 0
        for part in range(parts):
            while held[part].sum() + state.busy[part].sum() > pages:
                youngest = np.where(state.busy[part], state.position[part], case.longest + 1)
                slot = int(np.argmin(youngest))
                state.waiting.append(state.row[part, slot])
                state.row[part, slot], held[part, slot] = -1, 0
                state.restarted += 1
        held[state.busy] += 1
        used = held.sum(1)
    return state.result(slots=capacity.slots, page_tokens=capacity.page_tokens)


def mesh_of(chips: int) -> Any:
    """A mesh of chips with whole weights."""
    from jax.sharding import AbstractMesh

    return AbstractMesh((chips, 1, 1), ("data", "fsdp", "tensor"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="h100", choices=sorted(GPUS | TPUS))
    parser.add_argument("--chips", type=int, default=1)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--mean", type=float, default=600.0, help="tokens of a completion")
    parser.add_argument("--longest", type=int, default=8192, help="T")
    parser.add_argument("--prompt", type=int, default=300, help="mean tokens of a prompt")
    parser.add_argument("--prompt_tokens", type=int, default=1024, help="S, as padded")
    parser.add_argument("--expected", type=int, default=0, help="expected tokens (default: mean)")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    model = Decoder(architecture(args.model), dtype="bfloat16")
    chip = (GPUS | TPUS)[args.chip]
    case = Case(model, chip, args.chips, args.prompt, args.prompt_tokens, args.longest)
    slot_bytes = SLOT_SHARE * chip.memory_bytes
    runs: dict[str, list[dict[str, float]]] = {"ring": [], "paged": []}
    for seed in range(args.seeds):
        length = lengths(args.mean, args.longest, args.rows, seed)
        runs["ring"].append(ring(case, length, slot_bytes))
        runs["paged"].append(paged(case, length, slot_bytes, args.expected or round(args.mean)))
    means = {
        name: {key: round(float(np.mean([run[key] for run in of])), 3) for key in of[0]}
        for name, of in runs.items()
    }
    ratio = means["paged"]["seconds"] / means["ring"]["seconds"]
    case_of = {key: vars(args)[key] for key in ("chip", "chips", "model", "rows", "mean")}
    print(json.dumps({**case_of, **means, "ratio_of_seconds": round(ratio, 3)}, indent=1))


if __name__ == "__main__":
    main()
