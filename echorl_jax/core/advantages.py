"""Advantages: how much better each rollout did than was to be expected, as constants.

Rewards are float32. ``group`` is the prompt of each row, in ``[0, num_groups)`` and in any order;
``num_groups`` is P, static under jit. Advantages are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Num

from echorl_jax.choices import Spread
from echorl_jax.core.groups import (
    centred,
    checked,
    collapsed_groups,
    group_means,
    judged_groups,
)
from echorl_jax.types import Array


def group_advantages(
    rewards: Float[Array, " N"],
    group: Int[Array, " N"],
    *,
    num_groups: int,
    on_policy: Bool[Array, " N"] | None = None,
    divide_by_std: bool = True,
    std_of: Spread = "group",
    counted: Bool[Array, " N"] | None = None,
    virtual_rewards: int = 0,
    eps: float = 1e-6,
) -> Float[Array, " N"]:
    """Scores each rollout against the others drawn for its prompt (GRPO, Dr.GRPO, LUFFY, AVSPO).

    A_i = (r_i - mean_g) / (std_g + eps), with the sample deviation (n - 1). A group whose rewards
    are all equal yields exactly zero: the degenerate case that the echo loss exists for. A group of
    one has mean 0 and deviation 1 by convention, so A = r.

    With ``on_policy``, mean and deviation are those of the rows the policy wrote, and every row is
    scored against them (LUFFY's split); if these rows agree, the deviation counts as 1, so that an
    expert who did better still stands out.

    With ``std_of`` the deviation is one for the whole batch: of the rewards (``batch``, Lite PPO)
    or of what is left after each group's mean is taken off (``batch_centred``, ScaleRL).

    With ``virtual_rewards`` K > 0 a group of n equal rewards is scored as if it held K more, equal
    to each other and lower where the rewards are above 0, higher elsewhere. Whatever their value
    each row gets +-sqrt(K (n + K - 1) / (n (n + K))) (AVSPO; without the deviation there is no such
    number, and the virtual reward is 1 away).
    Sources: arXiv 2402.03300, section 4.1; arXiv 2503.20783, section 3; arXiv 2504.14945; arXiv
    2508.08221 (Lite PPO); arXiv 2510.13786 (ScaleRL); arXiv 2605.21125 (AVSPO).

    Args:
      on_policy: ``[N]`` bool, the rows that make the baseline; None takes all.
      divide_by_std: False leaves the difference from the mean (Dr.GRPO).
      std_of: see above.
      counted: ``[N]`` bool, the rows whose rewards make the batch's deviation; None takes all.
      virtual_rewards: K, see above.
      eps: added to the deviation.

    Raises:
      ValueError: if ``rewards`` and ``group`` are not two ``[N]`` arrays.

    >>> rewards, group = jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.array([0, 0, 1, 1])
    >>> print(group_advantages(rewards, group, num_groups=2).round(2))
    [ 0.71 -0.71  0.    0.  ]
    """
    share = None if on_policy is None else on_policy.astype(jnp.float32)
    apart, count = centred(rewards, group, num_groups, share)
    own = jnp.ones_like(apart) if share is None else share
    scores = apart
    if divide_by_std and std_of == "group":
        squares = jax.ops.segment_sum(own * apart**2, group, num_groups)
        std = jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0))
        if on_policy is not None:
            std = jnp.where(std == 0, 1.0, std)
        scores = apart / jnp.where(count > 1, std + eps, 1.0)[group]
    elif divide_by_std:
        weights = own if counted is None else jnp.where(counted, own, 0.0)
        scores = apart / (_deviation(apart, rewards, weights, std_of) + eps)
    if virtual_rewards:
        scores = jnp.where(
            collapsed_groups(rewards, group, num_groups=num_groups)[group],
            _against_virtual(rewards, count[group], virtual_rewards, divide_by_std),
            scores,
        )
    return scores


def decoupled_advantages(
    reward_parts: Float[Array, "N R"],
    weights: Float[Array, " R"],
    group: Int[Array, " N"],
    *,
    num_groups: int,
    counted: Bool[Array, " N"] | None = None,
    eps: float = 1e-6,
    **settings: Any,
) -> Float[Array, " N"]:
    """Normalises each reward by itself before they are added up (GDPO).

    A_i = S_i / (std(S) + eps), S_i = sum_k w_k A_ik: A_ik is :func:`group_advantages` of reward k,
    and the deviation is over the batch. S has mean 0, since each A_k has, so that none is taken
    off: rows of groups where every reward is equal stay at exactly 0. Rewards in the sum differ by
    more than their total: with two of them, (1, 0) and (0, 1) are not the same.
    Source: arXiv 2601.05242, section 3.

    Args:
      reward_parts: ``[N, R]``, NaN where a reward does not apply to a row, which has no part in
        that reward's group then and gets nothing from it.
      weights: ``[R]``, w.
      counted: ``[N]`` bool, the rows of the batch's deviation; None takes all.
      eps: added to deviations.
      **settings: of :func:`group_advantages`.

    >>> parts, group = jnp.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), jnp.zeros(3, jnp.int32)
    >>> weights = jnp.array([1.0, 0.5])
    >>> print(decoupled_advantages(parts, weights, group, num_groups=1).round(2))
    [ 0.22 -1.09  0.87]
    """

    def normalised(rewards: Array) -> Array:
        given = jnp.isfinite(rewards)
        own = judged_groups(group, given, num_groups=num_groups)
        scores = group_advantages(
            jnp.where(given, rewards, 0.0),
            own,
            num_groups=num_groups + 1,
            counted=given if counted is None else given & counted,
            eps=eps,
            **settings,
        )
        return jnp.where(own < num_groups, scores, 0.0)

    total = jax.vmap(normalised, in_axes=1, out_axes=1)(reward_parts) @ weights
    rows = jnp.ones_like(total) if counted is None else counted.astype(jnp.float32)
    return total / (_deviation(total, total, rows, "batch_centred") + eps)


def _deviation(apart: Array, rewards: Array, weights: Array, std_of: Spread) -> Array:
    """Sample deviation ``[]`` over the batch's weighted rows."""
    value = apart if std_of == "batch_centred" else rewards.astype(jnp.float32)
    total = jnp.sum(weights)
    mean = jnp.sum(weights * value) / jnp.maximum(total, 1.0)
    return jnp.sqrt(jnp.sum(weights * (value - mean) ** 2) / jnp.maximum(total - 1.0, 1.0))


def _against_virtual(rewards: Array, count: Array, virtual: int, divide_by_std: bool) -> Array:
    sign = jnp.where(rewards > 0, 1.0, -1.0)
    if not divide_by_std:
        return sign * virtual / (count + virtual)
    return sign * jnp.sqrt(virtual * (count + virtual - 1.0) / (count * (count + virtual)))


def maxrl_advantages(
    rewards: Float[Array, " N"], group: Int[Array, " N"], *, num_groups: int, eps: float = 1e-6
) -> Float[Array, " N"]:
    """Divides by the group's mean reward, so that hard prompts weigh more (MaxRL).

    A_i = (r_i - mean_g) / (mean_g + eps), 0 where the mean is not above 0; a group of one keeps
    A = r. Source: arXiv 2602.02710.

    Args:
      eps: added to the mean.

    >>> rewards, group = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.zeros(4, jnp.int32)
    >>> print(maxrl_advantages(rewards, group, num_groups=1).round(2))
    [ 3. -1. -1. -1.]
    """
    apart, count = centred(rewards, group, num_groups)
    mean = jax.ops.segment_sum(rewards, group, num_groups) / jnp.maximum(count, 1.0)
    scale = jnp.where(mean > 0, 1.0 / (jnp.where(mean > 0, mean, 1.0) + eps), 0.0)
    return jnp.where((count > 1)[group], apart * scale[group], apart)


def curve_advantages(
    rewards: Float[Array, " N"],
    group: Int[Array, " N"],
    past_rates: Float[Array, " W"],
    *,
    num_groups: int,
    bins: int,
    counted: Bool[Array, " N"] | None = None,
) -> Float[Array, " N"]:
    """Weighs prompts by where their success rate lies among those of earlier steps (CurveRL).

    A_i = w(p) (r_i - p), w = f / max(F, 1e-6): p is the group's mean reward, f and F the share of
    past rates in its bin and in all up to it, bin = floor(p bins). A rate whose bin has not been
    seen has w = 0, and so have groups at 0 or 1. Without past rates those of the step count.
    Source: arXiv 2605.24331.

    Args:
      past_rates: ``[W]`` float32 in (0, 1), NaN where there is none.
      bins: G + 1 for groups of G, static.
      counted: ``[N]`` bool, rows whose groups make the step's own rates; None takes all.

    >>> rewards, group = jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.array([0, 0, 1, 1])
    >>> curve_advantages(rewards, group, jnp.full(1, jnp.nan), num_groups=2, bins=3).tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    rate = group_means(rewards, group, num_groups=num_groups)
    inside = (rate > 0) & (rate < 1)
    present = jnp.ones_like(rewards) if counted is None else counted.astype(jnp.float32)
    own = inside & (jax.ops.segment_sum(present, group, num_groups) > 0)
    known = jnp.any(jnp.isfinite(past_rates))
    pool = jnp.concatenate(
        [jnp.where(known, past_rates, jnp.nan), jnp.where(known | ~own, jnp.nan, rate)]
    )
    finite = jnp.isfinite(pool)

    def bin_of(rate: Array) -> Array:
        return jnp.clip((rate * bins).astype(jnp.int32), 0, bins - 1)

    place = jnp.where(finite, bin_of(jnp.nan_to_num(pool)), bins)
    density = jax.ops.segment_sum(finite.astype(jnp.float32), place, bins)
    density /= jnp.maximum(jnp.sum(density), 1.0)
    weight = density / jnp.maximum(jnp.cumsum(density), 1e-6)
    weight = jnp.where(inside, weight[bin_of(rate)], 0.0)
    return weight[group] * centred(rewards, group, num_groups, alone_below=0.0)[0]


def verdict_advantages(
    correct: Bool[Array, " N"], *, success: float, failure: float
) -> Float[Array, " N"]:
    """``success`` on correct rows, ``-failure`` on the others (PSR, NSR, W-REINFORCE).

    Source: arXiv 2506.01347: 1 and 0 (PSR), 0 and 1 (NSR), 0.1 and 1 (W-REINFORCE).

    >>> print(verdict_advantages(jnp.array([True, False]), success=0.1, failure=1.0))
    [ 0.1 -1. ]
    """
    return jnp.where(correct, jnp.float32(success), jnp.float32(-failure))


def rloo_advantages(
    rewards: Float[Array, " N"], group: Int[Array, " N"], *, num_groups: int
) -> Float[Array, " N"]:
    """Scores each rollout against the mean of the *other* rollouts of its prompt (RLOO).

    A_i = r_i - mean_{j != i} r_j = (r_i - mean_g) n / (n - 1); a group of one keeps A = r. Source:
    arXiv 2402.14740, section 3.

    >>> rloo_advantages(jnp.array([1.0, 0.0, 0.0]), jnp.zeros(3, jnp.int32), num_groups=1).tolist()
    [1.0, -0.5, -0.5]
    """
    rewards = checked(rewards, group)
    count = jax.ops.segment_sum(jnp.ones_like(rewards), group, num_groups)
    above = rewards - jax.ops.segment_min(rewards, group, num_groups)[group]
    others = jax.ops.segment_sum(above, group, num_groups)[group] - above
    alone = (count < 2)[group]
    return jnp.where(alone, rewards, above - others / jnp.maximum(count - 1.0, 1.0)[group])


def opo_advantages(
    rewards: Float[Array, " N"],
    group: Int[Array, " N"],
    lengths: Num[Array, " N"],
    *,
    num_groups: int,
) -> Float[Array, " N"]:
    """Scores each rollout against the length-weighted mean reward of its prompt (OPO).

    A_i = r_i - sum_j l_j r_j / sum_j l_j; a group of one keeps A = r. Source: arXiv 2505.23585,
    section 3.

    Args:
      lengths: ``[N]``, tokens of each completion.

    >>> rewards, group = jnp.array([1.0, 0.0]), jnp.array([0, 0])
    >>> opo_advantages(rewards, group, jnp.array([1, 3]), num_groups=1).tolist()
    [0.75, -0.25]
    """
    return centred(rewards, group, num_groups, lengths.astype(jnp.float32), alone_below=None)[0]


def whitened_advantages(
    rewards: Float[Array, " N"],
    group: Int[Array, " N"],
    lengths: Num[Array, " N"],
    *,
    num_groups: int,
    group_baseline: bool = False,
) -> Float[Array, " N"]:
    """Rewards whitened over the batch's tokens (REINFORCE++ and its baseline variant).

    A_i = (r_i - m) / sqrt(v + 1e-8), where m and v are mean and sample variance over all tokens,
    each carrying its rollout's reward. Undiscounted, so every token of a rollout has the same
    return. Fewer than two tokens leave the rewards as they are.
    Source: arXiv 2501.03262, sections 3.1 and 3.2.

    Args:
      lengths: ``[N]``, tokens of each completion; a row of 0 tokens is not counted.
      group_baseline: subtract the group's mean first (the -baseline variant); a group of one keeps
        r.

    >>> rewards, group = jnp.array([1.0, 0.0]), jnp.array([0, 0])
    >>> print(whitened_advantages(rewards, group, jnp.array([2, 2]), num_groups=1).round(2))
    [ 0.87 -0.87]
    """
    value = centred(rewards, group, num_groups)[0] if group_baseline else checked(rewards, group)
    tokens = lengths.astype(jnp.float32)
    count = jnp.sum(tokens)
    # From the least reward on, so that equal ones give exactly 0, as in centred.
    least = jnp.min(jnp.where(tokens > 0, value, jnp.inf), initial=jnp.inf)
    above = value - jnp.where(count > 0, least, 0.0)
    mean = jnp.sum(tokens * above) / jnp.maximum(count, 1.0)
    variance = jnp.sum(tokens * (above - mean) ** 2) / jnp.maximum(count - 1.0, 1.0)
    return jnp.where(count > 1, (above - mean) * lax.rsqrt(variance + 1e-8), value)


def zero_variance_advantages(
    advantages: Float[Array, " N"],
    correct: Bool[Array, " N"],
    group: Int[Array, " N"],
    token_entropy: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    num_groups: int,
    alpha: float = 0.1,
    failures: bool = True,
) -> Float[Array, "N T"]:
    """Token-level advantages for groups with one outcome, by each token's entropy H (RL-ZVP).

    All correct: alpha H_t. None correct: -alpha (max H - H_t), the maximum over the row's tokens.
    Other groups, and groups of one, keep their advantages. Source: arXiv 2509.21880.

    Args:
      advantages: ``[N]``, of the mixed groups.
      mask: ``[N, T]`` bool, the completions' tokens.
      failures: False leaves groups without a success as they are.

    Returns:
      ``[N, T]`` float32, 0 where masked.

    >>> correct, group = jnp.array([True, True, False, False]), jnp.array([0, 0, 1, 1])
    >>> entropy, mask = jnp.array([[0.2, 0.8]] * 4), jnp.ones((4, 2), jnp.bool_)
    >>> found = zero_variance_advantages(jnp.zeros(4), correct, group, entropy, mask, num_groups=2)
    >>> print(found[jnp.array([0, 2])].round(2))
    [[ 0.02  0.08]
     [-0.06 -0.  ]]
    """
    outcome = correct.astype(jnp.float32)
    one_outcome = collapsed_groups(outcome, group, num_groups=num_groups)[group]
    entropy = jnp.where(mask, token_entropy, 0.0)
    failed = -alpha * (jnp.max(entropy, axis=1, keepdims=True, initial=0.0) - entropy)
    shaped = jnp.where(correct[:, None], alpha * entropy, failed)
    chosen = one_outcome & (correct | failures)
    return jnp.where(mask, jnp.where(chosen[:, None], shaped, advantages[:, None]), 0.0)


def entropy_shaped_advantages(
    advantages: Float[Array, " N"] | Float[Array, "N T"],
    token_entropy: Float[Array, "N T"],
    *,
    alpha: float = 0.4,
    kappa: float = 2.0,
) -> Float[Array, "N T"]:
    """Adds a bounded share of each token's entropy: A + min(alpha H, |A| / kappa).

    Tokens without an advantage keep none, and no advantage changes its sign. Source: arXiv
    2506.14758.

    Args:
      advantages: ``[N]`` or ``[N, T]``.
      alpha, kappa: see above; kappa is at least 1.

    Returns:
      ``[N, T]`` float32.

    >>> entropy = jnp.array([[0.5, 9.0]])
    >>> entropy_shaped_advantages(jnp.array([-1.0]), entropy, alpha=0.5).tolist()
    [[-0.75, -0.5]]
    """
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    return advantages + jnp.minimum(alpha * token_entropy, jnp.abs(advantages) / kappa)


def overlong_punishment(
    lengths: Num[Array, " N"], *, max_tokens: int, buffer_tokens: int
) -> Float[Array, " N"]:
    """A penalty for long completions (DAPO).

    0 up to L - C tokens, then a slope of (L - C - l) / C down to -1 at L, and -1 beyond.
    Source: arXiv 2503.14476, section 3.4, equation 13.

    Args:
      lengths: ``[N]``, tokens of each completion, l.
      max_tokens: the limit, L.
      buffer_tokens: length of the slope, C; 0 punishes only what is beyond L.

    Returns:
      ``[N]`` float32 in [-1, 0], to be added to the rewards.

    Raises:
      ValueError: unless ``0 <= buffer_tokens <= max_tokens``.

    >>> lengths = jnp.array([80, 90, 100, 101])
    >>> overlong_punishment(lengths, max_tokens=100, buffer_tokens=20).tolist()
    [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 <= buffer_tokens <= max_tokens:
        raise ValueError(f"{buffer_tokens=} must lie in [0, {max_tokens=}]")
    excess = (lengths - (max_tokens - buffer_tokens)).astype(jnp.float32)
    return 0.0 - jnp.clip(excess / max(buffer_tokens, 1), 0.0, 1.0)
