"""Runs the studies of the EchoRL paper and puts them into a report.

A study writes its rows to WORKDIR/analysis/*.jsonl and a section of WORKDIR/report.html. WORKDIR
may be a run or any new directory.

  run       from the files of a run (and of those in --compare, say without echo): how fast
            entropy falls, the law R = -a exp(H) + b with the reward it predicts at zero entropy,
            and where EchoClips end, how long they are and what token closes them. No model needed.
  entropy   token and step entropy of a policy along expert trajectories (column target of --data)
            and along its own (sampled, or read from --rollouts). The paper's starting point:
            experts run at higher entropy. With --rollouts alone, such as a run's samples, the
            entropies stored there are taken: right answers against wrong ones, without a model.
  deletion  takes right solutions apart: deletes k steps, highest entropy first, lowest first or at
            random, lets the policy go on from what is left, and grades. A curve with intervals.

Without a named study, all that the options are enough for.

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

from echorl_jax.commands import number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("studies", nargs="*", metavar="STUDY", help="run, entropy, deletion")
    add("--workdir", required=True, type=Path, metavar="DIR", help="a run, or where results go")
    add(
        "--compare",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="another run for the study run; may be repeated",
    )
    add("--model", help="Hugging Face directory, repository id or builtin:countdown")
    add("--data", metavar="FILE[,FILE]", help="rows, as config.data.train")
    add("--rollouts", type=Path, metavar="FILE", help="JSONL: a run's samples or generations.jsonl")
    add("--limit", type=whole(), default=0, help="only the first rows (default: all)")
    add(
        "--solutions",
        choices=["policy", "expert"],
        default="policy",
        help="whose solutions lose steps (default: the policy's own right answers)",
    )
    add("--deletions", type=_numbers, default=(0, 1, 2), metavar="K,K", help="default 0,1,2")
    add("--samples", type=whole(1), default=4, help="attempts at finding a solution (default 4)")
    add("--temperature", type=number, default=1.0, help="of sampling and entropies (default 1)")
    add("--max_new_tokens", type=whole(1), default=1024, help="longest trajectory (default 1024)")
    add("--max_prompt_tokens", type=whole(1), default=2048, help="longer prompts are left out")
    add(
        "--delimiter_ids",
        type=_numbers,
        default=(),
        metavar="ID,ID",
        help="tokens that end a step (default: every token with a newline; the paper's Qwen2.5 "
        "setting is 198,271)",
    )
    add("--template", default="chat", help="how a row becomes text, as config.data.template")
    add("--grader", default="auto", help="auto, math, choice, countdown or module:function")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="compute type")
    add("--batch", type=whole(1), default=64, help="rows computed together (default 64)")
    add("--workers", type=whole(), default=2, help="grading processes")
    add("--seed", type=whole(), default=0, help="of sampling and random deletion")


def run(arguments: argparse.Namespace) -> int:
    """Studies, and says where the results are."""
    from echorl_jax.tools.report.analyze import Analysis, analyze

    names = {field.name for field in dataclasses.fields(Analysis)}
    options: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k in names}
    options |= {name: tuple(options[name]) for name in ("studies", "compare")}
    *rows, report = analyze(Analysis(**options))
    for path in rows:
        print(f"rows:   {path}")
    print(f"report: {report}")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(whole(), text.split(",")))
