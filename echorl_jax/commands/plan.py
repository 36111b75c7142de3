"""Computes the memory per chip and the least step time of a config, without an accelerator.

Compiles the programs of a training step (prompt prefill, decode loop, scoring, gradient of a
micro-batch, optimizer) from shapes alone: for a TPU topology through libtpu, with no TPU present,
or for this machine. For GPUs and TPU v4 the figures are estimated by formula. No weights are read.
Times are lower bounds; below them: an estimate at measured shares of the peak, and the run's hours.
If a program does not fit, other settings are tried and the best is printed. Exit code 1 if nothing
fits.

chips:
  v5litepod-16, v6e-8   Google's types, which count chips of v5e and v6e
  v5p-64, v4-32         and cores of v5p and v4, two to a chip: 32 and 16 chips
  v5p:2x2x2, v5e:4x4    a TPU slice by its shape
  8xH100, h100:8, l4    cards: t4, l4, a10g, 4090, l40s, a100-40gb, a100-80gb, h100, h200, b200;
                        another one: a card as fast, with --memory_gb

examples:
  echorl plan --config=configs/countdown.py
  echorl plan --config=configs/paper.py:qwen2.5-math-7b,grpo,echo --topology=v5p:2x2x2 --json
  echorl plan --config=configs/paper.py:qwen2.5-math-7b,grpo,echo --topology=8xH100
  echorl plan --config=configs/countdown.py --topology=4090 --memory_gb=48
"""

import argparse
import json
import os
import sys
import time

from echorl_jax.commands import add_config, number, read_config, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; any config key may be set with ``--config.KEY=VALUE``."""
    add_config(parser)
    add, mean = parser.add_argument, "for the times (default: the longest allowed)"
    chips = "chips and their number, see above (default: this machine)"
    add("--topology", default="", metavar="CHIPS", help=chips)
    add("--memory_gb", type=number, default=0, help="GB of a chip, for a card that is not listed")
    add("--estimate", action="store_true", help="estimate by formula in seconds, compile nothing")
    add("--json", action="store_true", help="print one JSON object")
    add("--tries", type=whole(), default=4, help="other settings to compile, at most (default 4)")
    add("--prompt_tokens", type=number, default=0, help=f"mean prompt length, {mean}")
    images = "mean image tokens of a prompt"
    add("--image_tokens", type=number, default=0, help=f"{images}, {mean}")
    add("--completion_tokens", type=number, default=0, help=f"mean completion length, {mean}")


def run(arguments: argparse.Namespace) -> int:
    """Makes the plan and prints it."""
    config = read_config(arguments)
    if arguments.topology:
        _describe_tpu(arguments.topology)
    from rich.console import Console

    from echorl_jax.tools.plan.plan import make_plan
    from echorl_jax.tools.plan.plan_table import as_dict, print_plan
    from echorl_jax.tools.plan.roofline import Lengths

    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True)

    plans = make_plan(
        config,
        arguments.topology,
        lengths=Lengths(
            arguments.prompt_tokens, arguments.completion_tokens, arguments.image_tokens
        ),
        tries=arguments.tries,
        say=say,
        formula=arguments.estimate,
        memory_gb=arguments.memory_gb,
    )
    if arguments.json:
        print(json.dumps(as_dict(plans, arguments.topology)))
    else:
        print_plan(plans, Console())
    return 0 if plans[-1].fits else 1


def _describe_tpu(topology: str) -> None:
    """Sets the environment of libtpu, which reads it when loaded, and keeps JAX on the CPU."""
    import jax

    from echorl_jax.tools.plan.chips import parse_topology

    given = parse_topology(topology)
    jax.config.update("jax_platforms", "cpu")
    chip = given.chip
    if chip.libtpu_name:
        # Nothing runs on a chip, so plans may be made side by side.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault(
            "TPU_ACCELERATOR_TYPE", chip.libtpu_name.format(given.count * chip.cores)
        )
