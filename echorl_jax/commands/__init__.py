"""One thin module per command: ``add_arguments(parser)`` and ``run(arguments) -> exit code``.

Heavy imports are inside ``run``, so that ``--help`` is quick.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from echorl_jax.cluster import (
    Limits,
    Secret,
    assignment,
    find_place,
    follow_supervisor,
    supervise,
)
from echorl_jax.config import JSON_OBJECT, LARGEST, Bound, Config
from echorl_jax.errors import UserError
from echorl_jax.remote import is_remote

MODEL = "Hugging Face directory, repository id or builtin:countdown"
GRADERS = (
    "auto (default), math, choice, countdown, format, reduce, shapes, package.module:function or "
    "FILE.py:function; several as a list with weights, 'math@0.9, mine.py:format@0.1'"
)
DTYPES = ("bfloat16", "float32")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declares ``--config``; the command then also takes ``--config.KEY=VALUE``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a file under configs/")
    parser.set_defaults(overrides={})


def read_config(arguments: argparse.Namespace) -> Config:
    """The config of ``--config`` with its overrides."""
    from echorl_jax.config_file import load_config

    return load_config(arguments.config, arguments.overrides)


def add_compare(parser: argparse.ArgumentParser, use: str) -> None:
    """Declares ``--compare``, other runs for the report."""
    text = f"another run, {use}; may be repeated"
    parser.add_argument(
        "--compare", action="append", default=[], type=location, metavar="DIR", help=text
    )


def add_grader(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Declares the options of a grader."""
    parser.add_argument("--grader", default=default, help=GRADERS)
    kwargs = "keyword arguments of the functions, a JSON object"
    parser.add_argument("--grader_kwargs", type=bounded(JSON_OBJECT), help=kwargs)
    parser.add_argument(
        "--success_threshold",
        type=finite,
        help="scores from here on are right (default: the grader's verdict; of a plain score, 1)",
    )


def bounded(bound: Bound) -> Callable[[str], str]:
    """Makes the ``type`` of an option that is a text within a bound of the config's.

    >>> bounded(JSON_OBJECT)('{"tolerance": 0.1}')
    '{"tolerance": 0.1}'
    """

    def read(text: str) -> str:
        if not bound.holds(text):
            raise argparse.ArgumentTypeError(f"{text[:80]!r}: must be {bound.words}")
        return text

    return read


def location(text: str) -> str:
    """The ``type`` of an option that is a local path or an address such as ``s3://bucket/run``.

    >>> location("gs://bucket/run"), location("runs/first")
    ('gs://bucket/run', 'runs/first')
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text if is_remote(text) else str(Path(text).expanduser())


def whole(least: int = 0) -> Callable[[str], int]:
    """Makes the ``type`` of an option that is a whole number of at least ``least``.

    >>> whole(1)("12")
    12
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= LARGEST:
            raise argparse.ArgumentTypeError(
                f"{text[:80]!r}: must be a whole number from {least} to {LARGEST}"
            )
        return value

    return read


def whole_numbers(text: str) -> tuple[int, ...]:
    """The ``type`` of an option that is a list of whole numbers.

    >>> whole_numbers("198,271")
    (198, 271)
    """
    return tuple(map(whole(), text.split(",")))


def finite(text: str) -> float:
    """The ``type`` of an option that is a finite number.

    >>> finite("-1e-3")
    -0.001
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: must be a finite number")
    return value


def number(text: str) -> float:
    """The ``type`` of an option that is a finite number of at least 0."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: must be a finite number, 0 or above")
    return value


def join(config: Config, arguments: argparse.Namespace) -> int | None:
    """:func:`take_place` of a training run, whose processes must have the same config."""
    from echorl_jax.config_file import flatten, to_dict

    return take_place(
        arguments,
        facts={"--workdir": arguments.workdir, **flatten(to_dict(config), "config.")},
        limits=Limits(config.mesh.start_timeout_s, config.mesh.lost_after_s),
        directory=arguments.workdir,
    )


def take_place(
    arguments: argparse.Namespace, *, facts: Mapping[str, Any], limits: Limits, directory: str
) -> int | None:
    """Joins the other processes that run the same command.

    A single process continues at once. One of several starts the same command again as a training
    process and supervises it until it ends. The training process joins its peers through JAX.

    Args:
      arguments: of the command.
      facts: values that must be equal in all processes, besides the command and the packages.
      limits: times to wait for the others.
      directory: written by the processes; holds their secret unless ``ECHORL_SECRET`` is set.

    Returns:
      The exit code of a supervisor; None in a process that must do the work.

    Raises:
      UserError: the environment is contradictory, or the processes do not agree.
      RunStopped: a process did not start in time, or was lost.
    """
    given = assignment()
    if given is not None:
        follow_supervisor(given)
        from echorl_jax.parallel import join_processes

        join_processes(
            given.coordinator,
            processes=given.processes,
            process=given.process,
            local_devices=given.local_devices,
            start_timeout_s=given.start_timeout_s,
            lost_after_s=given.lost_after_s,
        )
        return None
    place = find_place(os.environ)
    if place is None:
        return None
    if is_remote(directory):
        raise UserError(
            f"{directory}: several processes write into one folder, which must be on a file system "
            "that all share, such as a mounted bucket; an address is for a run of one process"
        )
    return supervise(
        place,
        [sys.executable, "-m", "echorl_jax", *arguments.command_line],
        facts={**dict(_versions()), "command": arguments.command_line[0], **facts},
        limits=limits,
        secret=Secret.find(os.environ, Path(directory)),
    )


def _versions() -> Iterator[tuple[str, str]]:
    for package in ("echorl-jax", "jax", "jaxlib"):
        yield f"{package} version", metadata.version(package)
