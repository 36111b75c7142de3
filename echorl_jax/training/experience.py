"""The experience of a step: groups are sampled and graded, and filtered with dynamic sampling."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from echorl_jax.core import judged_groups, mixed_groups, overlong_punishment
from echorl_jax.data import Prompt, add_hint
from echorl_jax.environment import Engine, sample_and_grade
from echorl_jax.rewards import GraderPool, Verdict, grading_failed
from echorl_jax.rewards.loading import DROPPED, MAX_METRICS, parse_graders
from echorl_jax.training.logs import timed
from echorl_jax.training.setup import Setup
from echorl_jax.types import Array, Graded, HostArray, Image, PyTree, Rollouts, pytree


@pytree
class Groups:
    """P groups of G rows (NumPy)."""

    prompt_ids: HostArray  # i32 [P, S]
    prompt_length: HostArray  # i32 [P]
    completion_ids: HostArray  # i32 [P, G, T]
    completion_length: HostArray  # i32 [P, G]
    rollout_logprobs: HostArray  # f32 [P, G, T]
    token_entropy: HostArray  # f32 [P, G, T]
    truncated: HostArray  # bool [P, G]
    rewards: HostArray  # f32 [P, G], 0 without a verdict
    correct: HostArray  # bool [P, G], False without a verdict
    judged: HostArray  # bool [P, G], False for a row without a verdict
    on_policy: HostArray  # bool [P, G], False for experts' rows
    in_policy: HostArray  # bool [P, G], rows of the policy loss
    in_echo: HostArray  # bool [P, G], rows that may give clips
    reasons: HostArray  # str [P, G], of the verdicts
    metrics: HostArray  # dict [P, G], further named numbers of the verdicts
    # f32 [P, G, R], each reward, NaN where it does not apply; R = 0 where the sum is normalised
    reward_parts: HostArray


@dataclasses.dataclass(frozen=True)
class Experience:
    """Graded groups on the host, the same on every process."""

    prompts: tuple[Prompt, ...]  # P, as the policy saw them
    groups: Groups
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    slot_occupancy: float = 1.0  # useful tokens / decoded tokens
    restarted_rows: int = 0  # rows that began again because the sampler's pages ran out
    rounds: int = 1

    @property
    def rollouts(self) -> Rollouts:
        """The completions, N = P * G rows in groups."""
        groups = self.groups
        count, size = groups.on_policy.shape
        group: HostArray = np.repeat(np.arange(count, dtype=np.int32), size)
        return Rollouts(
            prompt_ids=groups.prompt_ids,
            prompt_length=groups.prompt_length,
            group=group,
            completion_ids=_flat(groups.completion_ids),
            completion_length=_flat(groups.completion_length),
            rollout_logprobs=_flat(groups.rollout_logprobs),
            token_entropy=_flat(groups.token_entropy),
            truncated=_flat(groups.truncated),
        )

    def with_entropies(self, token_entropy: HostArray) -> "Experience":
        """The experience with the entropies ``[N, T]`` f32 of its tokens (nats)."""
        shape = self.groups.completion_ids.shape
        groups = dataclasses.replace(self.groups, token_entropy=token_entropy.reshape(shape))
        return dataclasses.replace(self, groups=groups)

    @property
    def graded(self) -> Graded:
        """The verdicts on the rows of :attr:`rollouts`."""
        groups = self.groups
        return Graded(
            rewards=_flat(groups.rewards),
            correct=_flat(groups.correct),
            on_policy=_flat(groups.on_policy),
            judged=_flat(groups.judged),
        )

    def take(self, groups: HostArray) -> "Experience":
        """The groups with these numbers, in that order."""
        return dataclasses.replace(
            self,
            prompts=tuple(self.prompts[group] for group in groups),
            groups=jax.tree.map(lambda array: array[groups], self.groups),
        )

    def images(self, parts: int) -> list[list[Image]]:
        """The images of the prompts of each mini-batch."""
        return [
            [image for prompt in part.prompts for image in prompt.images]
            for part in self.split(parts)
        ]

    def split(self, parts: int) -> list["Experience"]:
        """Equal mini-batches of whole groups, in order."""
        return [self.take(part) for part in np.split(np.arange(len(self.prompts)), parts)]


def _flat(array: HostArray) -> HostArray:
    """``[P, G, ...]`` as ``[N, ...]``."""
    return array.reshape(-1, *array.shape[2:])


def collect(
    setup: Setup,
    params: PyTree,
    key: Array,
    *,
    step: int,
    stream: Iterator[list[Prompt]],
    engine: Engine,
    grader: GraderPool,
    warn: Callable[[str], None],
    reached: Callable[[str, int], None] = lambda phase, step: None,
) -> Experience:
    """Samples and grades groups for the next prompts.

    With dynamic sampling more rounds follow until ``prompts_per_step`` groups are mixed, or
    ``max_rounds`` is reached. Groups that are not mixed, or too many, are left out of the policy
    loss; solved ones still give clips. Groups are in the order in which mini-batches take them.

    Args:
      setup: of the run.
      params: the policy's parameters.
      key: PRNG key of the step.
      step: from 1.
      stream: yields the prompts of a round.
      engine, grader: sample and judge.
      warn: is called with a line about rewards or graders that look broken.
      reached: is called at the end of a phase, where a test may end the process.
    """
    config, objective = setup.config, setup.objective
    rounds: list[Experience] = []
    is_mixed: list[HostArray] = []
    wanted = config.rollout.prompts_per_step
    for number in range(config.objective.max_rounds if objective.dynamic_sampling else 1):
        prompts = _with_hints(setup, next(stream), step)
        seconds: dict[str, float] = {}
        with timed(seconds, "rollout"):
            attempts = sample_and_grade(
                engine,
                params,
                prompts,
                jax.random.fold_in(key, number),
                sampling=setup.sampling,
                tokenizer=setup.tokenizer,
                grader=grader,
                expert_rows=objective.expert_rows,
            )
            reached("rollout", step)
        # Rows are graded as they end: this is how long the accelerator waits for the rest.
        with timed(seconds, "grade"):
            verdicts = attempts.verdicts().verdicts
            reached("grading", step)
        graded = with_verdicts(setup, prompts, attempts.rollouts, attempts.on_policy, verdicts)
        graded = dataclasses.replace(
            graded,
            seconds=seconds,
            slot_occupancy=attempts.slot_occupancy,
            restarted_rows=attempts.restarted_rows,
        )
        rounds.append(_without_overflow(graded, step, warn))
        if not objective.dynamic_sampling:
            break
        is_mixed.append(mixed(rounds[-1]))
        if np.concatenate(is_mixed).sum() >= wanted:
            break
    experience = join_rounds(rounds)
    if objective.dynamic_sampling:
        keep_solved = config.echo.filtered_groups == "keep"
        experience = choose_groups(
            experience, np.concatenate(is_mixed), wanted=wanted, keep_solved=keep_solved
        )
    _warn_of_failed_grading(experience, step, warn)
    return deal(experience, config.objective.mini_batches)


def _with_hints(setup: Setup, prompts: Sequence[Prompt], step: int) -> Sequence[Prompt]:
    """The prompts, with a part of the solution where the objective gives hints (UFT)."""
    config = setup.config
    if not setup.objective.hints:
        return prompts
    return [
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


def with_verdicts(
    setup: Setup,
    prompts: Sequence[Prompt],
    rollouts: Rollouts,
    on_policy: HostArray,
    verdicts: Sequence[Verdict],
) -> Experience:
    """Scores as rewards, with the overlong punishment where the objective has one."""
    judged: HostArray = np.array([verdict.judged for verdict in verdicts], bool)
    given = [0.0 if verdict.score is None else verdict.score for verdict in verdicts]
    scores: HostArray = np.array(given, np.float32)
    correct = [verdict.correct for verdict in verdicts]
    parts: list[HostArray] = (
        [scores[:, None]] if setup.objective.normalise_each else [np.zeros((len(scores), 0))]
    )
    entries = parse_graders(setup.config.data.grader)
    if setup.objective.normalise_each and len(entries) > 1:
        parts = [_scores([entry.name for entry in entries], verdicts)]
    longest = setup.config.rollout.max_new_tokens
    buffer_tokens = int(setup.objective.overlong_buffer * longest)
    if buffer_tokens:
        punishment = overlong_punishment(
            rollouts.completion_length, max_tokens=longest, buffer_tokens=buffer_tokens
        )
        punishment = np.where(on_policy & judged, punishment, 0.0).astype(np.float32)
        scores = scores + punishment
        if setup.objective.normalise_each:
            parts.append(punishment[:, None])

    def grouped(values: HostArray) -> HostArray:
        size = len(verdicts) // len(prompts)
        return np.reshape(values, (len(prompts), size, *np.shape(values)[1:]))

    groups = Groups(
        prompt_ids=rollouts.prompt_ids,
        prompt_length=rollouts.prompt_length,
        completion_ids=grouped(rollouts.completion_ids),
        completion_length=grouped(rollouts.completion_length),
        rollout_logprobs=grouped(rollouts.rollout_logprobs),
        token_entropy=grouped(rollouts.token_entropy),
        truncated=grouped(rollouts.truncated),
        rewards=grouped(scores),
        correct=grouped(np.array(correct, bool)),
        judged=grouped(judged),
        on_policy=grouped(on_policy),
        in_policy=grouped(judged),
        in_echo=grouped(judged),
        reasons=grouped(np.array([verdict.reason for verdict in verdicts], object)),
        metrics=grouped(np.array([verdict.metrics for verdict in verdicts], object)),
        reward_parts=grouped(np.concatenate(parts, axis=1).astype(np.float32)),
    )
    return Experience(tuple(prompts), groups)


def _scores(names: Sequence[str], verdicts: Sequence[Verdict]) -> HostArray:
    """The scores of a list of graders ``[N, R]``: NaN for none, 0 where grading failed."""
    return np.array(
        [
            [0.0 if grading_failed(v.reason) else v.metrics.get(name, np.nan) for name in names]
            for v in verdicts
        ]
    )


def reward_weights(setup: Setup) -> HostArray:
    """The weights ``[R]`` f32 of the rewards in ``Groups.reward_parts``."""
    entries = parse_graders(setup.config.data.grader)
    weights = [entry.weight for entry in entries] if len(entries) > 1 else [1.0]
    if int(setup.objective.overlong_buffer * setup.config.rollout.max_new_tokens):
        weights.append(1.0)
    return np.array(weights, np.float32)


def _without_overflow(experience: Experience, step: int, warn: Callable[[str], None]) -> Experience:
    """Sets all rewards of a group to 0 if their deviation overflows float32, and names the row."""
    rewards, parts = experience.groups.rewards, experience.groups.reward_parts  # [P, G(, R)]
    # The sum of squared differences is at most that of all rows at twice the largest reward.
    limit = np.sqrt(np.finfo(np.float32).max / (4 * rewards.size))
    sizes = np.abs(np.concatenate([rewards[..., None], np.nan_to_num(parts)], axis=2))
    largest = sizes.max(axis=(1, 2))
    for group in np.flatnonzero(largest > limit).tolist():
        warn(
            f"warning: step {step}: a reward of {largest[group]:.3g} for row "
            f"{experience.prompts[group].index} of data.train is beyond {limit:.1g}, where the "
            "deviation of a group overflows float32: the rewards of its group count as 0"
        )
    kept = largest <= limit
    groups = dataclasses.replace(
        experience.groups,
        rewards=np.where(kept[:, None], rewards, np.float32(0)),
        reward_parts=np.where(kept[:, None, None], parts, np.float32(0)),
    )
    return dataclasses.replace(experience, groups=groups)


def mixed(experience: Experience) -> HostArray:
    """The groups with successes and failures among judged rows, bool ``[P]``."""
    graded, group, count = experience.graded, experience.rollouts.group, len(experience.prompts)
    group = judged_groups(group, graded.with_verdict, num_groups=count)
    return np.asarray(mixed_groups(graded.correct, group, num_groups=count + 1))[:count]


def choose_groups(
    experience: Experience, is_mixed: HostArray, *, wanted: int, keep_solved: bool
) -> Experience:
    """Chooses the first ``wanted`` mixed groups for the policy loss, and solved ones for clips.

    ``is_mixed`` is :func:`mixed` of each round: all rounds have one shape and share its programs.
    """
    chosen = is_mixed & (np.cumsum(is_mixed) <= wanted)
    solved = ~is_mixed & experience.groups.correct.any(axis=1)
    gives_clips = chosen | solved if keep_solved else chosen
    groups = dataclasses.replace(
        experience.groups,
        in_policy=chosen[:, None] & experience.groups.in_policy,
        in_echo=gives_clips[:, None] & experience.groups.in_echo,
    )
    return dataclasses.replace(experience, groups=groups)


def join_rounds(rounds: Sequence[Experience]) -> Experience:
    """The groups of all rounds; prompts are padded to the longest."""
    if len(rounds) == 1:
        return rounds[0]
    width = max(each.groups.prompt_ids.shape[1] for each in rounds)

    def widened(groups: Groups) -> Groups:
        missing = [(0, 0), (0, width - groups.prompt_ids.shape[1])]
        return dataclasses.replace(groups, prompt_ids=np.pad(groups.prompt_ids, missing))

    parts = [widened(each.groups) for each in rounds]
    return Experience(
        prompts=tuple(prompt for each in rounds for prompt in each.prompts),
        groups=jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts),
        seconds={name: sum(each.seconds[name] for each in rounds) for name in rounds[0].seconds},
        slot_occupancy=sum(each.slot_occupancy for each in rounds) / len(rounds),
        restarted_rows=sum(each.restarted_rows for each in rounds),
        rounds=len(rounds),
    )


def deal(experience: Experience, parts: int) -> Experience:
    """Reorders groups so that each mini-batch gets an equal share of those in the policy loss."""
    if parts == 1:
        return experience
    order = np.argsort(~experience.groups.in_policy.any(axis=1), kind="stable")
    return experience.take(np.concatenate([order[i::parts] for i in range(parts)]))


def _warn_of_failed_grading(experience: Experience, step: int, warn: Callable[[str], None]) -> None:
    """Warns of a grader that fails on most responses, judges none, or has unusable metrics."""
    reasons = experience.groups.reasons.reshape(-1)
    if not experience.groups.judged.any():
        warn(
            f"warning: step {step}: the grader returned None for all {len(reasons)} responses: "
            "they are not judged, and nothing is learnt from them"
        )
    if dropped := int(sum(each.get(DROPPED, 0) for each in experience.groups.metrics.flat)):
        warn(
            f"warning: step {step}: {dropped} metrics of the grader were dropped: at most "
            f"{MAX_METRICS} finite numbers, under names of up to 40 ASCII letters, digits and _.-"
        )
    failed = [reason for reason in reasons if grading_failed(reason)]
    if 2 * len(failed) > len(reasons):
        warn(
            f"warning: step {step}: {len(failed)} of {len(reasons)} responses could not be "
            f"graded and count as wrong, the first: {failed[0]}"
        )
