"""One decode step as the TPU compiler estimates it, compared with the formula.

No TPU is needed: libtpu compiles for a described topology. One layer is compiled, with the loops
over the blocks of both caches in it, and its text is read: which operations the compiler counts,
whether cache blocks are read inside the products that use them, and the cycles that it estimates
for each fusion. A whole step is put together from that: layers and blocks times the larger of
cycles and the bytes that have to come from memory (weights are fetched while others compute).

    python benchmarks/decode_step.py --model=Qwen/Qwen2.5-Math-1.5B --topology=v5e:2x2

Prints one JSON object. It is the compiler's estimate, not a measurement.
"""

import argparse
import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from echorl_jax.models import Decoder, DecoderConfig
from echorl_jax.models.published import architecture
from echorl_jax.rollout import Sampling, make_request
from echorl_jax.rollout.cache import BLOCK, empty_cache
from echorl_jax.rollout.decode import forward
from echorl_jax.rollout.slots import Queue, first_slots
from echorl_jax.tools.plan.chips import Chip
from echorl_jax.tools.plan.plan import find_target
from echorl_jax.tools.plan.roofline import DecodeStepCost, decode_step_cost

# A vocabulary that costs nothing.
VOCAB = 1024


def state(model: Decoder, *, prompts: int, group: int, block: int) -> Any:
    """A queue and slots with one block of prompt and two of completion; a slot for each row."""
    config, rows = model.config, prompts * group
    shape = {
        "layers": config.num_layers,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "dtype": "bfloat16",
        "block": block,
    }
    sampling = Sampling(group_size=group, max_new_tokens=2 * block)
    request = make_request([[1]] * prompts, sampling, vocab_size=config.vocab_size)
    queue = Queue(
        request=jax.tree.map(jnp.asarray, request),
        key=jax.random.split(jax.random.key(0), rows),
        last_token=jnp.zeros(prompts, jnp.int32),
        store=empty_cache(**shape, rows=prompts, blocks=2),
    )
    ring = empty_cache(**shape, rows=rows, blocks=2)
    return queue, first_slots(queue, slots=rows, stop_window=0, ring=ring)


def compiled(args: argparse.Namespace, device: Any) -> Any:
    """A decode step of one layer, with a small vocabulary, compiled for the device."""
    config = architecture(args.model)
    config = dataclasses.replace(
        config, num_layers=1, windows=config.windows[:1], vocab_size=VOCAB, tied_embeddings=False
    )
    model = Decoder(config, dtype="bfloat16", param_dtype="bfloat16")
    prompts = args.slots // args.group
    make = functools.partial(state, model, prompts=prompts, group=args.group, block=args.block)
    place = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (model.param_shapes(), *jax.eval_shape(make)),
    )
    step = jax.jit(lambda *given: forward(model, *given, platform="tpu"))
    return step.lower(*shapes).compile()


def cycles(computation: str) -> int:
    """The compiler's estimates of a computation's own instructions, added."""
    return sum(int(number) for number in re.findall(r'"estimated_cycles":"(\d+)"', computation))


def read_text(text: str, *, ring_rows: int, store_rows: int) -> dict[str, Any]:
    """Cycles outside the loops, of a body of each loop, and whether slices are fused."""
    parts = dict(
        (match[1], part)
        for part in re.split(r"\n(?=%|ENTRY )", text)
        if (match := re.match(r"(?:ENTRY )?%([\w.-]+) \(", part))
    )
    entry = next(part for part in parts.values() if part.startswith("ENTRY"))
    bodies = {name: parts[name] for name in re.findall(r" while\(.*body=%([\w.-]+)", text)}

    def body_of(rows: int) -> str:
        reads = re.compile(rf"bf16\[1,\d+,{rows},\d+,\d+,\d+\]")
        return next(body for body in bodies.values() if reads.search(body))

    loops = {"ring": body_of(ring_rows), "prompt": body_of(store_rows)}
    slices = [
        line
        for body in loops.values()
        for line in body.splitlines()
        if re.search(r"= bf16\[\d+,\d+,\d+,\d+\]\S* (copy|fusion|dynamic-slice)\(", line)
    ]
    found: dict[str, Any] = {f"{name}_cycles": cycles(body) for name, body in loops.items()}
    return found | {"layer_cycles": cycles(entry), "blocks_copied": len(slices)}


def step_seconds(
    args: argparse.Namespace,
    config: DecoderConfig,
    chip: Chip,
    cost: DecodeStepCost,
    parts: dict[str, Any],
) -> float:
    """A decode step from the compiler's cycles for a layer and for blocks of both caches; each
    takes at least as long as reading its bytes.
    """
    head = 2 * config.hidden_size * config.vocab_size
    layer = (cost.weight_bytes - head) / config.num_layers
    row = 2 * 2 * config.num_kv_heads * config.head_dim * args.block  # bytes of a block for one row
    prompt_bytes = args.slots / args.group * row

    def seconds(cycles: float, amount: float) -> float:
        return max(cycles / (args.clock * 1e9), amount / chip.bytes_per_second)

    return head / chip.bytes_per_second + config.num_layers * (
        seconds(parts["layer_cycles"], layer)
        + args.written / args.block * seconds(parts["ring_cycles"], args.slots * row)
        + args.prompt / args.block * seconds(parts["prompt_cycles"], prompt_bytes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen2.5-Math-1.5B")
    parser.add_argument("--topology", default="v5e:2x2", help="whose chip; one of them is used")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="rows that share a prompt")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--written", type=int, default=2048, help="tokens of each completion")
    parser.add_argument("--block", type=int, default=BLOCK["tpu"], help="positions in a block")
    parser.add_argument("--clock", type=float, default=1.5, help="GHz of the chip (v5e: 1.5)")
    args = parser.parse_args()
    target = find_target(args.topology)
    assert target.devices is not None
    program = compiled(args, target.devices[0])
    parts = read_text(program.as_text(), ring_rows=args.slots, store_rows=args.slots // args.group)
    model = Decoder(architecture(args.model), dtype="bfloat16", param_dtype="bfloat16")
    config, chip = model.config, target.chip
    cost = decode_step_cost(
        model,
        slots=args.slots,
        prompt_tokens=args.prompt,
        completion_tokens=args.written,
        group_size=args.group,
    )
    limit = cost.seconds(
        flops_per_second=chip.flops_per_second, bytes_per_second=chip.bytes_per_second
    )
    seconds = step_seconds(args, config, chip, cost, parts)
    small = dataclasses.replace(config, num_layers=1, windows=config.windows[:1], vocab_size=VOCAB)
    # The compiler counts the body of each loop once: one block of each cache.
    once = decode_step_cost(
        Decoder(small, dtype="bfloat16", param_dtype="bfloat16"),
        slots=args.slots,
        prompt_tokens=args.block,
        completion_tokens=args.block,
        group_size=args.group,
    )
    result = {
        "chip": chip.name,
        "model": args.model,
        "slots": args.slots,
        **parts,
        "operations_of_one_layer": {
            "compiler": program.cost_analysis()["flops"],
            "formula": once.flops,
        },
        "turn_ms": {"compiler": 1e3 * seconds, "formula": 1e3 * limit, "share": limit / seconds},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
