"""The table of other projects' names: what it names exists, and the page in docs/ shows it."""

from pathlib import Path

import pytest

from echorl_jax.commands.options import add_arguments, run
from echorl_jax.config_file import describe_options
from echorl_jax.other_names import PROJECTS, other_names

ROOT = Path(__file__).parent.parent
SOURCES = "\n".join(file.read_text() for file in (ROOT / "echorl_jax").rglob("*.py"))


def test_every_name_is_of_a_known_project_and_stands_once():
    names = [(line.project, name) for line in other_names() for name in line.names]
    assert len(names) > 100 and len(set(names)) == len(names)
    assert {project for project, _ in names} == set(PROJECTS)
    assert all(line.key or line.note for line in other_names())


def test_every_key_option_and_metric_exists():
    keys = {key for key, _, _ in describe_options()}
    for line in other_names():
        if line.key.startswith("metric "):
            metric = line.key.removeprefix("metric ")
            # Times are written as time/PHASE_s.
            phase = metric.removeprefix("time/").removesuffix("_s")
            assert f'"{metric}"' in SOURCES or f'timed(seconds, "{phase}")' in SOURCES, line
        elif line.key.startswith("--"):
            assert f'"{line.key}"' in SOURCES, line
        else:
            assert line.key in keys | {""}, line


def test_keys_in_notes_exist():
    keys = {key for key, _, _ in describe_options()}
    sections = {key.split(".")[0] for key in keys if "." in key}
    for line in other_names():
        for word in line.note.replace(":", " ").replace(";", " ").replace(",", " ").split():
            section, dot, _ = word.partition(".")
            if dot and section in sections and word.count(".") == 1:
                known = word in keys or any(word in other.names for other in other_names())
                assert known, (line, word)


def test_the_page_holds_the_table():
    page = (ROOT / "docs" / "names.md").read_text()
    for project, title in PROJECTS.items():
        lines = [
            f"| {', '.join(f'`{name}`' for name in line.names)} | {ours(line.key)} | {line.note} |"
            for line in other_names()
            if line.project == project
        ]
        block = [f"## {title}", "", f"| {title} | here | |", "| --- | --- | --- |", *lines]
        assert "\n".join(block) in page


def ours(key: str) -> str:
    if key.startswith("metric "):
        return f"metric `{key.removeprefix('metric ')}`"
    return f"`{key}`" if key else "not here"


def test_options_prints_another_projects_names(capsys: pytest.CaptureFixture[str]):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["--from=verl", "ppo_epochs"])) == 0
    out = capsys.readouterr().out
    assert out == "actor_rollout_ref.actor.ppo_epochs\n    config.objective.epochs\n"
