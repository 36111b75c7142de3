"""Writes one self-contained HTML file for a training run: curves, samples, EchoClips, config.

examples:
  echorl report --workdir=runs/first
  echorl report --workdir=runs/first --compare=runs/plain --out=both.html
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

from echorl_jax.commands import add_compare, location
from echorl_jax.errors import UserError
from echorl_jax.remote import is_remote, local_run, upload_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    run = "the run, also s3:// or gs://"
    parser.add_argument("--workdir", required=True, type=location, metavar="DIR", help=run)
    add_compare(parser, "drawn over it")
    out = "the file to write (default: WORKDIR/report.html)"
    parser.add_argument("--out", type=location, metavar="FILE", help=out)


def run(arguments: argparse.Namespace) -> int:
    """Writes the report and prints its path."""
    from echorl_jax.tools.report.page import write_report

    if arguments.out is not None and is_remote(arguments.out):
        raise UserError(f"--out={arguments.out}: must be a local file")
    out = arguments.out and Path(arguments.out)
    with ExitStack() as copies:
        workdir, *compare = (
            copies.enter_context(local_run(place))
            for place in (arguments.workdir, *arguments.compare)
        )
        path = written = write_report(workdir, compare=tuple(compare), out=out)
        if is_remote(arguments.workdir) and out is None:
            written = f"{arguments.workdir.rstrip('/')}/{path.name}"
            upload_file(path, written)
    print(f"report: {written}")
    return 0
