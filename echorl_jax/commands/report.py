"""Writes one self-contained HTML file for a training run: curves, samples, EchoClips, config.

examples:
  echorl report --workdir=runs/first
  echorl report --workdir=runs/first --compare=runs/plain --out=both.html
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="the run")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="another run, drawn over it; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write it (default: WORKDIR/report.html)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the report and says where."""
    from echorl_jax.tools.report.page import write_report

    path = write_report(arguments.workdir, compare=tuple(arguments.compare), out=arguments.out)
    print(f"report: {path}")
    return 0
