"""The share of an accelerator's memory bandwidth that the decode loop reaches.

A decode step reads every weight once, and the filled part of the caches
(``roofline.decode_step_cost``). Its bytes per second are compared with a copy of 4 GB on the same
device. The weights are random, no row ends early, and prompts are prefilled once for each group;
the prefill counts as time, not as bytes.

    python benchmarks/bandwidth.py --model=Qwen/Qwen2.5-Math-1.5B --new=512,2048,8192

Prints one JSON object for each number of new tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax.models import Decoder, init_params
from echorl_jax.models.published import architecture
from echorl_jax.rollout import generate
from echorl_jax.tools.plan.roofline import decode_step_cost


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of the time until the device has finished."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_bandwidth(size: int = 4 << 30) -> float:
    """Bytes per second of a copy, counting what is read and what is written."""
    source = jnp.ones(size // 2, jnp.bfloat16)
    copy = jax.jit(lambda x: jnp.array(x, copy=True))
    jax.block_until_ready(copy(source))
    return 2 * size / seconds(lambda: copy(source), 7)


def measured(model: Decoder, params: Any, args: argparse.Namespace, new: int) -> dict[str, float]:
    """Time and bytes of a decode step with ``new`` tokens in every row."""
    rows = args.groups * args.group
    shape = args.groups, args.prompt
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, shape).tolist()
    sizes = {"group_size": args.group, "kv_dtype": args.kv_dtype}

    def call(limit: int) -> Any:
        limits = {"max_new_tokens": new, "row_limits": [limit] * rows, "eos_ids": ()}
        return generate(model, params, prompts, jax.random.key(1), **sizes, **limits)

    compilation = seconds(lambda: call(min(8, new)), 1)
    per_step = seconds(lambda: call(new), args.repeats) / new
    lengths = {"prompt_tokens": args.prompt, "completion_tokens": new / 2}
    cost = decode_step_cost(model, slots=rows, **sizes, **lengths)
    return {
        "new": new,
        "tokens_per_second": rows / per_step,
        "turn_ms": 1e3 * per_step,
        "weights_GB": cost.weight_bytes / 1e9,
        "cache_GB": cost.cache_bytes / 1e9,
        "GB_per_s": cost.bytes / per_step / 1e9,
        "seconds_of_compilation": compilation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen2.5-Math-1.5B", help="name or directory")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="rows of a prompt; each has a slot")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new", default="512,2048", help="tokens of each completion, by commas")
    parser.add_argument("--kv-dtype", help="type of the cache; the model's unless given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--bandwidth", type=float, help="GB/s of the device; measured by a copy unless given"
    )
    args = parser.parse_args()
    device = jax.devices()[0]
    bandwidth = args.bandwidth or copy_bandwidth() / 1e9
    model = Decoder(architecture(args.model), dtype="bfloat16", param_dtype="bfloat16")
    params = init_params(model, jax.random.key(0))
    for new in map(int, args.new.split(",")):
        found = measured(model, params, args, new)
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
        share = found["GB_per_s"] / bandwidth
        whole = {"device": device.device_kind, "jax": jax.__version__, **found}
        print(
            json.dumps({**whole, "copy_GB_per_s": bandwidth, "share": share, "peak_GB": peak}),
            flush=True,
        )


if __name__ == "__main__":
    main()
