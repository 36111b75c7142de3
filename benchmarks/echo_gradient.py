"""How much of a step's gradient is the echo loss: its norm against the policy loss's, the angle.

Batches of real rollouts of the shipped Countdown model (or of --model) are assembled as in
training; for each the gradient of the policy loss and that of the echo loss at coefficient 1 are
computed apart. Prints one JSON object, medians over batches: the norms, the coefficient at which
the two would be equal, the cosine between them, and the mean negative log-likelihood of a clip's
tokens, which says what an echo has left to teach.

    python benchmarks/echo_gradient.py --batches=8
    python benchmarks/echo_gradient.py --batches=8 --model=runs/quickstart/export
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from echorl_jax.config_file import load_config
from echorl_jax.training.batch import make_batches
from echorl_jax.training.experience import collect
from echorl_jax.training.micro_batches import micro_batches, trainable_rows
from echorl_jax.training.run import Run, open_run
from echorl_jax.training.update import micro_gradient
from echorl_jax.types import PyTree, TrainBatch

ROOT = Path(__file__).parent.parent


def gradient(run: Run, params: PyTree, batch: TrainBatch, *, echo_coef: float) -> PyTree:
    """Of the whole batch, on the host in float64."""
    whole, rows = trainable_rows(batch, every_row=False)
    total: PyTree = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for _, micro in micro_batches(whole, rows, run.setup.bounds):
        part = micro_gradient(run.setup, params, micro, echo_coef=echo_coef).gradient
        total = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), total, part)
    return total


def apart(run: Run, params: PyTree, batch: TrainBatch) -> dict[str, float]:
    """Norms, angle and likelihood of one batch."""
    policy = gradient(run, params, batch, echo_coef=0.0)
    both = gradient(run, params, batch, echo_coef=1.0)
    echo = jax.tree.map(np.subtract, both, policy)
    norms = [float(optax.tree.norm(tree)) for tree in (policy, echo)]
    cosine = float(optax.tree.vdot(policy, echo)) / (norms[0] * norms[1])
    weight = batch.echo_weights.sum()
    return {
        "policy_norm": norms[0],
        "echo_norm_at_1": norms[1],
        "equal_at_coef": norms[0] / norms[1],
        "share_at_1e-3": 1e-3 * norms[1] / norms[0],
        "cosine": cosine,
        "clip_nll_per_token": float(-(batch.echo_weights * batch.rollout_logprobs).sum() / weight),
        "clips": int(batch.echo_weights.any(axis=1).sum()),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over batches."""
    overrides = {
        "eval.every": "0",
        "steps": str(arguments.batches),
        "log.tensorboard": "false",
        "rollout.prompts_per_step": str(arguments.prompts),
        "rollout.group_size": str(arguments.group),
    }
    if arguments.model:
        overrides["model.path"] = arguments.model
    config = load_config(str(ROOT / "configs" / "countdown.py"), overrides)
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "run"
        with open_run(config, target, prompts_per_step=arguments.prompts) as (run, state):
            for step in range(1, arguments.batches + 1):
                key = jax.random.key(step)
                sampled = collect(
                    run.setup,
                    state.params,
                    key,
                    step=step,
                    stream=run.stream,
                    engine=run.engine,
                    grader=run.grader,
                    warn=run.log.say,
                )
                parts, _ = make_batches(run.setup, sampled, key, step=step)
                found += [apart(run, state.params, part.batch) for part in parts]
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {
        "model": arguments.model or "as in configs/countdown.py",
        "batches": len(found),
        **{name: float(f"{value:.4g}") for name, value in middle.items()},
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=8, help="default 8")
    parser.add_argument("--prompts", type=int, default=32, help="of a batch (default 32)")
    parser.add_argument("--group", type=int, default=8, help="rollouts of each (default 8)")
    parser.add_argument("--model", default="", help="a directory; the config's unless given")
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
