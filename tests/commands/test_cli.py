"""The program as a user meets it: help, errors, exit codes."""

import argparse
import importlib
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from echorl_jax.cli import COMMANDS, config_overrides, run
from echorl_jax.commands import finite, location, number
from echorl_jax.errors import UserError


def echorl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "echorl_jax", *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_is_quick_and_needs_no_jax(arguments: list[str]) -> None:
    code = (
        "import sys; from echorl_jax.cli import run\n"
        "try: run(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, which other work on the machine does not change: 0.1 s. Importing JAX takes 2 s.
    assert after.ru_utime - before.ru_utime < 1.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "--config, --workdir"),
        (["train", "--config=c.py", "--workdir=w", "--colour=red"], "--colour"),
        (["train", "--config=no/such.py", "--workdir=w"], "no/such.py does not exist"),
        (["train", "--config=configs/countdown.py", "--workdir=w", "--config.stesp=1"], "steps"),
        (["grade", "no_such.jsonl"], "no_such.jsonl"),
        (["report", "--workdir=no_such_dir"], "no_such_dir"),
        (["convert", "--model=no_such_dir", "--out=x"], "no_such_dir"),
        (["analyze", "--workdir=no_such_dir"], "nothing to study"),
        (["analyze", "deletion", "--workdir=no_such_dir"], "--model is missing"),
        (["evaluate", "--model=no_such/dir/at/all", "--data=x.jsonl", "--out=y"], "no_such/dir"),
    ],
)
def test_bad_usage_is_an_error_of_one_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        run(arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_an_error_of_the_user_is_one_line_and_exit_code_2() -> None:
    done = echorl("trian")
    assert done.returncode == 2
    assert done.stderr == "echorl: unknown command 'trian'; did you mean train?\n"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e999", str(2**63), "9" * 5000, "x", ""])
def test_a_number_that_no_command_can_take_is_named(name: str, value: str) -> None:
    """Every option that is read as a number; the command itself never starts."""
    parser = argparse.ArgumentParser(prog="echorl", exit_on_error=False, add_help=False)
    importlib.import_module(f"echorl_jax.commands.{name}").add_arguments(parser)
    for action in parser._actions:
        reader = action.type
        large, any_sign = value == str(2**63), value in ("-1", str(2**63))
        allowed = (None, Path, location, *[number] * large, *[finite] * any_sign)
        if action.option_strings and reader not in allowed:
            with pytest.raises(argparse.ArgumentTypeError, match="whole number|finite number|JSON"):
                reader(value)  # type: ignore[operator]


def test_overrides() -> None:
    rest = ["--config.steps=3", "--config.echo.coef", "0.1", "--config.data.eval="]
    found = config_overrides(rest, takes_config=True)
    assert found == {"steps": "3", "echo.coef": "0.1", "data.eval": ""}
    with pytest.raises(UserError, match="needs a value"):
        config_overrides(["--config.steps"], takes_config=True)
    with pytest.raises(UserError, match="unknown argument"):
        config_overrides(["--config.steps=3"], takes_config=False)


def test_options_lists_keys_by_word() -> None:
    done = echorl("options", "echo.coef")
    assert done.returncode == 0 and done.stdout.startswith("--config.echo.coef=1e-3\n")


@pytest.mark.parametrize(
    ("code", "quiet"),
    [
        ("cli.run = lambda _: print('x' * 1_000_000, flush=True)", True),
        ("def raising(_): raise BrokenPipeError(32, 'another pipe')\ncli.run = raising", False),
    ],
)
def test_only_a_reader_that_has_enough_ends_a_command_quietly(code: str, quiet: bool) -> None:
    program = f"from echorl_jax import cli\n{code}\ncli.main([])"
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as done:
        assert done.stdout and done.stderr
        if quiet:
            done.stdout.close()
        told = done.stderr.read()
    assert done.returncode == 1
    assert (told == "") if quiet else ("BrokenPipeError" in told)


def test_a_crash_in_native_code_says_where_python_was() -> None:
    code = (
        "import faulthandler\nfrom echorl_jax import cli\n"
        "cli.run = lambda _: faulthandler._sigsegv()\ncli.main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr and "in main" in done.stderr
