"""Runs the studies of the EchoRL paper and puts them into a report.

A study writes its rows to WORKDIR/analysis/*.jsonl and a section of WORKDIR/report.html. WORKDIR
may be a run or any new directory.

  run       reads the files of a run (and of those in --compare, for example without echo): how
            fast entropy falls, the law R = -a exp(H) + b with the reward it predicts at zero
            entropy, and the place, length and last token of EchoClips. Needs no model.
  entropy   measures token and step entropy of a policy along expert trajectories (column target of
            --data) and along its own (sampled, or read from --rollouts). The paper's starting
            point: experts have higher entropy. With --rollouts alone, such as a run's samples, it
            compares right and wrong answers by the entropies stored there, without a model.
  deletion  deletes k steps from right solutions, highest entropy first, lowest first or at random,
            lets the policy continue the rest, and grades. Gives a curve with intervals.

Without a named study it runs all studies that the options are sufficient for.

examples:
  echorl analyze --workdir=runs/echo --compare=runs/plain
  echorl analyze --workdir=runs/first --rollouts=runs/first/samples/step_000100.jsonl
  echorl analyze entropy --model=MODEL_DIR --data=train.parquet --limit=100 --workdir=runs/golden
  echorl analyze deletion --model=builtin:countdown --data="countdown:split=eval&count=256" \\
      --dtype=float32 --max_new_tokens=32 --workdir=runs/deletion
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from echorl_jax.commands import DTYPES, GRADERS, MODEL, add_compare, number, whole, whole_numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("studies", nargs="*", metavar="STUDY", help="run, entropy, deletion")
    add("--workdir", required=True, type=Path, metavar="DIR", help="a run, or any new directory")
    add_compare(parser, "for the study run")
    add("--model", help=MODEL)
    add("--data", metavar="FILE[,FILE]", help="rows, as config.data.train")
    add("--rollouts", type=Path, metavar="FILE", help="JSONL: a run's samples or generations.jsonl")
    add("--limit", type=whole(), default=0, help="only the first rows (default: all)")
    add(
        "--solutions",
        choices=["policy", "expert"],
        default="policy",
        help="author of the solutions that lose steps (default: the policy, its right answers)",
    )
    add("--deletions", type=whole_numbers, default=(0, 1, 2), metavar="K,K", help="default 0,1,2")
    add(
        "--samples", type=whole(1), default=4, help="attempts of the policy at each row (default 4)"
    )
    add("--temperature", type=number, default=1.0, help="of sampling and entropies (default 1)")
    add(
        "--max_new_tokens",
        type=whole(1),
        default=1024,
        help="longest trajectory in tokens (default 1024)",
    )
    add(
        "--max_prompt_tokens",
        type=whole(1),
        default=2048,
        help="rows with longer prompts are left out (default 2048)",
    )
    add(
        "--delimiter_ids",
        type=whole_numbers,
        default=(),
        metavar="ID,ID",
        help="tokens that end a step (default: every token with a newline; the paper's Qwen2.5 "
        "setting is 198,271)",
    )
    add("--template", default="chat", help="turns a row into text, as config.data.template")
    add("--grader", default="auto", help=GRADERS)
    add("--dtype", default="bfloat16", choices=DTYPES, help="compute type (default bfloat16)")
    add("--batch", type=whole(1), default=64, help="rows computed together (default 64)")
    add("--workers", type=whole(), default=2, help="grading processes (default 2)")
    add("--seed", type=whole(), default=0, help="of sampling and random deletion")


def run(arguments: argparse.Namespace) -> int:
    """Runs the studies and prints the paths of their files."""
    from echorl_jax.tools.report.analyze import Analysis, analyze

    names = {field.name for field in dataclasses.fields(Analysis)}
    options: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k in names}
    options |= {"studies": tuple(options["studies"]), "compare": (*map(Path, options["compare"]),)}
    *rows, report = analyze(Analysis(**options))
    for path in rows:
        print(f"rows:   {path}")
    print(f"report: {report}")
    return 0
