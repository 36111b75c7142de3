"""Step deletion: how much a right answer depends on its reasoning steps.

From a right solution, k steps are deleted, from the highest step entropy down, from the lowest up,
or at random; the policy continues the rest, and solution and continuation together are graded. The
paper finds that deleting high-entropy steps costs accuracy soonest. The policy or the expert wrote
the solution; the policy's entropy orders its steps in either case.
"""

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from echorl_jax.data import encode_target, expert_text
from echorl_jax.environment import end_tokens
from echorl_jax.errors import UserError
from echorl_jax.evaluation.evaluate import wilson
from echorl_jax.tools.report.curves import Panel, Section, Series, on_grid, run_colour
from echorl_jax.tools.report.golden_entropy import step_means
from echorl_jax.tools.report.policy import Policy, Trajectory

Row = dict[str, Any]
ORDERS = {
    "high": "highest entropy first",
    "low": "lowest entropy first",
    "random": "at random",
}


@dataclasses.dataclass(frozen=True)
class Deletion:
    """A solution without some of its steps: ``kept`` are the positions of the other tokens."""

    order: str
    deleted: int
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Solution:
    """A right solution without its end token."""

    row: int  # index in the data
    prompt: tuple[int, ...]
    trajectory: Trajectory

    @property
    def steps(self) -> int:
        """Its number of reasoning steps."""
        return max(self.trajectory.step_ids, default=-1) + 1


def deletion_order(step_entropy: Sequence[float], *, order: str, seed: int = 0) -> list[int]:
    """All steps in the order in which they are deleted; ties go to the earlier step.

    >>> deletion_order([0.2, 0.9, 0.5], order="high")
    [1, 2, 0]
    """
    steps = list(range(len(step_entropy)))
    if order == "random":
        random.Random(seed).shuffle(steps)
        return steps
    return sorted(steps, key=step_entropy.__getitem__, reverse=order == "high")


def plan_deletions(
    step_ids: Sequence[int], step_entropy: Sequence[float], *, counts: Sequence[int], seed: int = 0
) -> list[Deletion]:
    """The deletions from one solution, in every order and by every count that it has steps for.

    Args:
      step_ids: the step of each token; a position with an id below 0 is always deleted.
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


def deletion_curve(outcomes: Iterable[Row]) -> list[Row]:
    """Success by order and number of deleted steps, in the order of ``ORDERS``, then of counts.

    Args:
      outcomes: rows with ``order``, ``deleted`` and ``correct``, one per attempted answer; those
        whose ``correct`` is None are not judged and not counted. All counts must be of the same
        solutions: leave out those too short for the largest count.

    Returns:
      Rows with ``order``, ``deleted``, ``trials``, ``success`` and its 95% interval ``low``,
      ``high``.
    """
    verdicts: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for row in outcomes:
        if row["correct"] is not None:
            verdicts[row["order"], int(row["deleted"])].append(bool(row["correct"]))
    names, points = list(ORDERS), []
    for order, deleted in sorted(verdicts, key=lambda key: (names.index(key[0]), key[1])):
        found = verdicts[order, deleted]
        trials, right = len(found), sum(found)
        low, high = wilson(right, trials)
        point = {"order": order, "deleted": deleted, "trials": trials}
        points.append(point | {"success": right / trials, "low": low, "high": high})
    return points


def deletion_section(rows: Sequence[Row]) -> Section | None:
    """The report's section from rows of :func:`deletion_curve`: one curve per order."""
    if not rows:
        return None
    grid = sorted({int(row["deleted"]) for row in rows})
    series = []
    for colour, order in enumerate(dict.fromkeys(row["order"] for row in rows)):
        columns = {
            key: on_grid(grid, {int(r["deleted"]): r[key] for r in rows if r["order"] == order})
            for key in ("success", "low", "high")
        }
        success = columns.pop("success")
        name = ORDERS.get(order, str(order))
        series.append(Series(name, success, run_colour(colour), colour, "line+dots", **columns))
    panel = Panel("Success after deletion", grid, series, form="share", x_name="steps deleted")
    notes = [
        "Share of right answers after deleting steps from a solution by their entropy. "
        "The policy continues the rest. Bands are 95% intervals over solutions.",
    ]
    notes += [str(rows[0]["about"])] if rows[0].get("about") else []
    return Section("deletion", "Step deletion", [panel], notes)


def find_solutions(policy: Policy, rows: Sequence[Mapping[str, Any]]) -> list[Solution]:
    """One solution for each row that has one: the policy's first right answer, or the expert's.

    Args:
      policy: answers ``options.samples`` times, and gives the entropies. Expert solutions longer
        than ``options.max_new_tokens`` are left out.
      rows: in verl's columns.

    Raises:
      UserError: no row has a solution.
    """
    options, prompts = policy.options, list(map(policy.prompt, rows))
    fits = [i for i, ids in enumerate(prompts) if len(ids) <= options.max_prompt_tokens]
    if not fits:
        raise UserError(
            f"--data: no prompt is within --max_prompt_tokens={options.max_prompt_tokens}"
        )
    if options.solutions == "expert":
        told = {i: encode_target(policy.tokenizer, rows[i]) for i in fits if expert_text(rows[i])}
        told = {i: ids for i, ids in told.items() if len(ids) <= options.max_new_tokens}
        scored = policy.score([prompts[i] for i in told], list(told.values()), "expert solutions")
        found = dict(zip(told, scored, strict=True))
    else:
        asked = [prompts[i] for i in fits], [rows[i] for i in fits]
        answers = policy.answer(*asked, "answers", samples=options.samples)
        right = ((i, [a for a in own if a.correct]) for i, own in zip(fits, answers, strict=True))
        found = {i: own[0].trajectory for i, own in right if own}
    if not found:
        by = f"by the {options.solutions}"
        raise UserError(f"deletion: none of {len(rows)} rows has a right solution {by}")
    ends = end_tokens(policy.tokenizer, policy.model)
    return [Solution(i, tuple(prompts[i]), _without_end(t, ends)) for i, t in found.items()]


def deletion_outcomes(
    policy: Policy, rows: Sequence[Mapping[str, Any]], solutions: Sequence[Solution]
) -> list[Row]:
    """The verdict after each deletion, for solutions with enough steps for the largest count.

    Orders that leave the same text of a solution share one continuation.

    Returns:
      Rows for :func:`deletion_curve`, with the text that was left and the answer.

    Raises:
      UserError: no solution has as many steps as the largest of ``options.deletions``.
    """
    counts, seed = policy.options.deletions, policy.options.seed
    planned = []
    for solution in solutions:
        if solution.steps >= max(counts):
            ids, trajectory = solution.trajectory.step_ids, solution.trajectory
            means = step_means(trajectory.entropy, ids)
            deletions = plan_deletions(ids, means, counts=counts, seed=seed + solution.row)
            planned += [(solution, deletion) for deletion in deletions]
    if not planned:
        raise UserError(
            f"--deletions={','.join(map(str, counts))}: the longest of {len(solutions)} solutions "
            f"has {max(solution.steps for solution in solutions)} steps"
        )
    edits = {(solution.row, deletion.kept): solution for solution, deletion in planned}
    left = [[solution.trajectory.ids[t] for t in kept] for (_, kept), solution in edits.items()]
    answers = policy.answer(
        [solution.prompt for solution in edits.values()],
        [rows[solution.row] for solution in edits.values()],
        "edited solutions",
        prefixes=left,
        draw=1,
    )
    texts = policy.tokenizer.batch_decode(left)
    ended = {
        edit: {"correct": answer.correct, "left": text, "answer": answer.text}
        for edit, text, (answer,) in zip(edits, texts, answers, strict=True)
    }
    return [
        {
            "row": solution.row,
            "steps": solution.steps,
            "order": deletion.order,
            "deleted": deletion.deleted,
            **ended[solution.row, deletion.kept],
        }
        for solution, deletion in planned
    ]


def _without_end(trajectory: Trajectory, ends: Sequence[int]) -> Trajectory:
    length = len(trajectory.ids)
    while length and trajectory.ids[length - 1] in ends:
        length -= 1
    return Trajectory(*(column[:length] for column in vars(trajectory).values()))
