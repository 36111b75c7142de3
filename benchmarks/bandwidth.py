"""What part of an accelerator's memory bandwidth the decode loop reaches.

A turn of the loop reads every weight once, and what each row has in the caches
(``rollout.turn_cost``). Bytes by the time of a turn is compared with a copy of 4 GB on the same
device. The weights are random, no row ends early, and prompts are prefilled once for each group;
their prefill counts as time, not as bytes.

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
from echorl_jax.rollout import generate, turn_cost


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
    bandwidth = 1e9 * args.bandwidth if args.bandwidth else copy_bandwidth()
    config = architecture(args.model)
    model = Decoder(config, dtype="bfloat16", param_dtype="bfloat16")
    params = init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (args.groups, args.prompt))
    rows = args.groups * args.group
    for new in map(int, args.new.split(",")):

        def call(limit: int, new: int = new) -> Any:
            return generate(
                model,
                params,
                tokens.tolist(),
                jax.random.key(1),
                group_size=args.group,
                max_new_tokens=new,
                row_limits=[limit] * rows,
                eos_ids=(),
                kv_dtype=args.kv_dtype,
            )

        begin = time.perf_counter()
        jax.block_until_ready(call(8))
        compiled = time.perf_counter() - begin
        turn = seconds(lambda new=new: call(new), args.repeats) / new
        cost = turn_cost(
            model,
            slots=rows,
            prompt_tokens=args.prompt,
            completion_tokens=new / 2,
            group_size=args.group,
            kv_dtype=args.kv_dtype,
        )
        result = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "new": new,
            "tokens_per_second": rows / turn,
            "turn_ms": 1e3 * turn,
            "weights_GB": cost.weight_bytes / 1e9,
            "cache_GB": cost.cache_bytes / 1e9,
            "copy_GB_per_s": bandwidth / 1e9,
            "share": cost.bytes / turn / bandwidth,
            "seconds_of_compilation": compiled,
            "peak_GB": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
