"""Grades finished generations, without a model.

Writes every input line again with `correct`, `score` and `reason`, then prints a summary. Where the
grader returns None it does not judge the line: both are null, and the line is not counted. With
--verdict_key it keeps the verdicts in the file as `expected` and compares: how many right answers
are accepted and wrong ones rejected, the score of accepting everything, and the lines that differ.

examples:
  echorl grade generations.jsonl --grader=countdown --out=graded.jsonl
  echorl grade outputs.jsonl --response_key=output --answer_key=gold --grader=my_rewards:judge
  echorl grade judged.jsonl --answer_key=gold --verdict_key=correct --out=compared.jsonl
"""

import argparse
import json
from pathlib import Path

from echorl_jax.commands import add_grader, number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("file", type=Path, metavar="FILE.jsonl", help="one object per line")
    parser.add_argument("--response_key", default="response", help="key of the generated text")
    parser.add_argument(
        "--answer_key", help="key of the gold answer (default: answer or ground_truth)"
    )
    add_grader(parser, "auto")
    parser.add_argument("--verdict_key", help="key of another judge's true or false, to compare")
    workers, limit = "grading processes (default 2)", "seconds for one verdict (default 10)"
    parser.add_argument("--workers", type=whole(), default=2, help=workers)
    parser.add_argument("--timeout_s", type=number, default=10.0, help=limit)
    parser.add_argument("--out", type=Path, metavar="OUT.jsonl", help="default: standard output")


def run(arguments: argparse.Namespace) -> int:
    """Grades the file."""
    from echorl_jax.evaluation.grade_file import grade_file

    summary = grade_file(
        arguments.file,
        out=arguments.out,
        response_key=arguments.response_key,
        answer_key=arguments.answer_key,
        verdict_key=arguments.verdict_key,
        grader=arguments.grader,
        kwargs=json.loads(arguments.grader_kwargs or "{}"),
        success_threshold=arguments.success_threshold,
        workers=arguments.workers,
        timeout_s=arguments.timeout_s,
    )
    print(summary)
    return 0
