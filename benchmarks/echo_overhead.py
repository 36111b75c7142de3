"""What the echo loss costs: the time of an update with and without it, in turns, in one process.

One batch of real rollouts of the shipped Countdown model is assembled twice, with EchoClips and
without, and both are trained on in turns: mining, micro-batches, forward, backward and AdamW are
all in. Prints one JSON object: medians, and the median of the ratios of neighbouring turns with its
quartiles; beside it the same ratio of two turns that are both without echo, which is the noise, and
that of advantages spread over tokens (``[N, T]``) against one number a rollout, both without echo.

    python benchmarks/echo_overhead.py --prompts=32 --group=8 --repeats=30

On CPU, times are processor time, so that what else runs there does not count.

Rows without an advantage take part in the update only for their clips, so the echo's cost depends
on how many groups are degenerate; both counts of rows are printed. With --every_row (an entropy
bonus, as in the authors' recipe) every row is computed in either case.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from echorl_jax.config import Config
from echorl_jax.config_file import load_config
from echorl_jax.core import OBJECTIVES, Objective
from echorl_jax.training.batch import make_batches
from echorl_jax.training.experience import Experience, collect
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.run import open_run
from echorl_jax.training.setup import Setup
from echorl_jax.training.update import update
from echorl_jax.types import Array, StepData

ROOT = Path(__file__).parent.parent


def configured(arguments: argparse.Namespace, *, echo: bool) -> Config:
    """configs/countdown.py at the given size; without evaluation and files."""
    overrides = {
        "echo.enabled": str(echo).lower(),
        "eval.every": "0",
        "steps": "1",
        # The policy stays what it was when it sampled the batch, however often it learns from it.
        "optim.learning_rate": "1e-12",
        "log.tensorboard": "false",
        "rollout.prompts_per_step": str(arguments.prompts),
        "rollout.group_size": str(arguments.group),
    }
    if arguments.every_row:
        overrides["objective.entropy_coef"] = "0.001"
    return load_config(str(ROOT / "configs" / "countdown.py"), overrides)


def update_seconds(
    setup: Setup, state: TrainState, found: Experience
) -> tuple[TrainState, float, int]:
    """Clips, weights and one update; the new state, seconds, rows with a gradient."""
    # On CPU, processor time: what other programs do meanwhile does not count.
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    start = clock()
    key = jax.random.key(1)
    parts, coef = make_batches(setup, found, key, step=1)
    batches = [part.batch for part in parts]
    state, _, used = update(setup, state, batches, key, step=1, echo_coef=coef)
    jax.block_until_ready(state)
    return state, clock() - start, int((used > 0).sum())


def spread(step: StepData, objective: Objective) -> Array:
    """GRPO's advantages, one for each token: the same update by the path of token advantages."""
    rows = OBJECTIVES["grpo"].advantages(step, objective)
    return jnp.where(step.mask, rows[:, None], 0.0)


def ratios(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Median and quartiles of second over first."""
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    return {"median": round(middle, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def measure(arguments: argparse.Namespace) -> dict:
    """Runs the turns: without and with echo, without again, and without by token advantages."""
    with tempfile.TemporaryDirectory() as folder:
        config = configured(arguments, echo=True)
        with open_run(config, Path(folder) / "run", prompts_per_step=arguments.prompts) as opened:
            run, state = opened
            found = collect(
                run.setup,
                state.params,
                jax.random.key(0),
                step=1,
                stream=run.stream,
                engine=run.engine,
                grader=run.grader,
                warn=run.log.say,
            )
            plain = dataclasses.replace(run.setup, config=configured(arguments, echo=False))
            tokens = dataclasses.replace(
                plain, objective=dataclasses.replace(plain.objective, advantages=spread)
            )
            turns: list[tuple[float, ...]] = []
            rows = {}
            for _ in range(arguments.repeats + 2):
                seconds = []
                for name, one in (
                    ("without", plain),
                    ("with", run.setup),
                    ("again", plain),
                    ("tokens", tokens),
                ):
                    state, taken, rows[name] = update_seconds(one, state, found)
                    seconds.append(taken)
                turns.append(tuple(seconds))
    turns = turns[2:]  # the first two compile
    return {
        "device": jax.devices()[0].device_kind,
        "prompts": arguments.prompts,
        "group_size": arguments.group,
        "every_row": arguments.every_row,
        "repeats": arguments.repeats,
        "rows_without": rows["without"],
        "rows_with": rows["with"],
        "seconds_without": round(statistics.median(turn[0] for turn in turns), 4),
        "seconds_with": round(statistics.median(turn[1] for turn in turns), 4),
        "echo/overhead": ratios([(turn[0], turn[1]) for turn in turns]),
        "noise": ratios([(turn[0], turn[2]) for turn in turns]),
        "token_advantages/overhead": ratios([(turn[2], turn[3]) for turn in turns]),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=32, help="per step (default 32)")
    parser.add_argument("--group", type=int, default=8, help="rollouts of each (default 8)")
    parser.add_argument("--repeats", type=int, default=30, help="turns that count (default 30)")
    parser.add_argument("--every_row", action="store_true", help="with an entropy bonus of 0.001")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    print(json.dumps(measure(arguments), indent=2))


if __name__ == "__main__":
    main()
