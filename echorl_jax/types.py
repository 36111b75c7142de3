"""The data that flows between the parts, as frozen pytrees, and the one legend of axis letters.

Axes:
  P  prompts in a step             N  rollouts, ``N = P * G``
  G  group size                    B  rows of a micro-batch
  S  prompt length, padded         T  completion length, padded
  L  whole sequence, padded        K  clips per prompt
  V  vocabulary                    D  hidden size

In ``models/`` and ``rollout/`` there are more letters, and three have another meaning:
  L  layers, as the first axis     K  head size
  T  whole sequence, in ``models/`` only
  H  query heads                   KV key (and value) heads
  R  query heads per key head      M  slots, rows decoded at once
  F  forced first tokens           W  latest tokens, for stop sequences

Rows are padded on the right. Lengths are in tokens, entropies and log-probabilities in nats. Mesh
axes are words: ``data``, ``fsdp``, ``tensor``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Any,
    NamedTuple,
    TypeVar,
    cast,
    dataclass_transform,
    get_args,
)

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, jaxtyped

__all__ = ["EchoClips", "Graded", "LossTerm", "Metrics", "Rollouts", "StepData", "TrainBatch"]

Array = jax.Array
PyTree = Any
# In signatures that take NumPy arrays too: the host's leaves are such.
if TYPE_CHECKING:
    AnyArray = jax.Array
else:
    AnyArray = jax.Array | np.ndarray
# A NumPy array on the host, where the pytrees below pass through it between jitted programs.
HostArray = Any
_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


def named_shapes(function: _F) -> _F:
    """Checks the arrays of every call against the annotations, and names the one that differs.

    Raises:
      ValueError: an argument of another shape or kind, at the call.
    """
    signature = inspect.signature(function)
    # A union of array types is checked by its members: typing's unions ask for the class alone.
    kinds = {name: get_args(kind) or (kind,) for name, kind in function.__annotations__.items()}
    arrays = {name: kind for name, kind in kinds.items() if hasattr(kind[0], "dim_str")}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        with jaxtyped("context"):
            for name, value in given.items():
                if name in arrays and not isinstance(value, arrays[name]):
                    kind = arrays[name][0]
                    wanted = f"{kind.__name__.partition('[')[0].lower()} [{kind.dim_str.strip()}]"
                    others = ", ".join(f"{n} {_kind(v)}" for n, v in given.items() if n in arrays)
                    raise ValueError(f"{function.__name__}: {name} must be {wanted}; got {others}")
        return function(*args, **kwargs)

    return cast(_F, checked)


def _kind(value: Any) -> str:
    """Type and shape of an array, such as ``float32 [4, 6]``; the type of another value."""
    if not hasattr(value, "dtype"):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)}"


@dataclass_transform(frozen_default=True)
def pytree(cls: type[_T]) -> type[_T]:
    """Makes a frozen dataclass that is a JAX pytree; every field is a child."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class Rollouts:
    """P prompts and N completions, with log-probability and entropy of each sampled token."""

    prompt_ids: Int32[Array, "P S"]
    prompt_length: Int32[Array, " P"]
    group: Int32[Array, " N"]  # the prompt each row answers, in [0, P)
    completion_ids: Int32[Array, "N T"]  # EOS included
    completion_length: Int32[Array, " N"]  # EOS counted
    rollout_logprobs: Float32[Array, "N T"]
    token_entropy: Float32[Array, "N T"]
    truncated: Bool[Array, " N"]  # no EOS within T


@pytree
class Graded:
    """Rewards and verdicts of N completions."""

    rewards: Float32[Array, " N"]  # 0 without a verdict
    correct: Bool[Array, " N"]  # False without a verdict
    on_policy: Bool[Array, " N"]  # False for an expert trajectory placed in the group
    # False for a row without a verdict (the grader returned None), which is left out of
    # its group's statistics and of the loss; None: all have one
    judged: Bool[Array, " N"] | None = None

    @property
    def with_verdict(self) -> HostArray:
        """``judged``, all True where it is None."""
        return np.ones(self.correct.shape, bool) if self.judged is None else self.judged


@pytree
class StepData:
    """The rows of a whole step: all that an objective's advantages may depend on.

    A row without a verdict has length 0, no token in ``mask``, and a group for itself and its like,
    the last one: no estimator compares it with others.
    """

    rewards: Float32[Array, " N"]
    correct: Bool[Array, " N"]
    group: Int32[Array, " N"]  # in [0, num_groups)
    on_policy: Bool[Array, " N"]  # False for an expert trajectory
    in_policy: Bool[Array, " N"]  # False for rows that a filter leaves out of the policy loss
    lengths: Int32[Array, " N"]  # tokens of each completion
    mask: Bool[Array, "N T"]  # the completions' tokens
    token_ids: Int32[Array, "N T"]
    token_entropy: Float32[Array, "N T"]  # nats
    num_groups: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})  # G
    # success rates of groups in earlier steps, NaN where there is none; only for
    # objectives that weigh prompts by them
    past_rates: Float32[Array, " W"] | None = None
    # each of several rewards, NaN where it does not apply, and their weights; only for
    # objectives that normalise each
    reward_parts: Float32[Array, "N R"] | None = None
    reward_weights: Float32[Array, " R"] | None = None

    @classmethod
    def plain(cls, *, rewards: Any, group: Any, num_groups: int, **fields: Any) -> "StepData":
        """Rows with the given fields; the others are those of one token each that the policy wrote.

        A reward of 1 or more is correct unless ``correct`` is given.
        """
        yes, mask = jnp.ones(rewards.shape, jnp.bool_), fields.get("mask")
        mask = jnp.ones((*rewards.shape, 1), jnp.bool_) if mask is None else mask
        rest: dict[str, Any] = {
            "correct": rewards >= 1,
            "on_policy": yes,
            "in_policy": yes,
            "lengths": jnp.sum(mask, axis=1),
            "mask": mask,
            "token_ids": jnp.zeros(mask.shape, jnp.int32),
            "token_entropy": jnp.zeros(mask.shape, jnp.float32),
        }
        rest["group_size"] = -(-rewards.shape[0] // num_groups)
        return cls(rewards=rewards, group=group, num_groups=num_groups, **{**rest, **fields})


@pytree
class EchoClips:
    """For each prompt, up to K prefixes of its verified successes that end at a chosen step."""

    row: Int32[Array, "P K"]  # the rollout the clip is a prefix of
    length: Int32[Array, "P K"]  # tokens in the prefix
    step: Int32[Array, "P K"]  # the step it ends with
    entropy: Float32[Array, "P K"]  # that step's mean token entropy
    valid: Bool[Array, "P K"]


@pytree
class Echo:
    """The echo term of an update."""

    clips: EchoClips
    weights: Float32[Array, "N T"]  # sum(weights * -logprobs) is L_echo; zeros where coef is 0
    coef: Float32[Array, ""]  # lambda at this step
    refused: Int32[Array, " P"]  # clips that were mined but not above min_entropy


@pytree
class LossTerm:
    """A term of the loss or a metric as a pair, so that partial results add up exactly.

    >>> (LossTerm.of(3.0, 2.0) + LossTerm.of(1.0, 2.0)).mean().item()
    1.0
    """

    sum: Float32[Array, ""]
    count: Float32[Array, ""]  # the global denominator's share

    @classmethod
    def of(cls, sum: Any, count: Any) -> "LossTerm":
        """A term from anything that converts to float32."""
        return cls(jnp.asarray(sum, jnp.float32), jnp.asarray(count, jnp.float32))

    def __add__(self, other: "LossTerm") -> "LossTerm":
        return LossTerm(self.sum + other.sum, self.count + other.count)

    def mean(self) -> Array:
        """``sum / count``; exactly 0, with zero gradient, when nothing was counted."""
        return jnp.where(self.count > 0, self.sum / jnp.where(self.count > 0, self.count, 1.0), 0.0)


# Terms of the loss and metrics by their public keys, summed over micro-batches.
Metrics = dict[str, LossTerm]


class Image(NamedTuple):
    """A picture as the vision tower takes it, on the host."""

    pixels: HostArray  # f32 [patches, patch_values], as the image processor orders them
    grid: tuple[int, int]  # patches along height and width


@pytree
class RowImages:
    """The images in the prompts of rows: features that stand in the places of tokens."""

    features: Float32[Array, "F D"] | Any  # of all images of the step, in the compute type
    index: Int32[Array, "B L"]  # a token's feature, -1 for a token with its own embedding
    positions: Int32[Array, "B L 3"]  # time, height, width


@pytree
class TrainBatch:
    """Rows ready for the update: sequences and all that does not depend on the current policy.

    ``[B, T]`` fields cover the target region: entry t of row b belongs to
    ``tokens[b, prompt_length[b] + t]``. Weights are final: masks, aggregation and global
    denominators are in them, so the loss is a plain weighted sum and any split into micro-batches
    has the same gradient. A row of padding has all weights 0.
    """

    tokens: Int32[Array, "B L"]  # prompt then completion
    prompt_length: Int32[Array, " B"]  # where the target region begins
    length: Int32[Array, " B"]  # real tokens in the row
    loss_mask: Float32[Array, "B T"]  # tokens that enter the policy loss
    # per row, or per token where tokens have their own
    advantages: Float32[Array, " B"] | Float32[Array, "B T"]
    old_logprobs: Float32[Array, "B T"]  # the policy that is improved upon, frozen
    rollout_logprobs: Float32[Array, "B T"]  # the sampler's
    token_weights: Float32[Array, "B T"]  # sum(token_weights * token_loss) is the policy loss
    echo_weights: Float32[Array, "B T"]  # sum(echo_weights * -logprobs) is L_echo
    on_policy: Bool[Array, " B"]
    # sum(nll_weights * -logprobs) is the likelihood term of hints (UFT)
    nll_weights: Float32[Array, "B T"] | None = None
    ref_logprobs: Float32[Array, "B T"] | None = None  # only with a KL term
    # sum(entropy_scale * token_weights * H) is the mean entropy; only with its bonus, and
    # None where token_weights add up to 1
    entropy_scale: Float32[Array, " B"] | None = None
    selected: Bool[Array, "B T"] | None = None  # tokens picked out by KL-Cov or Clip-Cov
    # rows of a solved prompt; only for objectives that act on them
    solved: Bool[Array, " B"] | None = None
    segment_ids: Int32[Array, "B L"] | None = None  # several sequences packed into a row (SFT)
    images: RowImages | None = None  # only for models with a vision tower

    @classmethod
    def plain(
        cls, *, tokens: Any, prompt_length: Any, length: Any, loss_mask: Any, **fields: Any
    ) -> "TrainBatch":
        """Rows with the given fields; the others have no advantage, weights or scores (zeros)."""
        zeros = loss_mask * 0
        rest: dict[str, Any] = {
            "advantages": zeros[:, 0],
            "old_logprobs": zeros,
            "rollout_logprobs": zeros,
            "token_weights": zeros,
            "echo_weights": zeros,
            "on_policy": zeros[:, 0] != 0,
        }
        return cls(
            tokens=tokens,
            prompt_length=prompt_length,
            length=length,
            loss_mask=loss_mask,
            **{**rest, **fields},
        )
