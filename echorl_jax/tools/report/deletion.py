"""Step deletion: which reasoning steps a right answer cannot do without.

From a solution, k steps are deleted, from the highest step entropy down, from the lowest up, or at
random; a policy then answers with what is left. The paper finds that deleting high-entropy steps
costs accuracy soonest. Here are the parts that need no model: what to delete, and what the outcomes
say.
"""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from echorl_jax.evaluation.intervals import wilson
from echorl_jax.tools.report.panels import Panel, Section, Series, rounded, run_colour

Order = Literal["high", "low", "random"]
ORDERS: tuple[Order, ...] = ("high", "low", "random")
_NAMES = {"high": "highest entropy first", "low": "lowest entropy first", "random": "at random"}


@dataclasses.dataclass(frozen=True)
class Deletion:
    """A solution with steps gone: ``kept`` are the positions of the tokens that stay."""

    order: Order
    deleted: int
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DeletionPoint:
    """Success after deleting ``deleted`` steps in one order, with a 95% interval."""

    order: str
    deleted: int
    trials: int
    success: float
    low: float
    high: float


def deletion_order(step_entropy: Sequence[float], *, order: Order, seed: int = 0) -> list[int]:
    """All steps in the order in which they are deleted; ties go to the earlier step.

    >>> deletion_order([0.2, 0.9, 0.5], order="high")
    [1, 2, 0]
    """
    steps = list(range(len(step_entropy)))
    if order == "random":
        random.Random(seed).shuffle(steps)
        return steps
    sign = -1 if order == "high" else 1
    return sorted(steps, key=lambda step: (sign * step_entropy[step], step))


def plan_deletions(
    step_ids: Sequence[int], step_entropy: Sequence[float], *, counts: Sequence[int], seed: int = 0
) -> list[Deletion]:
    """What stays of one solution, for every order and every count that it has the steps for.

    Args:
      step_ids: the step of each token; a position with an id below 0 never stays.
      step_entropy: mean entropy of each step, nats.
      counts: numbers of steps to delete. Deleting none is the same in every order and planned for
        each, so that curves start together.
      seed: for the random order.
    """
    planned = []
    for order in ORDERS:
        sequence = deletion_order(step_entropy, order=order, seed=seed)
        for count in counts:
            if count <= len(sequence):
                gone = set(sequence[:count])
                kept = tuple(t for t, step in enumerate(step_ids) if step >= 0 and step not in gone)
                planned.append(Deletion(order, count, kept))
    return planned


def deletion_curve(outcomes: Iterable[dict[str, Any]]) -> list[DeletionPoint]:
    """Success by order and number of deleted steps, in the order of ``ORDERS``, then of counts.

    Args:
      outcomes: mappings with ``order``, ``deleted`` and ``correct``, one per attempted answer.
        Compare counts only over the same solutions: a solution too short for the largest count
        should have been left out of all.
    """
    tally: dict[tuple[str, int], list[int]] = {}
    for row in outcomes:
        counts = tally.setdefault((row["order"], int(row["deleted"])), [0, 0])
        counts[0] += bool(row["correct"])
        counts[1] += 1
    known = sorted(tally, key=lambda key: (ORDERS.index(key[0]) if key[0] in ORDERS else 9, key))
    return [
        DeletionPoint(order, deleted, trials, right / trials, *wilson(right, trials))
        for order, deleted in known
        for right, trials in [tally[order, deleted]]
    ]


def deletion_rows(points: Sequence[DeletionPoint]) -> list[dict[str, Any]]:
    """One row per point, as written to JSONL."""
    return [dataclasses.asdict(point) for point in points]


def deletion_section(rows: Sequence[dict[str, Any]]) -> Section | None:
    """The report's section from rows of :func:`deletion_rows`: one curve per order."""
    if not rows:
        return None
    grid = sorted({int(row["deleted"]) for row in rows})
    series = []
    for colour, order in enumerate(dict.fromkeys(row["order"] for row in rows)):
        own = {int(row["deleted"]): row for row in rows if row["order"] == order}
        columns = {
            key: [rounded(own[k][key]) if k in own else None for k in grid]
            for key in ("success", "low", "high")
        }
        name = _NAMES.get(order, str(order))
        series.append(
            Series(
                name,
                columns["success"],
                run_colour(colour),
                dash=colour,
                paint="line+dots",
                low=columns["low"],
                high=columns["high"],
            )
        )
    panel = Panel("Success after deletion", grid, series, form="share", x_name="steps deleted")
    notes = (
        "Share of right answers after deleting steps from a solution by their entropy. "
        "The policy goes on from what is left. Bands are 95% intervals over solutions.",
        *([str(rows[0]["about"])] if rows[0].get("about") else []),
    )
    return Section("deletion", "Step deletion", [panel], notes)
