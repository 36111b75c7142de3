"""Expert trajectories as rows of a group (LUFFY)."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from echorl_jax.config import ConfigError
from echorl_jax.data import Prompt, encode_target
from echorl_jax.rollout import pad_lists
from echorl_jax.types import HostArray, Rollouts

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
