"""The signal ledger: the outcome of every group, by step and by prompt.

A mixed group (some rollouts right) has an advantage; an all-right or all-wrong group has none. The
ledger counts every group of the run and draws as many as fit on a page.
"""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echorl_jax.files import read_jsonl
from echorl_jax.tools.report.runs import integer

STATES = ("mixed", "right", "wrong")
# The most that a page shows: steps, groups of a step, prompts, visits of a prompt.
MAX_STEPS, MAX_GROUPS, MAX_PROMPTS, MAX_VISITS = 160, 64, 150, 120


@dataclasses.dataclass(frozen=True)
class Visit:
    """One group: the index of its prompt in the data, and the outcome of its rollouts."""

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

    @property
    def success(self) -> float:
        """Share of right rollouts."""
        return self.correct / max(self.size, 1)

    def cell(self) -> list[int]:
        """The fields in order, as the page draws them."""
        return list(map(int, vars(self).values()))


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
    steps, prompts = defaultdict(list), defaultdict(list)
    for visit in visits:
        steps[visit.step].append(visit)
        prompts[visit.index].append(visit)
    returning = [history for history in prompts.values() if len(history) > 1]
    # Easy prompts come first. A column is sorted too, so that thinning keeps its true shares.
    returning.sort(key=lambda group: (-sum(v.success for v in group) / len(group), group[0].index))
    columns = [sorted(steps[step], key=lambda v: (v.success, v.index)) for step in sorted(steps)]
    by_step = _cells(columns, MAX_STEPS, MAX_GROUPS)
    by_prompt = _cells(returning, MAX_PROMPTS, MAX_VISITS)
    moves = Counter(
        (before.state, after.state)
        for history in returning
        for before, after in itertools.pairwise(history)
    )
    return {
        "steps": by_step,
        "prompts": by_prompt,
        # Counts of state -> state at the next visit.
        "moves": [[moves[before, after] for after in STATES] for before in STATES],
        "totals": {
            "groups": len(visits),
            "steps": len(steps),
            "prompts": len(prompts),
            "returning": len(returning),
            "clips": sum(v.clip for v in visits),
            "truncated": sum(v.truncated > 0 for v in visits),
        },
        "thinned": sum(map(len, by_step)) < len(visits)
        or sum(map(len, by_prompt)) < sum(map(len, returning)),
    }


def spread(items: Sequence[Any], limit: int) -> list[Any]:
    """At most ``limit`` items, evenly spaced, the first and the last always among them.

    >>> spread([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 3, 6]
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(limit - 1, 1))] for i in range(limit)]


def _cells(lines: Sequence[Sequence[Visit]], most: int, longest: int) -> list[list[list[int]]]:
    return [[visit.cell() for visit in spread(line, longest)] for line in spread(lines, most)]


def _visit(step: int, group: Any) -> Visit | None:
    """None for what is no group, and for a group without a judged rollout."""
    try:
        index, correct, size = (int(group[key]) for key in ("index", "correct", "size"))
        clip = bool(group.get("clip", False))
        visit = Visit(step, index, correct, size, int(group.get("truncated", 0)), clip)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return visit if visit.size else None
