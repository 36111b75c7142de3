"""Tries a model on benchmark rows: pass@1, avg@k and pass@k for each data source.

Writes generations.jsonl (a line per attempt) and scores.json to --out and prints a table. Several
attempts per row need a temperature above 0; pass@k is the unbiased estimate.

examples:
  echorl evaluate --model=builtin:countdown --data="countdown:split=eval&count=512" --out=runs/eval
  echorl evaluate --model=runs/first/export --data=test.parquet --samples=8 --out=runs/eval8
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory, repository id or builtin:countdown")
    add("--data", required=True, metavar="FILE[,FILE]", help="rows, as config.data.eval")
    add("--out", required=True, type=Path, metavar="DIR", help="where results go")
    add("--grader", default="auto", help="auto, math, choice, countdown or module:function")
    add("--samples", type=int, default=1, help="attempts per row (default 1)")
    add("--temperature", type=float, help="default: greedy for one sample, else 0.6")
    add("--top_p", type=float, default=1.0, help="default 1.0, the whole distribution")
    add("--max_new_tokens", type=int, default=1024, help="longest completion (default 1024)")
    add("--max_prompt_tokens", type=int, default=2048, help="longer prompts are left out")
    add("--limit", type=int, default=0, help="only the first rows")
    add("--template", default="chat", help="how a row becomes text: chat or plain")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="compute type")
    add("--batch", type=int, default=256, help="completions decoded together")
    add("--workers", type=int, default=2, help="grading processes")
    add("--seed", type=int, default=0, help="of the sampling")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and prints the table."""
    from echorl_jax.evaluation.benchmark import Benchmark, run_benchmark

    options = {k: v for k, v in vars(arguments).items() if k != "out"}
    run_benchmark(Benchmark(**options), arguments.out)
    return 0
