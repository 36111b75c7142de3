"""One step's experience: sample groups, add experts and hints, grade, refill where asked to."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

from echorl_jax.config import Config
from echorl_jax.core import Objective, judged_groups, mixed_groups, overlong_punishment
from echorl_jax.data import Prompt, add_hint
from echorl_jax.evaluation.grading import Grading
from echorl_jax.rewards import Verdict, grading_failed
from echorl_jax.rollout import Finished, Progress, generate_with_progress
from echorl_jax.training.experts import append_experts, expert_completions
from echorl_jax.training.logs import timed
from echorl_jax.training.run import Run
from echorl_jax.training.setup import Setup
from echorl_jax.types import Array, Graded, HostArray, PyTree, Rollouts

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Experience:
    """Graded rollouts on the host (NumPy), the same on every process."""

    prompts: tuple[Prompt, ...]  # P, as the policy saw them
    rollouts: Rollouts
    graded: Graded
    in_policy: HostArray  # bool [N], rows of the policy loss
    in_echo: HostArray  # bool [N], rows that may give clips
    reasons: tuple[str, ...]  # N
    seconds: dict[str, float]
    slot_occupancy: float = 1.0  # useful tokens / decoded tokens
    rounds: int = 1


def collect(run: Run, params: PyTree, key: Array, *, step: int) -> Experience:
    """Samples and grades groups for the next prompts.

    With dynamic sampling more rounds follow until ``prompts_per_step`` groups are mixed, or
    ``max_rounds`` is reached. Groups that are not mixed, or too many, are left out of the policy
    loss; all-right ones still give clips. Groups are in the order in which mini-batches take them.
    """
    config = run.setup.config
    rounds: list[Experience] = []
    for number in range(config.objective.max_rounds if run.objective.dynamic_sampling else 1):
        rounds.append(_sample_round(run, params, jax.random.fold_in(key, number), step=step))
        if _mixed(rounds).sum() >= config.rollout.prompts_per_step:
            break
    found = join_rounds(rounds)
    if run.objective.dynamic_sampling:
        found = _filter(
            found,
            _mixed(rounds),
            wanted=config.rollout.prompts_per_step,
            keep_solved=config.echo.filtered_groups == "keep",
        )
    _tell_of_failed_grading(run, found, step)
    return _deal(found, config.objective.mini_batches)


def _tell_of_failed_grading(run: Run, found: Experience, step: int) -> None:
    """Warns of a grader that fails on most responses, or judges none."""
    if not found.graded.with_verdict.any():
        run.log.say(
            f"warning: step {step}: the grader returned None for all {len(found.reasons)} "
            "responses: they are not judged, and nothing is learnt from them"
        )
    failed = [reason for reason in found.reasons if grading_failed(reason)]
    if 2 * len(failed) > len(found.reasons):
        run.log.say(
            f"warning: step {step}: {len(failed)} of {len(found.reasons)} responses could not be "
            f"graded and count as wrong, the first: {failed[0]}"
        )


def split(found: Experience, parts: int) -> list[Experience]:
    """Cuts into equal mini-batches of whole groups, in order."""
    count = len(found.prompts) // parts
    return [_take(found, np.arange(i * count, (i + 1) * count)) for i in range(parts)]


def _sample_round(run: Run, params: PyTree, key: Array, *, step: int) -> Experience:
    setup, objective, config = run.setup, run.objective, run.setup.config
    seconds: dict[str, float] = {}
    prompts = next(run.stream)
    if objective.hints:
        prompts = [
            add_hint(
                prompt,
                setup.tokenizer,
                step=step - 1,
                seed=config.seed,
                hint_steps=config.objective.hint_steps or max(1, round(0.6 * config.steps)),
                max_prompt_tokens=config.data.max_prompt_tokens,
            )
            for prompt in prompts
        ]
    each = [prompt for prompt in prompts for _ in range(config.rollout.group_size)]
    grading = Grading(
        [prompt.row for prompt in each],
        tokenizer=setup.tokenizer,
        grader=run.grader,
        # A solution that goes on from a hint is right or wrong together with it.
        openings=[prompt.ids[len(prompt.ids) - prompt.hint_tokens :] for prompt in each],
    )
    with timed(seconds, "rollout"):
        rollouts, on_policy, progress = sample(run, params, prompts, key, finished=grading.take)
        run.faults.reach("rollout", step)
    # Rows are graded as they end: this is how long the accelerator waits for what is left.
    with timed(seconds, "grade"):
        texts = grading.result()
        run.faults.reach("grading", step)
    graded = _graded(setup, objective, rollouts, texts.verdicts, on_policy)
    return Experience(
        prompts=tuple(prompts),
        rollouts=rollouts,
        graded=_without_overflow(run, graded, prompts, step),
        in_policy=graded.with_verdict,
        in_echo=graded.with_verdict,
        reasons=tuple(verdict.reason for verdict in texts.verdicts),
        seconds=seconds,
        slot_occupancy=progress.occupancy,
    )


def sample(
    run: Run,
    params: PyTree,
    prompts: Sequence[Prompt],
    key: Array,
    *,
    finished: Finished,
    row_limits: Sequence[int] | None = None,
) -> tuple[Rollouts, HostArray, Progress]:
    """The groups of the prompts (NumPy), experts included, and which rows the policy wrote.

    Args:
      finished: is told each row and its tokens as soon as they are known, experts' first.
      row_limits: shorter limits for single sampled rows.
    """
    setup, objective, config = run.setup, run.objective, run.setup.config
    group, longest = config.rollout.group_size, config.rollout.max_new_tokens
    sampled, experts = setup.sampled_group_size, None
    if objective.expert_rows:
        experts = expert_completions(prompts, setup.tokenizer, longest=longest)
        places = [row for row in range(len(prompts) * group) if row % group >= sampled]
        finished(places, [experts.completions[row // group] for row in places])

    def tell(rows: Sequence[int], completions: Sequence[HostArray]) -> None:
        finished([row // sampled * group + row % sampled for row in rows], completions)

    rollouts, progress = generate_with_progress(
        setup.model,
        params,
        [prompt.ids for prompt in prompts],
        key,
        group_size=sampled,
        max_new_tokens=longest,
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        kv_dtype=config.rollout.kv_dtype,
        slots=setup.slots,
        eos_ids=setup.eos_ids,
        row_limits=row_limits,
        prompt_tokens=_prompt_tokens(config, max(len(prompt.ids) for prompt in prompts)),
        mesh=setup.mesh,
        finished=tell,
    )
    rollouts = jax.device_get(rollouts)
    if experts is None:
        return rollouts, np.ones(len(rollouts.group), bool), progress
    joined, on_policy = append_experts(rollouts, experts, count=objective.expert_rows)
    return joined, on_policy, progress


def _prompt_tokens(config: Config, longest: int) -> int:
    """The step's padded prompt length: one for all steps if programs are compiled ahead.

    Else powers of two: each further length is a prefill program and one decode program for each
    number of slots. It follows from the step's own prompts, so that a resumed run has the same.
    """
    most = config.data.max_prompt_tokens
    return most if config.optim.compile_ahead else min(most, 1 << (longest - 1).bit_length())


def _graded(
    setup: Setup,
    objective: Objective,
    rollouts: Rollouts,
    verdicts: Sequence[Verdict],
    on_policy: HostArray,
) -> Graded:
    """Scores as rewards, with the overlong punishment where the objective has one."""
    judged: HostArray = np.array([verdict.judged for verdict in verdicts], bool)
    given = [0.0 if verdict.score is None else verdict.score for verdict in verdicts]
    scores: HostArray = np.array(given, np.float32)
    threshold = setup.config.objective.success_threshold
    if threshold is None:
        right = [verdict.correct for verdict in verdicts]
    else:
        right = [v.score is not None and v.score >= threshold for v in verdicts]
    correct: HostArray = np.array(right, bool)
    longest = setup.config.rollout.max_new_tokens
    buffer_tokens = int(objective.overlong_buffer * longest)
    if buffer_tokens:
        punishment = overlong_punishment(
            rollouts.completion_length, max_tokens=longest, buffer_tokens=buffer_tokens
        )
        scores = scores + np.where(on_policy & judged, punishment, 0.0).astype(np.float32)
    return Graded(rewards=scores, correct=correct, on_policy=on_policy, judged=judged)


def _without_overflow(run: Run, graded: Graded, prompts: Sequence[Prompt], step: int) -> Graded:
    """Sets all rewards of a group to 0 if their deviation overflows float32, and names the row."""
    rewards = graded.rewards
    # The sum of squared differences is at most that of all rows at twice the largest reward.
    limit = np.sqrt(np.finfo(np.float32).max / (4 * len(rewards)))
    groups = rewards.reshape(len(prompts), -1)
    largest = np.abs(groups).max(axis=1)
    for group in np.flatnonzero(largest > limit).tolist():
        run.log.say(
            f"warning: step {step}: a reward of {largest[group]:.3g} for row "
            f"{prompts[group].index} of data.train is beyond {limit:.1g}, where the deviation of a "
            "group overflows float32: the rewards of its group count as 0"
        )
    kept = np.where((largest > limit)[:, None], 0.0, groups).astype(np.float32)
    return dataclasses.replace(graded, rewards=kept.reshape(-1))


def _mixed(rounds: Sequence[Experience]) -> np.ndarray:
    """The groups with successes and failures among judged rows, bool ``[P]`` over all rounds."""
    flags = []
    for part in rounds:
        count, graded = len(part.prompts), part.graded
        group = judged_groups(part.rollouts.group, graded.with_verdict, num_groups=count)
        mixed = mixed_groups(graded.correct, group, num_groups=count + 1)
        flags.append(np.asarray(mixed)[:count])
    return np.concatenate(flags)


def _filter(found: Experience, mixed: np.ndarray, *, wanted: int, keep_solved: bool) -> Experience:
    """The first ``wanted`` mixed groups for the policy loss, and all-right ones for clips."""
    group, correct = found.rollouts.group, found.graded.correct
    chosen = mixed & (np.cumsum(mixed) <= wanted)
    solved = ~mixed & (np.bincount(group, weights=correct, minlength=len(mixed)) > 0)
    gives_clips = chosen | solved if keep_solved else chosen
    return dataclasses.replace(
        found,
        in_policy=chosen[group] & found.in_policy,
        in_echo=gives_clips[group] & found.in_echo,
    )


def join_rounds(rounds: Sequence[Experience]) -> Experience:
    """Rounds end to end; a row's group counts over all of them."""
    if len(rounds) == 1:
        return rounds[0]
    starts = np.cumsum([0] + [len(part.prompts) for part in rounds[:-1]])
    rollouts = [
        dataclasses.replace(part.rollouts, group=part.rollouts.group + start)
        for part, start in zip(rounds, starts.astype(np.int32), strict=True)
    ]
    # The sampler pads prompts to the longest of the round.
    width = max(part.prompt_ids.shape[1] for part in rollouts)
    rollouts = [
        dataclasses.replace(
            part,
            prompt_ids=np.pad(part.prompt_ids, [(0, 0), (0, width - part.prompt_ids.shape[1])]),
        )
        for part in rollouts
    ]
    return Experience(
        prompts=tuple(prompt for part in rounds for prompt in part.prompts),
        rollouts=_concatenate(rollouts),
        graded=_concatenate([part.graded for part in rounds]),
        in_policy=np.concatenate([part.in_policy for part in rounds]),
        in_echo=np.concatenate([part.in_echo for part in rounds]),
        reasons=tuple(text for part in rounds for text in part.reasons),
        seconds={name: sum(part.seconds[name] for part in rounds) for name in rounds[0].seconds},
        slot_occupancy=sum(part.slot_occupancy for part in rounds) / len(rounds),
        rounds=len(rounds),
    )


def _concatenate(parts: Sequence[_T]) -> _T:
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _deal(found: Experience, parts: int) -> Experience:
    """Reorders groups so that each mini-batch gets an equal share of those in the policy loss."""
    if parts == 1:
        return found
    size = len(found.reasons) // len(found.prompts)
    in_policy = found.in_policy.reshape(-1, size).any(axis=1)
    order = np.argsort(~in_policy, kind="stable")
    return _take(found, np.concatenate([order[i::parts] for i in range(parts)]))


def _take(found: Experience, groups: np.ndarray) -> Experience:
    """The given groups, in that order, with all their rows (groups are equally large)."""
    size = len(found.reasons) // len(found.prompts)
    rows = (groups[:, None] * size + np.arange(size)[None, :]).reshape(-1)
    whole = found.rollouts
    group: HostArray = np.repeat(np.arange(len(groups), dtype=np.int32), size)
    rollouts = Rollouts(
        prompt_ids=whole.prompt_ids[groups],
        prompt_length=whole.prompt_length[groups],
        group=group,
        completion_ids=whole.completion_ids[rows],
        completion_length=whole.completion_length[rows],
        rollout_logprobs=whole.rollout_logprobs[rows],
        token_entropy=whole.token_entropy[rows],
        truncated=whole.truncated[rows],
    )
    return dataclasses.replace(
        found,
        prompts=tuple(found.prompts[g] for g in groups),
        rollouts=rollouts,
        graded=jax.tree.map(lambda array: array[rows], found.graded),
        in_policy=found.in_policy[rows],
        in_echo=found.in_echo[rows],
        reasons=tuple(found.reasons[r] for r in rows),
    )
