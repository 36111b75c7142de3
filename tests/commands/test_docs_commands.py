"""The `echorl` commands in README and docs name options, keys and configs that exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from echorl_jax.cli import COMMANDS, config_overrides
from echorl_jax.config_file import describe_options, load_config

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:bash)?\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    echorl .*(\n {6,}.*)*", re.MULTILINE)
INLINE = re.compile(r"`(echorl [a-z]+ [^`]*=[^`]*)`")
KEYS = {key for key, _, _ in describe_options()}


def commands() -> list[tuple[str, str]]:
    """Each command with the name of its page; continued lines are joined."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        blocks = [match["text"] for match in BLOCK.finditer(text)]
        blocks += [match[0] for match in INDENTED.finditer(text)]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        lines += [" ".join(match[1].split()) for match in INLINE.finditer(text)]
        for line in lines:
            if command := re.search(r"\bechorl ([a-z]+ .*)", line):
                if command[1].split()[0] in COMMANDS:
                    found.append((page.name, command[1]))
    return found


def test_many_commands_are_found() -> None:
    pages = [page for page, _ in commands()]
    assert len(pages) > 30 and {"guide.md", "launch.md", "data.md"} <= set(pages)


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_a_documented_command_has_known_options_and_keys(page: str, command: str) -> None:
    name, *words = shlex.split(command, comments=True)
    parser = argparse.ArgumentParser(prog=name, exit_on_error=False, allow_abbrev=False)
    importlib.import_module(f"echorl_jax.commands.{name}").add_arguments(parser)
    for action in parser._actions:
        action.required = False  # a sentence may leave some out
    known, rest = parser.parse_known_args([word for word in words if word != "..."])
    overrides = config_overrides(rest, takes_config="config" in vars(known))
    assert not overrides.keys() - KEYS
    file = getattr(known, "config", None)
    if file and Path(file.partition(":")[0]).exists() and "METHOD" not in file:
        load_config(str(ROOT / file), overrides)
