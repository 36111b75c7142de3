"""Forward and backward of a 60M Qwen2 model: this package against transformers on torch.

Both run the same weights and tokens on this machine's processor, in turns, in one run; the torch
side is a process of its own (``--torch_python``, an interpreter with torch and transformers).
Prints one JSON object: medians, their ratio (below 1 is faster than torch) and the two losses.

    python benchmarks/model.py --torch_python=PATH --rows=16 --length=192
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_layers": 10,
    "num_heads": 10,
    "num_kv_heads": 2,
    "head_dim": 64,
}

_TORCH = """
import sys, time, numpy, torch
from transformers import AutoModelForCausalLM
directory, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
tokens = torch.from_numpy(numpy.load(directory + "/tokens.npy")).long()
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    print(time.perf_counter() - start, loss.item(), flush=True)
"""


def torch_worker(python: str, directory: str) -> subprocess.Popen:
    """A process that takes one training step for each line it is sent."""
    worker = subprocess.Popen(
        [python, "-c", _TORCH, directory, str(os.cpu_count())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert worker.stdout is not None
    if worker.stdout.readline().strip() != "ready":
        raise SystemExit(f"{python} cannot run the reference: it needs torch and transformers")
    return worker


def torch_step(worker: subprocess.Popen) -> tuple[float, float]:
    """Seconds and loss of one step."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("step\n")
    worker.stdin.flush()
    seconds, loss = worker.stdout.readline().split()
    return float(seconds), float(loss)


def build(directory: str, rows: int, length: int, remat: str):
    """Our compiled step and its arguments; the same model and tokens are left in ``directory``."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from echorl_jax.core import logprobs_and_entropy
    from echorl_jax.models import Decoder, DecoderConfig, init_params, save_model

    config = DecoderConfig(
        "qwen2", **CONFIG, qkv_bias=True, tied_embeddings=True, stored_dtype="float32"
    )
    model = Decoder(config, dtype="float32", remat=remat)
    params = init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), np.int32)
    save_model(directory, model, params)
    np.save(f"{directory}/tokens.npy", tokens)

    def loss(params, tokens):
        hidden = model.hidden(params, tokens)
        logprobs, _ = logprobs_and_entropy(hidden[:, :-1], model.head(params), tokens[:, 1:])
        return -logprobs.mean()

    start = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss)).lower(params, jnp.asarray(tokens)).compile()
    compile_s = time.perf_counter() - start
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    facts = {
        "parameters": count,
        "compile_s": round(compile_s, 2),
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
    }
    return lambda: jax.block_until_ready(step(params, jnp.asarray(tokens))), facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--remat", default="layer", choices=("layer", "dots", "none"))
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory() as directory:
        step, facts = build(directory, args.rows, args.length, args.remat)
        worker = torch_worker(args.torch_python, directory)
        step()
        torch_step(worker)
        ours, theirs = [], []
        loss = reference = 0.0
        for _ in range(args.repeats):
            start = time.perf_counter()
            loss = float(step()[0])
            ours.append(time.perf_counter() - start)
            seconds, reference = torch_step(worker)
            theirs.append(seconds)
        worker.kill()
        worker.wait()
    result = {
        "rows": args.rows,
        "length": args.length,
        "remat": args.remat,
        **facts,
        "seconds": round(median(ours), 3),
        "torch_seconds": round(median(theirs), 3),
        "ratio": round(median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
        "loss": loss,
        "torch_loss": reference,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
