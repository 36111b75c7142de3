"""Log-probabilities and entropies of tokens, from logits or straight from hidden states."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from echorl_jax.precision import wide_einsum
from echorl_jax.types import AnyArray as Array

# A logit whose probability is 0 in float32 at any temperature in use.
_NEVER = -1e30


def token_entropy(
    logits: Float[Array, "*rows V"], *, temperature: float = 1.0
) -> Float[Array, "*rows"]:
    """Entropy of the distribution each token is drawn from.

    H = -sum_v p_v log p_v with p = softmax(logits / temperature). An entry of ``-inf`` has
    probability 0 and adds nothing.

    Args:
      logits: ``[..., V]``, any float type.
      temperature: divides the logits, above 0.

    Returns:
      ``[...]`` float32, in nats.

    Raises:
      ValueError: if ``temperature`` is not above 0.

    >>> print(token_entropy(jnp.array([0.0, 0.0, -jnp.inf])).round(4))  # log 2
    0.6931
    """
    scaled = _scale(logits, temperature)
    return _entropy(scaled, jax.nn.logsumexp(scaled, axis=-1))


def token_logprobs(
    logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"], *, temperature: float = 1.0
) -> Float[Array, "*rows"]:
    """Log-probability of each token: ``log softmax(logits / temperature)[token]``.

    Args:
      logits: ``[..., V]``, any float type.
      tokens: ``[...]`` int32, in ``[0, V)``.
      temperature: divides the logits, above 0.

    Returns:
      ``[...]`` float32, in nats.

    Raises:
      ValueError: if ``temperature`` is not above 0.

    >>> print(token_logprobs(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4))  # log 1/4
    [-1.3863 -1.3863]
    """
    scaled = _scale(logits, temperature)
    return _picked(scaled, tokens) - jax.nn.logsumexp(scaled, axis=-1)


def logprobs_and_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
    data_shards: int = 1,
    never: tuple[int, ...] = (),
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability and entropy of each token, never holding the logits of all.

    Equals ``token_logprobs`` and ``token_entropy`` of ``hidden @ head``, but only ``chunk_size``
    tokens have logits at any moment: the backward pass computes them again, piece by piece, or
    keeps them where all tokens are one piece. With l the scaled logits and g, h the cotangents of
    the two results, dL/dl_v = g (1[v = token] - p_v) - h p_v (log p_v + H). Products run in
    ``hidden``'s type and accumulate in float32.

    The sequence axis is what is cut, so a batch sharded over the mesh stays sharded, and a
    vocabulary sharded over a mesh axis exchanges only sums. ``chunk_size`` counts the tokens of all
    devices together. With ``data_shards``, each part of the batch sums its own gradient of ``head``
    and the parts meet once at the end, not once per chunk.

    Args:
      hidden: ``[B, T, D]``, float32 or bfloat16; entry t predicts ``tokens[:, t]``.
      head: ``[D, V]``, cast to ``hidden``'s type for the products; its gradient keeps its own.
      tokens: ``[B, T]`` int32, in ``[0, V)``.
      temperature: divides the logits, above 0; static.
      chunk_size: tokens whose logits exist at once; static.
      data_shards: devices that B is divided over, a divisor of B; static.
      never: tokens without probability, whose logits are left out; static.

    Returns:
      ``(logprobs, entropy)``, both ``[B, T]`` float32, in nats, both differentiable in ``hidden``
      and ``head``.

    Raises:
      ValueError: if a shape does not fit, ``temperature`` or ``chunk_size`` is not above 0, or
        ``data_shards`` does not divide B.

    >>> hidden, head, tokens = jnp.ones((1, 2, 3)), jnp.zeros((3, 4)), jnp.array([[0, 3]])
    >>> logprobs, entropy = logprobs_and_entropy(hidden, head, tokens)
    >>> print(logprobs.round(4), entropy.round(4))  # uniform over 4
    [[-1.3863 -1.3863]] [[1.3863 1.3863]]
    """
    if hidden.ndim != 3 or head.ndim != 2 or hidden.shape[2] != head.shape[0]:
        raise ValueError(
            f"hidden must be [B, T, D] and head [D, V], got {hidden.shape}, {head.shape}"
        )
    if tokens.shape != hidden.shape[:2]:
        raise ValueError(f"tokens must be {hidden.shape[:2]}, got {tokens.shape}")
    if temperature <= 0 or chunk_size < 1:
        raise ValueError(f"{temperature=} and {chunk_size=} must be above 0")
    rows, length = tokens.shape
    if data_shards < 1 or rows % data_shards:
        raise ValueError(f"{data_shards=} must divide {rows} rows")
    if rows * length == 0:
        return jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(tokens.shape, jnp.float32)
    folded = rows // _fold(rows, data_shards, chunk_size), -1
    pieces = _cut(hidden.reshape(*folded, hidden.shape[2]), chunk_size)
    token_pieces = _cut(tokens.reshape(folded), chunk_size)
    settings = float(temperature), data_shards, never
    logprobs, entropy = _chunked(pieces, head, token_pieces, *settings)
    return _join(logprobs, rows, length), _join(entropy, rows, length)


def _fold(rows: int, data_shards: int, chunk_size: int) -> int:
    """Rows to lay end to end so that one position of every row left fits a chunk, if it can."""
    divisors = (n for n in range(1, rows // data_shards + 1) if rows // data_shards % n == 0)
    return next((n for n in divisors if rows // n <= chunk_size), rows // data_shards)


def _cut(x: Array, chunk_size: int) -> Array:
    """``[B, T, ...]`` to ``[pieces, B, t, ...]``, evenly, padded with zeros."""
    rows, length = x.shape[:2]
    pieces = -(-length // max(1, chunk_size // rows))
    width = -(-length // pieces)
    padding = [(0, 0), (0, pieces * width - length)] + [(0, 0)] * (x.ndim - 2)
    return jnp.moveaxis(jnp.pad(x, padding).reshape(rows, pieces, width, *x.shape[2:]), 1, 0)


def _join(x: Array, rows: int, length: int) -> Array:
    """Undoes the folding and cutting: ``[pieces, B', t]`` to ``[B, T]``."""
    folded = jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
    return folded[:, : rows * length // x.shape[1]].reshape(rows, length)


def _values(
    hidden: Array,
    head: Array,
    tokens: Array,
    temperature: float,
    data_shards: int,
    never: tuple[int, ...],
) -> tuple[Array, Array]:
    return _forward(hidden, head, tokens, temperature, data_shards, never)[0]


def _forward(
    hidden: Array,
    head: Array,
    tokens: Array,
    temperature: float,
    data_shards: int,
    never: tuple[int, ...],
):
    weight = head.astype(hidden.dtype)

    def piece(_, xs):
        logits = _logits(xs[0], weight, temperature, never)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        scores = _picked(logits, xs[1]) - log_total, _entropy(logits, log_total)
        return None, (*scores, log_total, logits if alone else None)

    # The backward pass of a single piece follows at once: its logits may as well stay.
    alone = hidden.shape[0] == 1
    _, (logprobs, entropy, log_total, logits) = lax.scan(piece, None, (hidden, tokens))
    return (logprobs, entropy), (hidden, head, tokens, entropy, log_total, logits)


def _backward(temperature: float, data_shards: int, never: tuple[int, ...], residuals, cotangents):
    hidden, head, tokens, entropy, log_total, logits = residuals
    weight = head.astype(hidden.dtype)

    def by_shard(x):
        return x.reshape(data_shards, -1, *x.shape[1:])

    def piece(d_head, xs):
        x, token, h, total, kept, d_logprob, d_entropy = xs
        logits = _logits(x, weight, temperature, never) if kept is None else kept
        logp = logits - total[..., None]
        slope = d_logprob[..., None] + d_entropy[..., None] * (logp + h[..., None])
        picked = jnp.where(_is_token(logp, token), d_logprob[..., None], 0.0)
        d_logits = ((picked - jnp.exp(logp) * slope) / temperature).astype(x.dtype)
        d_x = wide_einsum("btv,dv->btd", d_logits, weight)
        d_head += wide_einsum("sbtd,sbtv->sdv", by_shard(x), by_shard(d_logits))
        return d_head, d_x.astype(x.dtype)

    d_head, d_hidden = lax.scan(
        piece,
        jnp.zeros((data_shards, *head.shape), jnp.float32),
        (hidden, tokens, entropy, log_total, logits, *cotangents),
    )
    d_head = jnp.sum(d_head, axis=0).astype(head.dtype)
    # A head tied to the embedding transposes its gradient. XLA would fold that into the product of
    # a single piece, which it has not implemented for bf16 operands on CPU.
    d_head = lax.platform_dependent(d_head, cpu=lax.optimization_barrier, default=lambda x: x)
    return d_hidden, d_head, None


_chunked = jax.custom_vjp(_values, nondiff_argnums=(3, 4, 5))
_chunked.defvjp(_forward, _backward)


def _scale(logits: Array, temperature: float) -> Array:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return logits.astype(jnp.float32) / temperature


def _logits(x: Array, head: Array, temperature: float, never: tuple[int, ...]) -> Array:
    return without(wide_einsum("btd,dv->btv", x, head) / temperature, never)


def without(logits: Array, never: tuple[int, ...]) -> Array:
    """Logits ``[..., V]`` that give the tokens ``never`` no probability; finite."""
    if not never:
        return logits
    vocabulary = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    masked = functools.reduce(jnp.logical_or, [vocabulary == token for token in never])
    return jnp.where(masked, jnp.float32(_NEVER), logits)


def _entropy(logits: Array, log_total: Array) -> Array:
    logp = logits - log_total[..., None]
    # 0 log 0 is 0; both branches stay finite so that the gradient is too.
    possible = logp > -jnp.inf
    return -jnp.sum(
        jnp.where(possible, jnp.exp(logp) * jnp.where(possible, logp, 0.0), 0.0), axis=-1
    )


def _is_token(logits: Array, tokens: Array) -> Array:
    return tokens[..., None] == lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)


def _picked(logits: Array, tokens: Array) -> Array:
    # A comparison instead of a gather: with the vocabulary sharded, only this sum crosses devices.
    return jnp.sum(jnp.where(_is_token(logits, tokens), logits, 0.0), axis=-1)
