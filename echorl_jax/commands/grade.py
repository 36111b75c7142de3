"""Verdicts for finished generations, without a model.

Every input line is written again with `correct`, `score` and `reason`; a summary follows. Both are
null, and the line is not counted, where the grader returns None: it does not judge that line. With
--verdict_key the lines' own verdicts are kept as `expected` and compared: how many right answers
are accepted and wrong ones rejected, what accepting everything would get, where the two differ.

examples:
  echorl grade generations.jsonl --grader=countdown --out=graded.jsonl
  echorl grade outputs.jsonl --response_key=output --answer_key=gold --grader=my_rewards:judge
  echorl grade judged.jsonl --answer_key=gold --verdict_key=correct --out=compared.jsonl
"""

import argparse
from pathlib import Path

from echorl_jax.commands import number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("file", type=Path, metavar="FILE.jsonl", help="one object per line")
    parser.add_argument("--response_key", default="response", help="what was generated")
    parser.add_argument("--answer_key", help="the right answer (default: answer or ground_truth)")
    graders = "auto, math, choice, countdown or package.module:function"
    parser.add_argument("--grader", default="auto", help=graders)
    parser.add_argument("--verdict_key", help="true or false from another judge, to compare with")
    parser.add_argument("--workers", type=whole(), default=2, help="grading processes")
    parser.add_argument("--timeout_s", type=number, default=10.0, help="limit for one verdict")
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
        workers=arguments.workers,
        timeout_s=arguments.timeout_s,
    )
    print(summary)
    return 0
