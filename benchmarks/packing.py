"""Processor time of one supervised gradient, demonstrations packed and one to a row.

``python benchmarks/packing.py --data=expert.parquet --tokenizer=DIR`` takes the lengths of real
demonstrations, divided by ``--shrink`` so that the tiny model of this package can be used, and
prints JSON. Processor time, not time by the clock: other programs on the machine do not count.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from echorl_jax.config import Config
from echorl_jax.core import load_objective
from echorl_jax.data import encode_prompt, encode_target, load_rows, load_tokenizer
from echorl_jax.data.tokens import BUILTIN
from echorl_jax.models import load_model
from echorl_jax.parallel import make_mesh, platform_of
from echorl_jax.training.micro_batches import (
    Bounds,
    computed_tokens,
    micro_batches,
    pack_rows,
    packed_width,
)
from echorl_jax.training.setup import static_setup
from echorl_jax.training.update import micro_gradient
from echorl_jax.types import TrainBatch


def batch_of(prompts: list[int], targets: list[int]) -> TrainBatch:
    """Random tokens of these lengths."""
    rows, width = len(prompts), max(targets)
    length = np.array(prompts) + np.array(targets)
    mask = (np.arange(width)[None, :] < np.array(targets)[:, None]).astype(np.float32)
    tokens = np.random.default_rng(0).integers(3, 500, (rows, max(prompts) + width))
    zeros = np.zeros_like(mask)
    return TrainBatch(
        tokens=tokens.astype(np.int32),
        prompt_length=np.array(prompts, np.int32),
        length=length.astype(np.int32),
        loss_mask=mask,
        advantages=np.ones(rows, np.float32),
        old_logprobs=zeros,
        rollout_logprobs=zeros,
        token_weights=mask / mask.sum(),
        echo_weights=zeros,
        on_policy=np.zeros(rows, bool),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--template", default="qwen-math")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--shrink", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    tokenizer, rows = load_tokenizer(options.tokenizer), load_rows(options.data)[: options.rows]
    prompts = [len(encode_prompt(tokenizer, row, options.template)) for row in rows]
    targets = [len(encode_target(tokenizer, row)) for row in rows]
    small = [[-(-n // options.shrink) for n in lengths] for lengths in (prompts, targets)]
    batch = batch_of(*small)
    lengths = batch.length.tolist()
    bounds = Bounds(
        longest=9216 // options.shrink, token_budget=32768 // options.shrink, row_multiple=1
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    model, params = load_model(BUILTIN["builtin:countdown"], dtype="float32", mesh=mesh)
    setup = static_setup(Config(), mesh, model, load_objective("sft"), platform=platform_of(mesh))
    packed = pack_rows(batch, width=packed_width(lengths, bounds))
    result: dict[str, dict[str, float]] = {}
    for name, each in (("single", batch), ("packed", packed)):
        pieces = [part for _, part in micro_batches(each, np.ones(len(each.length), bool), bounds)]
        seconds = []
        for _ in range(options.repeats + 1):
            start = time.process_time()
            for piece in pieces:
                gradient = micro_gradient(setup, params, piece, echo_coef=0.0).gradient
                jax.block_until_ready(gradient)
            seconds.append(time.process_time() - start)
        result[name] = {
            "rows": len(each.length),
            "computed_tokens": computed_tokens(each.length.tolist(), bounds),
            "cpu_seconds": round(statistics.median(seconds[1:]), 3),
        }
    result["gain"] = {
        key: round(result["single"][key] / result["packed"][key], 3)
        for key in ("computed_tokens", "cpu_seconds")
    }
    print(json.dumps({"real_tokens": sum(lengths), **result}, indent=2))


if __name__ == "__main__":
    main()
