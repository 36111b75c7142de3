"""Writes one self-contained HTML file for a training run: curves, samples, EchoClips, config.

examples:
  echorl report --workdir=runs/first
  echorl report --workdir=runs/first --compare=runs/plain --out=both.html
"""

import argparse
from pathlib import Path

from echorl_jax.commands import add_compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="the run")
    add_compare(parser, "drawn over it")
    out = "the file to write (default: WORKDIR/report.html)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)


def run(arguments: argparse.Namespace) -> int:
    """Writes the report and prints its path."""
    from echorl_jax.tools.report.page import write_report

    path = write_report(arguments.workdir, compare=tuple(arguments.compare), out=arguments.out)
    print(f"report: {path}")
    return 0
