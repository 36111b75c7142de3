"""What narrow types cost: how far the sampler's numbers lie from the trainer's.

    python benchmarks/cache_types.py --model=builtin:countdown --new=32 --groups=32
    python benchmarks/cache_types.py --model=DIR --prompt=64 --new=128 --groups=4

Prints a JSON line for each type of computation and of cache: tokens, and the largest and mean
difference of their log-probabilities (nats) and entropies. Prompts are Countdown problems where the
model is the shipped one, else random tokens.
"""

import argparse
import json

import jax
import numpy as np

from echorl_jax.data import encode_prompt, load_rows, load_tokenizer
from echorl_jax.data.tokens import model_path
from echorl_jax.models import load_model
from echorl_jax.rollout import generate, score_rollouts

GROUP = 8
TYPES = {"float32": ("float32", "bfloat16", "int8"), "bfloat16": ("bfloat16", "int8")}


def prompts_of(args: argparse.Namespace, path: str, vocab_size: int) -> list[list[int]]:
    if args.model == "builtin:countdown":
        rows = list(load_rows(f"countdown:split=eval&count={args.groups}"))
        return [encode_prompt(load_tokenizer(path), row) for row in rows]
    rng = np.random.RandomState(0)
    return rng.randint(2, vocab_size, (args.groups, args.prompt)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:countdown")
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
            logprobs, entropy = score_rollouts(model, params, rollouts)
            lengths = np.asarray(rollouts.completion_length)[:, None]
            written = np.arange(args.new)[None, :] < lengths
            gap = np.abs(np.asarray(logprobs - rollouts.rollout_logprobs))[written]
            other = np.abs(np.asarray(entropy - rollouts.token_entropy))[written]
            line = {"computation": dtype, "cache": kv_dtype, "tokens": int(written.sum())}
            line |= {"largest": float(gap.max()), "mean": float(gap.mean())}
            print(json.dumps(line | {"entropy_largest": float(other.max())}), flush=True)


if __name__ == "__main__":
    main()
