"""Compiles forward and backward of a published shape for a TPU topology, without a TPU.

    python aot_tpu.py SHAPE TOPOLOGY FSDP TENSOR ROWS LENGTH

Prints one JSON object with the bytes per chip. The loss is the mean log-probability of the next
token over a head in chunks, with splash attention, bfloat16 compute and rematerialised layers.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from echorl_jax.core import logprobs_and_entropy
from echorl_jax.models import Decoder, DecoderConfig, param_shardings
from echorl_jax.parallel import make_mesh

SHAPES = {
    "qwen2.5-1.5b": DecoderConfig(
        "qwen2", 151936, 1536, 8960, 28, 12, 2, 128, qkv_bias=True, tied_embeddings=True
    ),
    "qwen2.5-7b": DecoderConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, qkv_bias=True),
}


def compile_for(shape: str, topology: str, fsdp: int, tensor: int, rows: int, length: int) -> dict:
    """Bytes per chip of the compiled program, and the seconds it took to compile."""
    model = Decoder(SHAPES[shape], attention="splash")
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = make_mesh(-1, fsdp, tensor, devices=devices)
    shardings = param_shardings(model, mesh)
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    arguments = (
        jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            model.param_shapes(),
            shardings,
        ),
        jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch),
        jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=batch),
    )

    def loss(params, tokens, lengths):
        hidden = model.hidden(params, tokens, lengths=lengths)
        logprobs, _ = logprobs_and_entropy(hidden[:, :-1], model.head(params), tokens[:, 1:])
        return -logprobs.mean()

    start = time.monotonic()
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=shardings)
        compiled = step.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return {
        "shape": shape,
        "topology": topology,
        "mesh": dict(mesh.shape),
        "rows": rows,
        "length": length,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "arguments_bytes": memory.argument_size_in_bytes,
        "outputs_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_s": round(time.monotonic() - start),
    }


if __name__ == "__main__":
    name, chips, *numbers = sys.argv[1:]
    print(json.dumps(compile_for(name, chips, *map(int, numbers))))
