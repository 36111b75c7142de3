"""The ``echorl`` program: finds the command, turns errors into one line and an exit code.

Exit codes: 0 done, 2 bad usage, config or input (one line says which), 1 anything else.
"""

import argparse
import contextlib
import faulthandler
import importlib
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from echorl_jax import __version__, xla
from echorl_jax.cluster.wire import assignment, tell
from echorl_jax.errors import (
    STORAGE,
    RunStopped,
    UserError,
    nearest,
    one_line,
    plain_line,
)

COMMANDS = {
    "quickstart": "trains a tiny model on CPU, with nothing to download or to set",
    "train": "reinforcement learning with verifiable rewards, EchoRL on top; resumes by itself",
    "sft": "supervised training on expert trajectories, or from scratch",
    "evaluate": "pass@1, avg@k and pass@k of a model over benchmark files",
    "grade": "verdicts for finished generations, without a model",
    "check": "data, gold answers and prompt lengths of a config, before any accelerator time",
    "plan": "memory per chip and least step time of a config, compiled ahead; no TPU needed",
    "convert": "Hugging Face directory to Orbax checkpoint and back; exports a run's checkpoint",
    "analyze": "the paper's studies: entropy, step deletion, collapse, entropy law, clips",
    "replay": "computes a dumped update again, such as one whose gradient was not finite",
    "report": "one self-contained HTML file for a training run",
    "import": "a config from a run script or config of verl or TRL, with a receipt",
    "options": "every config key with its default and meaning",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits."""
    xla.set_flags()
    # Graders and objectives by import path are found in the current folder, as under `python -m`.
    # Last, so that a file there hides no library.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    if sys.__stderr__:  # a crash in native code then says where Python was
        faulthandler.enable(sys.__stderr__)
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a full disk shows here, and not after the last line of this program
        sys.exit(code)
    except UserError as error:
        _fail(2, str(error))
    except RunStopped as error:
        _fail(1, str(error))
    except KeyboardInterrupt:
        _fail(130, "interrupted; the last checkpoint stays")
    except Exception as error:
        _tell_of_file(error)
        if assignment() is None:
            raise
        traceback.print_exc()
        # The runtime's error is most often a consequence of the end of another process.
        _fail(1, one_line(error), certain="Runtime" not in type(error).__name__)


def _tell_of_file(error: Exception) -> None:
    """Exits with one line for an error of a file; quietly if the output was closed."""
    if isinstance(error, BrokenPipeError) and _output_is_closed():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if isinstance(error, OSError) and error.filename is not None:
        _fail(1, f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in STORAGE:  # a write names no file
        _fail(1, f"a file cannot be written: {error.strerror}")


def _output_is_closed() -> bool:
    """True if standard output has no reader any more; a broken pipe may be another one."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _fail(code: int, line: str, *, certain: bool = True) -> NoReturn:
    """Prints the line and exits; under a supervisor, hands the line to it instead."""
    line = plain_line(line, most=4000)
    if tell(line, certain=certain):
        _leave(code)
    print(f"echorl: {line}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exits at once.

    An orderly exit waits for threads: Orbax's wait minutes for a checkpoint that failed, and JAX
    waits for the other processes.
    """
    with contextlib.suppress(OSError):  # the output has no reader, or its disk is full
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(argv: list[str]) -> int:
    """Parses and calls; returns the exit code.

    Raises:
      UserError: unknown command or option, or what the command itself reports.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"echorl {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        near = nearest(argv[0], COMMANDS)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {argv[0]!r}; {hint}")
    command = importlib.import_module(f"echorl_jax.commands.{argv[0]}")
    parser = _Parser(
        prog=f"echorl {argv[0]}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    known, rest = parser.parse_known_args(argv[1:])
    overrides = config_overrides(rest, takes_config="config" in vars(known))
    if overrides:
        known.overrides = overrides
    known.command_line = argv
    return command.run(known) or 0


def config_overrides(rest: list[str], *, takes_config: bool) -> dict[str, str]:
    """``["--config.steps=3", "--config.seed", "1"]`` as ``{"steps": "3", "seed": "1"}``.

    Raises:
      UserError: anything else on the line.
    """
    overrides, words = {}, iter(rest)
    for word in words:
        if not (takes_config and word.startswith("--config.")):
            raise UserError(f"unknown argument {word!r}")
        key, equals, value = word.removeprefix("--config.").partition("=")
        text = value if equals else next(words, None)
        if text is None or (not equals and text.startswith("--")):
            raise UserError(f"--config.{key} needs a value: --config.{key}=VALUE")
        overrides[key] = text
    return overrides


def _overview() -> str:
    lines = [f"  {name:<10} {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: echorl COMMAND [options]      (echorl COMMAND --help explains each)",
            "",
            "EchoRL in JAX: reinforcement learning that keeps learning from solved prompts.",
            "",
            *lines,
            "",
            "First run, a few minutes on a laptop CPU:",
            "  echorl quickstart",
        ]
    )
