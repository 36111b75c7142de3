"""Measures the differences that narrow types cause: of caches, and of LoRA's frozen weights.

    python benchmarks/cache_types.py --model=builtin:countdown --new=32 --groups=32
    python benchmarks/cache_types.py --model=DIR --prompt=64 --new=128 --groups=4
    python benchmarks/cache_types.py --model=DIR --data=rows.jsonl --new=128 --groups=4

Prints a JSON line for each type of computation and of cache: tokens, and the largest and mean
difference of log-probabilities (nats) and entropies between sampler and trainer. Then the same for
a base in int8 against one in bfloat16, on the tokens sampled last. Prompts are rows of ``--data``
by the model's chat template, Countdown problems where the model is the shipped one, else random.
"""

import argparse
import json

import jax
import numpy as np

from echorl_jax.data import encode_prompt, load_rows, load_tokenizer
from echorl_jax.data.tokens import model_path
from echorl_jax.models import load_model
from echorl_jax.rollout import generate, score_rollouts
from echorl_jax.types import Array

GROUP = 8
TYPES = {"float32": ("float32", "bfloat16", "int8"), "bfloat16": ("bfloat16", "int8")}


def prompts_of(args: argparse.Namespace, path: str, vocab_size: int) -> list[list[int]]:
    shipped = f"countdown:split=eval&count={args.groups}"
    if source := args.data or (shipped if args.model == "builtin:countdown" else ""):
        rows = list(load_rows(source))[: args.groups]
        return [encode_prompt(load_tokenizer(path), row) for row in rows]
    rng = np.random.RandomState(0)
    return rng.randint(2, vocab_size, (args.groups, args.prompt)).tolist()


def gaps(one: tuple[Array, Array], other: tuple[Array, Array], written: Array) -> dict[str, float]:
    """Differences of two pairs of log-probabilities and entropies ``[N, T]``."""
    gap, entropy = (np.abs(np.asarray(a - b))[written] for a, b in zip(one, other, strict=True))
    return {
        "tokens": int(written.sum()),
        "largest": float(gap.max()),
        "mean": float(gap.mean()),
        "entropy_largest": float(entropy.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:countdown")
    parser.add_argument("--data", default="", help="rows to take the prompts from")
    parser.add_argument("--groups", type=int, default=32, help=f"of {GROUP} rows")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a random prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of a completion, at most")
    args = parser.parse_args()
    path = model_path(args.model)
    for dtype, caches in TYPES.items():
        model, params = load_model(path, dtype=dtype)
        prompts = prompts_of(args, path, model.config.vocab_size)
        for kv_dtype in caches:
            rollouts = generate(
                model,
                params,
                prompts,
                jax.random.key(0),
                group_size=GROUP,
                max_new_tokens=args.new,
                eos_ids=model.config.eos_ids,
                kv_dtype=kv_dtype,
            )
            scores = score_rollouts(model, params, rollouts)
            sampled = rollouts.rollout_logprobs, rollouts.token_entropy
            lengths = np.asarray(rollouts.completion_length)[:, None]
            written = np.arange(args.new)[None, :] < lengths
            line = {"computation": dtype, "cache": kv_dtype}
            print(json.dumps(line | gaps(scores, sampled, written)), flush=True)
        bases = [load_model(path, dtype=dtype, param_dtype=base) for base in ("int8", "bfloat16")]
        scores = [score_rollouts(*base, rollouts) for base in bases]
        line = {"computation": dtype, "base": "int8"}
        print(json.dumps(line | gaps(*scores, written)), flush=True)


if __name__ == "__main__":
    main()
