"""Says before any accelerator time whether a config fits, and how fast a step can be at best.

Compiles the programs of a training step (prompt prefill, decode loop, scoring, gradient of a
micro-batch, optimizer) from shapes alone: for a TPU topology through libtpu, with no TPU here, or
for this machine. For GPUs (a100, h100, h200) the figures are estimated by formula. No weights are
read. If a program does not fit, other settings are tried and the best is printed. Exit code 1 when
nothing fits.

examples:
  echorl plan --config=configs/countdown.py
  echorl plan --config=configs/paper.py:qwen2.5-math-7b,grpo,echo --topology=v5p:2x2x2 --json
  echorl plan --config=configs/paper.py:qwen2.5-math-7b,grpo,echo --topology=h100:8
"""

import argparse
import json
import os
import sys
import time

from echorl_jax.commands import number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; any config key may be set with ``--config.KEY=VALUE``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a file under configs/")
    parser.add_argument(
        "--topology", default="", metavar="CHIP:SHAPE", help="such as v5p:2x2x2; else this machine"
    )
    parser.add_argument(
        "--estimate", action="store_true", help="by formula, in seconds: compile nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--tries", type=whole(), default=4, help="other settings to compile, at most"
    )
    parser.add_argument(
        "--prompt_tokens", type=number, default=0, help="mean prompt, for the times; else the bound"
    )
    parser.add_argument(
        "--completion_tokens", type=number, default=0, help="mean completion, likewise"
    )
    parser.set_defaults(overrides={})


def run(arguments: argparse.Namespace) -> int:
    """Compiles and prints."""
    from echorl_jax.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
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
        lengths=Lengths(arguments.prompt_tokens, arguments.completion_tokens),
        tries=arguments.tries,
        say=say,
        formula=arguments.estimate,
    )
    if arguments.json:
        print(json.dumps(as_dict(plans, arguments.topology)))
    else:
        print_plan(plans, Console())
    return 0 if plans[-1].fits else 1


def _describe_tpu(topology: str) -> None:
    """Tells libtpu, before it is loaded, which slice to imagine, and JAX to run on the CPU."""
    import jax

    from echorl_jax.tools.plan.chips import parse_topology

    chip, count = parse_topology(topology)
    jax.config.update("jax_platforms", "cpu")
    if chip.libtpu_name:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", chip.libtpu_name.format(count * chip.cores))
