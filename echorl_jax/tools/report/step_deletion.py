"""Step deletion: how much a right answer depends on its reasoning steps.

From a right solution, k steps are deleted, from the highest step entropy down, from the lowest up,
or at random; the policy continues from what is left, and solution and continuation together are
graded. The paper finds that deleting high-entropy steps costs accuracy soonest. A solution is one
that the policy wrote or the expert's; its steps are ordered by the policy's entropy in either case.
"""

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from echorl_jax.data import encode_target, expert_text
from echorl_jax.errors import UserError
from echorl_jax.evaluation.evaluate import end_tokens
from echorl_jax.evaluation.intervals import wilson
from echorl_jax.tools.report.curves import Panel, Section, Series, rounded, run_colour
from echorl_jax.tools.report.golden_entropy import step_means
from echorl_jax.tools.report.policy import Policy, Trajectory

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


Solver = Literal["policy", "expert"]


@dataclasses.dataclass(frozen=True)
class Solution:
    """A right solution without its end token."""

    row: int  # place in the data
    prompt: tuple[int, ...]
    trajectory: Trajectory

    @property
    def steps(self) -> int:
        """Its number of reasoning steps."""
        return max(self.trajectory.step_ids, default=-1) + 1


def find_solutions(
    policy: Policy,
    rows: Sequence[Mapping[str, Any]],
    *,
    solver: Solver,
    samples: int,
) -> list[Solution]:
    """One solution for each row that has one: the policy's first right answer, or the expert's.

    Args:
      policy: answers, and gives the entropies. Expert solutions that are longer than its longest
        answer are left out.
      rows: in verl's columns.
      solver: who wrote the solutions.
      samples: the policy's attempts at each row.

    Raises:
      UserError: no row has a solution.
    """
    prompts, longest = [policy.prompt(row) for row in rows], policy.max_prompt_tokens
    fits = [i for i, ids in enumerate(prompts) if len(ids) <= longest]
    if not fits:
        raise UserError(f"--data: no prompt is within --max_prompt_tokens={longest}")
    if solver == "expert":
        told = {i: encode_target(policy.tokenizer, rows[i]) for i in fits if expert_text(rows[i])}
        told = {i: ids for i, ids in told.items() if len(ids) <= policy.max_new_tokens}
        scored = policy.score([prompts[i] for i in told], list(told.values()), "expert solutions")
        found = dict(zip(told, scored, strict=True))
    else:
        answers = policy.answer(
            [prompts[i] for i in fits], [rows[i] for i in fits], "answers", samples=samples
        )
        right = ((i, [a for a in own if a.correct]) for i, own in zip(fits, answers, strict=True))
        found = {i: own[0].trajectory for i, own in right if own}
    if not found:
        raise UserError(f"deletion: none of {len(rows)} rows has a right solution by the {solver}")
    ends = end_tokens(policy.tokenizer, policy.model)
    return [
        Solution(i, tuple(prompts[i]), _without_end(trajectory, ends))
        for i, trajectory in found.items()
    ]


def deletion_outcomes(
    policy: Policy,
    rows: Sequence[Mapping[str, Any]],
    solutions: Sequence[Solution],
    *,
    counts: Sequence[int],
) -> list[dict[str, Any]]:
    """The verdict after each deletion, for solutions with enough steps for the largest count.

    Orders that leave the same text of a solution share one continuation.

    Returns:
      Rows for :func:`~deletion.deletion_curve`, with the text that was left and
      the answer.

    Raises:
      UserError: no solution has as many steps as the largest of ``counts``.
    """
    enough = [s for s in solutions if s.steps >= max(counts)]
    if not enough:
        longest = max(solution.steps for solution in solutions)
        raise UserError(
            f"--deletions={','.join(map(str, counts))}: the longest of {len(solutions)} solutions "
            f"has {longest} steps"
        )
    planned = [
        (solution, deletion)
        for solution in enough
        for deletion in plan_deletions(
            solution.trajectory.step_ids,
            step_means(solution.trajectory.entropy, solution.trajectory.step_ids),
            counts=counts,
            seed=policy.seed + solution.row,
        )
    ]
    edits = {(solution.row, deletion.kept): solution for solution, deletion in planned}
    left = [[solution.trajectory.ids[t] for t in kept] for (_, kept), solution in edits.items()]
    answers = policy.answer(
        [solution.prompt for solution in edits.values()],
        [rows[solution.row] for solution in edits.values()],
        "edited solutions",
        prefixes=left,
        draw=1,
    )
    answered = dict(zip(edits, (found[0] for found in answers), strict=True))
    texts = dict(zip(edits, policy.tokenizer.batch_decode(left), strict=True))
    return [
        {
            "row": solution.row,
            "steps": solution.steps,
            "order": deletion.order,
            "deleted": deletion.deleted,
            "correct": answered[solution.row, deletion.kept].correct,
            "left": texts[solution.row, deletion.kept],
            "answer": answered[solution.row, deletion.kept].text,
        }
        for solution, deletion in planned
    ]


def _without_end(trajectory: Trajectory, ends: Sequence[int]) -> Trajectory:
    length = len(trajectory.ids)
    while length and trajectory.ids[length - 1] in ends:
        length -= 1
    return Trajectory(
        trajectory.ids[:length], trajectory.entropy[:length], trajectory.step_ids[:length]
    )
