"""Samples completions and grades them: the one act of training and of evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from echorl_jax.config import ConfigError
from echorl_jax.data import Prompt, encode_target
from echorl_jax.environment.engines import Engine
from echorl_jax.environment.grading import GradedTexts, Grading
from echorl_jax.errors import RunStopped
from echorl_jax.models import Decoder
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import Progress, Sampling, pad_lists
from echorl_jax.types import Array, HostArray, PyTree, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def target_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """The tokens of a prompt's expert trajectory, EOS included.

    Raises:
      ConfigError: the row has none; the line names it.
    """
    try:
        return encode_target(tokenizer, prompt.row)
    except ValueError as error:
        raise ConfigError(f"row {prompt.index} of data.train: {error}") from error


@dataclasses.dataclass(frozen=True)
class Experts:
    """One expert trajectory for each prompt, cut to what a completion may have."""

    completions: tuple[HostArray, ...]  # i32
    whole: HostArray  # bool [P], not cut


def expert_completions(
    prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase", *, longest: int
) -> Experts:
    """The prompts' expert trajectories, EOS included; a longer one than ``longest`` is cut there.

    Raises:
      ConfigError: a row has none; the line names it.
    """
    targets = [target_ids(tokenizer, prompt) for prompt in prompts]
    return Experts(
        tuple(np.array(target[:longest], np.int32) for target in targets),
        np.array([len(target) <= longest for target in targets], bool),
    )


def append_experts(
    rollouts: Rollouts, experts: Experts, *, count: int
) -> tuple[Rollouts, np.ndarray]:
    """Adds the row's expert trajectory, ``count`` times, at the end of each group.

    Args:
      rollouts: NumPy arrays, group-major with equal group sizes.
      experts: of the groups' prompts.
      count: rows that each group gets.

    Returns:
      The rollouts and ``on_policy``, bool ``[N]``, False for the expert rows. These have no
      log-probabilities and no entropies: zeros.
    """
    groups, (rows, width) = len(experts.completions), rollouts.completion_ids.shape
    ids, length = pad_lists([ids.tolist() for ids in experts.completions], width)

    def add(own: HostArray, expert: HostArray) -> HostArray:
        own = own.reshape(groups, rows // groups, *own.shape[1:])
        expert = np.repeat(expert[:, None], count, axis=1)
        joined = np.concatenate([own, expert.astype(own.dtype)], axis=1)
        return joined.reshape(-1, *own.shape[2:])

    joined = dataclasses.replace(
        rollouts,
        group=add(rollouts.group, np.arange(groups)),
        completion_ids=add(rollouts.completion_ids, ids),
        completion_length=add(rollouts.completion_length, length),
        rollout_logprobs=add(rollouts.rollout_logprobs, np.zeros((groups, width))),
        token_entropy=add(rollouts.token_entropy, np.zeros((groups, width))),
        truncated=add(rollouts.truncated, ~experts.whole),
    )
    return joined, add(np.ones(rows, bool), np.zeros(groups, bool))


@dataclasses.dataclass(frozen=True)
class Attempts:
    """Completions; verdicts follow while the caller goes on."""

    rollouts: Rollouts  # NumPy, rows in groups
    on_policy: HostArray  # bool [N], False for experts' rows
    slot_occupancy: float  # useful tokens / decoded tokens
    grading: Grading

    def verdicts(self) -> GradedTexts:
        """Waits for the verdicts; all processes call it in the same order."""
        return self.grading.result()


def end_tokens(tokenizer: "PreTrainedTokenizerBase", model: Decoder) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's and the model's."""
    eos: Any = tokenizer.eos_token_id
    return tuple(sorted({eos, *model.config.eos_ids}))


def sample_and_grade(
    engine: Engine,
    params: PyTree,
    prompts: Sequence[Prompt],
    key: Array,
    *,
    sampling: Sampling,
    tokenizer: "PreTrainedTokenizerBase",
    grader: GraderPool,
    graded_prompts: int | None = None,
    expert_rows: int = 0,
    all_texts: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Attempts:
    """Samples a group for each prompt, and starts to grade each row when it ends.

    Args:
      engine: samples.
      params: the policy's parameters.
      prompts: P prompts; hints at their ends are graded with the completions.
      key: PRNG key of this call.
      sampling: ``group_size`` counts sampled rows.
      tokenizer: decodes completions.
      grader: judges them.
      graded_prompts: prompts from here on only fill up the call's shape; all are graded if None.
      expert_rows: copies of the expert trajectory at the end of each group, G in all with those.
      all_texts: decode the completions that other processes grade too.
      progress: called by the engine now and then; an error ends the call.

    Raises:
      ConfigError: a row has no expert trajectory.
      RunStopped: the engine returned another number of rows.
    """
    group = sampling.group_size + expert_rows
    graded = [prompt for prompt in prompts[:graded_prompts] for _ in range(group)]
    grading = Grading(
        [prompt.row for prompt in graded],
        tokenizer=tokenizer,
        grader=grader,
        prefixes=[prompt.ids[len(prompt.ids) - prompt.hint_tokens :] for prompt in graded],
        all_texts=all_texts,
    )
    occupancy = 1.0

    def watch(now: Progress) -> None:
        nonlocal occupancy
        occupancy = now.occupancy
        if progress is not None:
            progress(now)

    reported: set[int] = set()

    def finished(rows: Sequence[int], completions: Sequence[HostArray]) -> None:
        reported.update(rows)
        rows = [row // sampling.group_size * group + row % sampling.group_size for row in rows]
        grading.take(rows, completions)

    experts = None
    if expert_rows:
        experts = expert_completions(prompts, tokenizer, longest=sampling.max_new_tokens)
        rows = [row for row in range(len(graded)) if row % group >= sampling.group_size]
        grading.take(rows, [experts.completions[row // group] for row in rows])
    rollouts = engine.sample(
        params, prompts, key, sampling=sampling, finished=finished, progress=watch
    )
    sampled = len(prompts) * sampling.group_size
    if len(rollouts.group) != sampled:
        raise RunStopped(f"the engine returned {len(rollouts.group)} rows, expected {sampled}")
    # An engine may report rows late or not at all: they are graded now.
    rest = [row for row in range(sampled) if row not in reported]
    ids, length = rollouts.completion_ids, rollouts.completion_length
    finished(rest, [ids[row, : length[row]] for row in rest])
    on_policy = np.ones(sampled, bool)
    if experts is not None:
        rollouts, on_policy = append_experts(rollouts, experts, count=expert_rows)
    return Attempts(rollouts, on_policy, occupancy, grading)
