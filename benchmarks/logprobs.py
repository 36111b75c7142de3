"""Log-probabilities and entropies in chunks against the whole array of logits, with gradients.

Prints one JSON object: the compiler's temporary bytes of both, their ratio (bound: 1/8), the median
ratio of seconds in turns, and the largest difference of the results. The whole array needs three to
four times ``tokens * vocabulary * 4`` bytes.

    python benchmarks/logprobs.py --tokens=8192 --vocabulary=151936 --hidden=64
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from echorl_jax.core import logprobs_and_entropy  # noqa: E402
from echorl_jax.types import Array  # noqa: E402


def whole(hidden: Array, head: Array, tokens: Array) -> tuple[Array, Array]:
    """The same numbers from ``[B, T, V]`` logits."""
    table = jax.nn.log_softmax(jnp.matmul(hidden, head, preferred_element_type=jnp.float32))
    logprobs = jnp.take_along_axis(table, tokens[..., None], axis=-1)[..., 0]
    return logprobs, -(jnp.exp(table) * table).sum(-1)


def gradient(score):
    """Of a loss that needs both, for hidden states and output matrix."""

    def loss(hidden: Array, head: Array, tokens: Array) -> Array:
        logprobs, entropy = score(hidden, head, tokens)
        return -logprobs.mean() - 0.01 * entropy.mean()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 3)
    rows = 16
    work = (
        jax.random.normal(keys[0], (rows, args.tokens // rows, args.hidden)),
        jax.random.normal(keys[1], (args.hidden, args.vocabulary)) * args.hidden**-0.5,
        jax.random.randint(keys[2], (rows, args.tokens // rows), 0, args.vocabulary),
    )
    programs = [gradient(score).lower(*work).compile() for score in (logprobs_and_entropy, whole)]
    results = [jax.block_until_ready(program(*work)) for program in programs]
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *results)
    del results
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.repeats):
        for program, times in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*work))
            times.append(time.perf_counter() - start)
    bytes_used = [program.memory_analysis().temp_size_in_bytes for program in programs]
    print(
        json.dumps(
            {
                "temporary_bytes": bytes_used[0],
                "whole_temporary_bytes": bytes_used[1],
                "memory_ratio": round(bytes_used[0] / bytes_used[1], 4),
                "seconds": round(median(seconds[0]), 3),
                "whole_seconds": round(median(seconds[1]), 3),
                "time_ratio": round(median(a / b for a, b in zip(*seconds, strict=True)), 3),
                "largest_difference": max(jax.tree.leaves(gaps)),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
