"""Step deletion with a model: what its answers are worth once steps of a solution are gone.

From a right solution, k steps are deleted; the policy goes on from what is left, and solution and
continuation together are graded. A solution is one that the policy wrote itself, or the expert's;
its steps are ordered by the policy's entropy in either case.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from echorl_jax.data import encode_target, expert_text
from echorl_jax.errors import UserError
from echorl_jax.evaluation.evaluate import end_tokens
from echorl_jax.tools.report.deletion import plan_deletions
from echorl_jax.tools.report.policy import Policy, Trajectory
from echorl_jax.tools.report.trajectories import step_means

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
