"""Per-token losses: log-probabilities in, one number per token out; nothing here masks or averages.

rho = exp(log pi - log pi_old) is the probability ratio to the policy that wrote the rollout. A
log-ratio is cut to +-20 before it is exponentiated, which no sane ratio reaches, so that an unused
branch never turns into inf * 0.

``logprobs``, ``old_logprobs`` and ``log_ratio`` are ``[B, T]``; losses are differentiated in the
first and the last. ``loss_mask`` names the tokens of a mean or product over a row. Shapes that do
not fit raise ValueError.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from echorl_jax.choices import Divergence
from echorl_jax.types import Array

Tokens = Float[Array, "B T"]
Advantages = Float[Array, " B"] | Float[Array, "B T"]
MAX_LOG_RATIO = 20.0


def token_log_ratio(logprobs: Tokens, old_logprobs: Tokens) -> Tokens:
    """log rho per token, cut to +-20.

    >>> token_log_ratio(jnp.array([[-1.0, 50.0]]), jnp.array([[-3.0, -1.0]])).tolist()
    [[2.0, 20.0]]
    """
    return jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_log_ratio(logprobs: Tokens, old_logprobs: Tokens, loss_mask: Tokens) -> Tokens:
    """GSPO's log-ratio in token form: log(sg[s] pi / sg[pi]), log s the sequence's mean of log rho.

    Every token carries the value of its sequence, and the gradient of its own log-probability. Cut
    to at most 10.
    Source: arXiv 2507.18071, sections 4.1 and 4.3.

    Returns:
      ``[B, T]``; a sequence without tokens has 0.

    >>> logprobs, old_logprobs = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -4.0]])
    >>> sequence_log_ratio(logprobs, old_logprobs, jnp.ones((1, 2))).tolist()
    [[1.5, 1.5]]
    """
    tokens = jnp.maximum(jnp.sum(loss_mask, axis=1, keepdims=True), 1.0)
    # Masked before the product: padding may hold anything.
    difference = jnp.where(loss_mask > 0, logprobs - old_logprobs, 0.0)
    mean = jnp.sum(loss_mask * difference, axis=1, keepdims=True) / tokens
    own = logprobs - lax.stop_gradient(logprobs)
    return jnp.minimum(own + lax.stop_gradient(mean), 10.0)


def policy_loss(
    log_ratio: Tokens,
    advantages: Advantages,
    *,
    epsilon_low: float | None = None,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
) -> Tokens:
    """The clipped surrogate of PPO, its relatives, and without bounds the plain policy gradient.

    max(-A rho, -A clip(rho, 1 - e_low, 1 + e_high)); where A < 0, ``dual_clip`` c bounds it by -A c
    from above. A bound of None is no bound: with neither, the loss is -A rho. A NaN passes through.
    Sources: arXiv 1707.06347, equation 7; arXiv 2503.14476, section 3.1 (two bounds); arXiv
    1912.09729, equation 5 (dual clip).

    Args:
      log_ratio: ``[B, T]`` from :func:`token_log_ratio` or :func:`sequence_log_ratio`.
      epsilon_low: how far below 1 the ratio still earns.
      epsilon_high: how far above 1.
      dual_clip: c > 1, or None.

    Raises:
      ValueError: if the shapes do not fit or ``dual_clip`` is not above 1.

    >>> log_ratio, advantages = jnp.log(jnp.array([[1.5, 0.5]])), jnp.array([2.0])
    >>> policy_loss(log_ratio, advantages, epsilon_low=0.25, epsilon_high=0.25).tolist()
    [[-2.5, -1.0]]
    """
    advantages = _per_token(log_ratio, advantages)
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"{dual_clip=} must be above 1")
    ratio = jnp.exp(log_ratio)
    loss = -advantages * ratio
    if epsilon_low is not None or epsilon_high is not None:
        loss = jnp.maximum(loss, -advantages * _clipped(ratio, epsilon_low, epsilon_high))
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)
    return loss


def clipped_tokens(
    log_ratio: Tokens,
    advantages: Advantages,
    *,
    epsilon_low: float | None,
    epsilon_high: float | None,
) -> Bool[Array, "B T"]:
    """Tokens whose ratio is past the bound its advantage pushes towards: no gradient there.

    Args:
      epsilon_low, epsilon_high: as in :func:`policy_loss`.

    >>> log_ratio, advantages = jnp.log(jnp.array([[1.5, 0.5]] * 2)), jnp.array([1.0, -1.0])
    >>> clipped_tokens(log_ratio, advantages, epsilon_low=0.2, epsilon_high=0.2).tolist()
    [[True, False], [False, True]]
    """
    advantages, ratio = _per_token(log_ratio, advantages), jnp.exp(log_ratio)
    above = jnp.zeros_like(ratio, jnp.bool_) if epsilon_high is None else ratio > 1.0 + epsilon_high
    below = jnp.zeros_like(ratio, jnp.bool_) if epsilon_low is None else ratio < 1.0 - epsilon_low
    return (above & (advantages > 0)) | (below & (advantages < 0))


def cispo_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Advantages,
    *,
    epsilon_low: float | None = None,
    epsilon_high: float | None = None,
) -> Tokens:
    """REINFORCE with the clipped ratio as a constant weight: every token keeps a gradient (CISPO).

    -sg[clip(rho, 1 - e_low, 1 + e_high)] A log pi. Source: arXiv 2506.13585, section 3.1.

    Args:
      epsilon_low: bound below 1 (1 or None: none in effect).
      epsilon_high: bound above 1.

    >>> logprobs, old_logprobs = jnp.array([[-1.0]]), jnp.array([[-3.0]])  # rho = e^2, cut to 1.5
    >>> cispo_loss(logprobs, old_logprobs, jnp.array([2.0]), epsilon_high=0.5).tolist()
    [[3.0]]
    """
    ratio = jnp.exp(token_log_ratio(logprobs, old_logprobs))
    weight = lax.stop_gradient(_clipped(ratio, epsilon_low, epsilon_high))
    return -weight * _per_token(logprobs, advantages) * logprobs


def shaped_policy_loss(logprobs: Tokens, advantages: Advantages, *, shaping: float = 0.1) -> Tokens:
    """LUFFY's loss for tokens that an expert wrote: -A f(pi) with f(x) = x / (x + shaping).

    f'(x) is largest where the policy gives the expert's token little probability, so rare but
    decisive tokens are learned first.
    Source: arXiv 2504.14945, section 3.3.

    Args:
      shaping: gamma, above 0.

    >>> shaped_policy_loss(jnp.log(jnp.array([[0.5]])), jnp.array([1.0]), shaping=0.5).item()
    -0.5
    """
    probability = jnp.exp(logprobs)
    return -_per_token(logprobs, advantages) * probability / (probability + shaping)


def kl_cov_loss(
    log_ratio: Tokens,
    advantages: Advantages,
    selected: Bool[Array, "B T"],
    *,
    kl_cov_coef: float = 1.0,
) -> Tokens:
    """Policy gradient -A rho, plus a penalty coef |log rho| on the selected tokens.

    Source: arXiv 2505.22617, section 4.2 (KL-Cov).

    Args:
      selected: ``[B, T]`` bool from :func:`kl_cov_selection`.
      kl_cov_coef: weight of the penalty.

    >>> log_ratio, selected = jnp.array([[0.0, 0.0, -1.0]]), jnp.array([[False, True, True]])
    >>> print(kl_cov_loss(log_ratio, jnp.array([1.0]), selected).round(3))  # 1 - 1/e in the end
    [[-1.    -1.     0.632]]
    """
    penalty = jnp.where(selected, kl_cov_coef * jnp.abs(log_ratio), 0.0)
    return policy_loss(log_ratio, advantages) + penalty


def sapo_loss(
    log_ratio: Tokens,
    advantages: Advantages,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Tokens:
    """A soft gate in place of the clip (SAPO): -A sigmoid(tau (rho - 1)) 4 / tau.

    Its gradient is largest at rho = 1, where it is the plain policy gradient's, and fades on both
    sides. Source: arXiv 2511.20347, section 3.

    Args:
      tau_positive: sharpness of the gate where A > 0.
      tau_negative: sharpness elsewhere.

    >>> sapo_loss(jnp.zeros((1, 1)), jnp.array([1.0])).item()  # 4 sigmoid(0)
    -2.0
    """
    advantages = _per_token(log_ratio, advantages)
    tau = jnp.where(advantages > 0, tau_positive, tau_negative)
    return -advantages * jax.nn.sigmoid(tau * (jnp.exp(log_ratio) - 1.0)) * 4.0 / tau


def gmpo_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Advantages,
    loss_mask: Tokens,
    *,
    epsilon_low: float | None = 0.4,
    epsilon_high: float | None = 0.4,
) -> Tokens:
    """The geometric mean of a row's ratios in place of each token's own (GMPO).

    -A exp(mean_t d_t), d_t = min(log rho, e_high) where A > 0 and max(log rho, -e_low) where A < 0.
    Every token carries the value of its row; the mean is cut to +-20. Source: arXiv 2507.20673,
    section 3.

    Args:
      epsilon_low: bound below, of the log-ratio; None is no bound.
      epsilon_high: bound above.

    >>> logprobs, old = jnp.log(jnp.array([[0.2, 0.4]])), jnp.log(jnp.array([[0.2, 0.1]]))
    >>> mask = jnp.ones((1, 2))
    >>> print(gmpo_loss(logprobs, old, jnp.array([1.0]), mask, epsilon_high=None))  # sqrt(1 * 4)
    [[-2. -2.]]
    """
    advantages, log_ratio = _per_token(logprobs, advantages), logprobs - old_logprobs
    high = log_ratio if epsilon_high is None else jnp.minimum(log_ratio, epsilon_high)
    low = log_ratio if epsilon_low is None else jnp.maximum(log_ratio, -epsilon_low)
    bounded = jnp.where(advantages > 0, high, jnp.where(advantages < 0, low, log_ratio))
    tokens = jnp.maximum(jnp.sum(loss_mask, axis=1, keepdims=True), 1.0)
    masked = jnp.where(loss_mask > 0, bounded, 0.0)
    mean = jnp.sum(loss_mask * masked, axis=1, keepdims=True) / tokens
    mean = jnp.exp(jnp.clip(mean, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jnp.broadcast_to(-advantages * mean, log_ratio.shape)


def dppo_kept(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Advantages,
    *,
    bound: float,
    divergence: Divergence = "tv",
) -> Bool[Array, "B T"]:
    """Tokens inside DPPO's trust region, or on their way back into it.

    A token leaves where its advantage pushes its probability further than ``bound`` from the old
    one: by the difference pi - pi_old (``tv``), or by the divergence of the two Bernoulli
    distributions "this token or another" (``kl``). Source: arXiv 2602.04879, section 4.

    Args:
      bound: delta.
      divergence: ``tv`` or ``kl``.

    >>> logprobs, old = jnp.log(jnp.array([[0.6, 0.2]])), jnp.log(jnp.array([[0.4, 0.4]]))
    >>> dppo_kept(logprobs, old, jnp.array([1.0]), bound=0.15).tolist()
    [[False, True]]
    """
    advantages = _per_token(logprobs, advantages)
    new, old = jnp.exp(logprobs), jnp.exp(old_logprobs)
    moved = new - old
    if divergence == "tv":
        far = jnp.abs(moved) > bound
    else:
        rest, old_rest = (jnp.maximum(1.0 - each, 1e-8) for each in (new, old))
        far = old * (old_logprobs - logprobs) + old_rest * jnp.log(old_rest / rest) > bound
    return ~(far & jnp.where(advantages > 0, moved > 0, moved < 0))


def dppo_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Advantages,
    *,
    bound: float,
    divergence: Divergence = "tv",
    cap: float = 20.0,
) -> Tokens:
    """Policy gradient with a capped constant ratio on the tokens that :func:`dppo_kept` keeps.

    -A sg[min(rho, cap)] log pi, 0 on other tokens.

    Args:
      bound, divergence: see :func:`dppo_kept`.
      cap: largest ratio.

    >>> logprobs, old = jnp.log(jnp.array([[0.6, 0.2]])), jnp.log(jnp.array([[0.4, 0.4]]))
    >>> (dppo_loss(logprobs, old, jnp.array([1.0]), bound=0.15) > 0).tolist()
    [[False, True]]
    """
    kept = dppo_kept(logprobs, old_logprobs, advantages, bound=bound, divergence=divergence)
    ratio = jnp.minimum(jnp.exp(token_log_ratio(logprobs, old_logprobs)), cap)
    # A product, not a choice: a NaN shows.
    weight = lax.stop_gradient(jnp.where(kept, 1.0, 0.0) * ratio)
    return -weight * _per_token(logprobs, advantages) * logprobs


def topr_loss(logprobs: Tokens, old_logprobs: Tokens, advantages: Advantages) -> Tokens:
    """Likelihood where A > 0, and a ratio of at most 1 as constant weight elsewhere (TOPR).

    -A log pi where A > 0, else -A sg[min(rho, 1)] log pi, with the token's ratio; the paper's is
    the trajectory's. Source: arXiv 2503.14286, section 3.

    Args:
      advantages: ``[B]`` or ``[B, T]``, positive for what is to be learnt.

    >>> logprobs, old = jnp.array([[-1.0], [-1.0]]), jnp.array([[-2.0], [-2.0]])
    >>> topr_loss(logprobs, old, jnp.array([2.0, -1.0])).tolist()
    [[2.0], [-1.0]]
    """
    advantages = _per_token(logprobs, advantages)
    ratio = jnp.minimum(jnp.exp(token_log_ratio(logprobs, old_logprobs)), 1.0)
    return -lax.stop_gradient(jnp.where(advantages > 0, 1.0, ratio)) * advantages * logprobs


def vespo_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Advantages,
    loss_mask: Tokens,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Tokens:
    """A smooth weight on a row's whole ratio as a constant factor of the policy gradient (VESPO).

    phi = exp(lambda + k log W - lambda W), W the product of the row's ratios with log W in
    [log 1e-8, 20]; the loss is -sg[phi] A log pi. Source: arXiv 2602.10693, section 4.

    Args:
      positive: k and lambda where A >= 0.
      negative: k and lambda where A < 0.

    >>> logprobs = jnp.array([[-1.0, -2.0]])  # W = 1, so phi = 1
    >>> vespo_loss(logprobs, logprobs, jnp.array([1.0]), jnp.ones((1, 2))).tolist()
    [[1.0, 2.0]]
    """
    advantages = _per_token(logprobs, advantages)
    difference = jnp.where(loss_mask > 0, logprobs - old_logprobs, 0.0)
    log_weight = jnp.sum(loss_mask * difference, axis=1, keepdims=True)
    log_weight = jnp.clip(log_weight, jnp.log(1e-8), MAX_LOG_RATIO)
    k = jnp.where(advantages >= 0, positive[0], negative[0])
    scale = jnp.where(advantages >= 0, positive[1], negative[1])
    phi = jnp.exp(scale + k * log_weight - scale * jnp.exp(log_weight))
    return -lax.stop_gradient(phi) * advantages * logprobs


def _clipped(ratio: Array, epsilon_low: float | None, epsilon_high: float | None) -> Array:
    low = None if epsilon_low is None else 1.0 - epsilon_low
    high = None if epsilon_high is None else 1.0 + epsilon_high
    # minimum and maximum let a NaN through; fmin and fmax would hide it.
    return jnp.clip(ratio, low, high)


def _per_token(per_token: Array, advantages: Array) -> Array:
    """Advantages that broadcast over ``[B, T]``."""
    fits = advantages.shape in (per_token.shape, per_token.shape[:1])
    if per_token.ndim != 2 or not fits:
        raise ValueError(
            "expected [B, T] and advantages [B] or [B, T], got "
            f"{per_token.shape}, {advantages.shape}"
        )
    return advantages[:, None] if advantages.ndim == 1 else advantages
