"""The signal ledger: for each prompt and step, what its group could teach.

A group is mixed (some rollouts right: an advantage exists), all right or all wrong (none does). The
ledger counts every group of the run; the cells it draws are thinned to what a page can show.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echorl_jax.tools.report.runs import integer, read_jsonl

STATES = ("mixed", "right", "wrong")
# What a page shows at most: steps, groups of a step, prompts, visits of a prompt.
MAX_STEPS, MAX_GROUPS, MAX_PROMPTS, MAX_VISITS = 160, 64, 150, 120


@dataclasses.dataclass(frozen=True)
class Visit:
    """One group: its prompt's number in the data, and what became of its rollouts."""

    step: int
    index: int
    correct: int
    size: int
    truncated: int
    clip: bool

    @property
    def state(self) -> str:
        """``mixed``, ``right`` or ``wrong``."""
        if self.correct <= 0:
            return "wrong"
        return "right" if self.correct >= self.size else "mixed"

    def cell(self) -> list[int]:
        """The numbers the page draws a cell from."""
        return [self.step, self.index, self.correct, self.size, self.truncated, int(self.clip)]


def read_ledger(path: Path) -> list[Visit]:
    """Every group of a ledger file in order of steps. A step logged twice counts once."""
    by_step: dict[int, list[Visit]] = {}
    for row in read_jsonl(path):
        step = integer(row.get("step"))
        if step is not None and isinstance(row.get("groups"), list):
            visits = (_visit(step, group) for group in row["groups"])
            by_step[step] = [visit for visit in visits if visit is not None]
    return [visit for step in sorted(by_step) for visit in by_step[step]]


def build_ledger(visits: Sequence[Visit]) -> dict[str, Any] | None:
    """The page's data: cells by step and by prompt, and moves between states; or None."""
    if not visits:
        return None
    steps: dict[int, list[Visit]] = {}
    prompts: dict[int, list[Visit]] = {}
    for visit in visits:
        steps.setdefault(visit.step, []).append(visit)
        prompts.setdefault(visit.index, []).append(visit)
    returning = [history for history in prompts.values() if len(history) > 1]
    shown_prompts = spread(sorted(returning, key=_pattern), MAX_PROMPTS)
    shown_steps = spread(sorted(steps), MAX_STEPS)
    return {
        "steps": [_column(steps[step]) for step in shown_steps],
        "prompts": [[v.cell() for v in spread(h, MAX_VISITS)] for h in shown_prompts],
        "moves": _moves(returning),
        "totals": {
            "groups": len(visits),
            "steps": len(steps),
            "prompts": len(prompts),
            "returning": len(returning),
            "clips": sum(v.clip for v in visits),
            "truncated": sum(v.truncated > 0 for v in visits),
        },
        "thinned": len(shown_steps) < len(steps)
        or len(shown_prompts) < len(returning)
        or any(len(group) > MAX_GROUPS for group in steps.values())
        or any(len(history) > MAX_VISITS for history in shown_prompts),
    }


def spread(items: Sequence[Any], limit: int) -> list[Any]:
    """At most ``limit`` items, evenly spaced, the first and the last always among them.

    >>> spread([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 3, 6]
    """
    if len(items) <= limit:
        return list(items)
    if limit == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _visit(step: int, group: Any) -> Visit | None:
    try:
        return Visit(
            step=step,
            index=int(group["index"]),
            correct=int(group["correct"]),
            size=int(group["size"]),
            truncated=int(group.get("truncated", 0)),
            clip=bool(group.get("clip", False)),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _column(visits: list[Visit]) -> list[list[int]]:
    # Sorted before thinning, so that the drawn shares stay the true ones.
    order = sorted(visits, key=lambda v: (v.correct / max(v.size, 1), v.index))
    return [visit.cell() for visit in spread(order, MAX_GROUPS)]


def _pattern(history: list[Visit]) -> tuple[float, int]:
    share = sum(v.correct / max(v.size, 1) for v in history) / len(history)
    return -share, history[0].index


def _moves(histories: Sequence[Sequence[Visit]]) -> list[list[int]]:
    """Counts of state -> state at the next visit, rows and columns in the order of ``STATES``."""
    pairs = Counter(
        (before.state, after.state)
        for history in histories
        for before, after in zip(history, history[1:], strict=False)
    )
    return [[pairs[before, after] for after in STATES] for before in STATES]
