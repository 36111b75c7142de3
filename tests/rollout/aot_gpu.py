"""Compiles the sampler of a published shape, cut to four layers, for H100s, without a GPU.

    python aot_gpu.py DATA FSDP TENSOR

Prints one JSON object that describes the body of the decode loop: calls of the attention kernel,
collectives by kind, and new arrays of the size of a weight matrix.
"""

import collections
import dataclasses
import json
import math
import re
import sys

import jax
from jax.experimental import topologies

from echorl_jax.models import Decoder
from echorl_jax.models.published import architecture
from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import Resources, Sampling
from echorl_jax.rollout.engine import lower_decode, lower_prefill
from echorl_jax.rollout.weights import abstract_rollout_params

# The device description that XLA needs.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 85017624576
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
"""
INSTRUCTION = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* ([\w-]+)\(")


def main() -> None:
    data, fsdp, tensor = map(int, sys.argv[1:])
    devices = topologies.get_topology_desc(
        "h100", platform="cuda", topology=f"1x1x{data * fsdp * tensor}", target_config=H100
    ).devices
    mesh = make_mesh(data, fsdp, tensor, devices=devices)
    config = architecture("Qwen/Qwen2.5-Math-1.5B")
    config = dataclasses.replace(config, num_layers=4, windows=config.windows[:4])
    model = Decoder(config, dtype="bfloat16")
    sampling, resources = Sampling(8, 512, eos_ids=(5,)), Resources(slots=64, mesh=mesh)
    prefill = lower_prefill(model, sampling, resources, prompts=8, prompt_tokens=256)
    decode = lower_decode(model, sampling, resources, prefill, prefill.compile())
    computations = re.split(r"\n(?=%|ENTRY )", decode.compile().as_text())
    body = max(computations, key=lambda text: text.count("gpu.triton"))
    matrices = {
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(abstract_rollout_params(model, mesh)["layers"])
        if leaf.ndim > 1 and leaf.size > config.hidden_size * config.head_dim * config.num_heads / 8
    }
    made, kinds = [], collections.Counter()
    for dtype, shape, kind in INSTRUCTION.findall(body):
        kinds[kind] += 1
        if kind in ("parameter", "get-tuple-element", "bitcast") or dtype != "bf16":
            continue
        if math.prod(map(int, filter(None, shape.split(",")))) in matrices:
            made.append(f"{kind} {shape}")
    result = {
        "layers": config.num_layers,
        "attend": body.count("__gpu$xla.gpu.triton"),
        "matrices_made": made,
        "collectives": {k: n for k, n in kinds.items() if k.startswith(("all-", "collective"))},
        "matrices": sorted(matrices),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
