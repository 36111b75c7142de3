"""Options: strict types, helpful errors, and no key that nobody reads."""

import ast
import dataclasses
from pathlib import Path

import pytest

from echorl_jax.config import Config, ConfigError
from echorl_jax.config_file import (
    default_config,
    describe_options,
    from_dict,
    load_config,
    to_dict,
)

ROOT = Path(__file__).parent.parent
COUNTDOWN = str(ROOT / "configs" / "countdown.py")


def test_defaults_survive_the_round_trip() -> None:
    assert from_dict(to_dict(Config())) == Config()
    assert from_dict(default_config().to_dict()) == Config()


def test_files_under_configs_load() -> None:
    for file in (ROOT / "configs").glob("*.py"):
        argument = ":qwen2.5-math-7b,grpo" if file.name == "paper.py" else ""
        assert load_config(f"{file}{argument}").steps > 0


def test_overrides_take_the_type_of_their_key() -> None:
    config = load_config(
        COUNTDOWN,
        {
            "steps": "7",
            "echo.enabled": "false",
            "echo.coef": "1",
            "echo.delimiter": "ids",
            "echo.delimiter_ids": "198,271",
            "echo.end_step": "none",
            "objective.epsilon_high": "0.28",
        },
    )
    assert config.steps == 7 and config.echo.enabled is False and config.echo.coef == 1.0
    assert config.echo.delimiter_ids == (198, 271) and config.echo.end_step is None
    assert config.objective.epsilon_high == 0.28


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("rollout.groupsize", "4", "did you mean config.rollout.group_size"),
        ("group_size", "4", "did you mean config.rollout.group_size"),
        ("ehco.coef", "4", "did you mean config.echo"),
        ("echo.select", "maxx", "did you mean max"),
        ("steps", "ten", "must be a whole number"),
        ("steps", "1.5", "must be a whole number"),
        ("echo.enabled", "yes", "must be true or false"),
        ("echo.coef", "small", "must be a number"),
        ("echo", "1", "is a section"),
        ("echo.enabled.x", "1", "has no keys"),
        ("echo.delimiter_ids", "1,x", "whole numbers separated by commas"),
        ("echo.delimiter_ids", "198", "exactly when echo.delimiter"),
        ("rollout.top_p", "1.5", "in (0, 1]"),
        ("rollout.group_size", "0", "at least 1"),
        ("objective.mini_batches", "5", "a divisor"),
        ("objective.expert_rows", "8", "below rollout.group_size"),
        ("objective.dual_clip", "0.5", "above 1"),
        ("objective.tis_cap", "-1", "above 0"),
        ("objective.overlong_buffer", "2.0", "in [0, 1]"),
        ("objective.epsilon_low", "-0.2", "at least 0"),
        ("objective.kl_coef", "-1", "at least 0"),
        ("objective.hint_steps", "-3", "at least 0"),
        ("mesh.data", "-1", "when another axis is -1"),
        ("data.eval", "", "0 without data.eval"),
    ],
)
def test_a_wrong_option_is_named(key: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(COUNTDOWN, {key: text})
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("config.stps = 1", "stps"),
        ("config.steps = 'many'", "steps"),
        ("config.echo.coef = None", "coef"),
        ("import nothing_like_this", "nothing_like_this"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from echorl_jax.config_file import default_config\n"
        f"def get_config():\n    config = default_config()\n    {text}\n    return config\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(str(file))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean countdown.py"):
        load_config(str(ROOT / "configs" / "countdwn.py"))


def test_every_option_has_a_meaning() -> None:
    options = list(describe_options())
    fields = [
        f"{section.name}.{field.name}" if dataclasses.is_dataclass(section.type) else section.name
        for section in dataclasses.fields(Config)
        for field in (
            dataclasses.fields(section.type)  # type: ignore[arg-type]
            if dataclasses.is_dataclass(section.type)
            else [section]
        )
    ]
    assert [key for key, _, _ in options] == fields
    assert all(meaning for _, _, meaning in options)


def test_every_option_is_read() -> None:
    read = set()
    for path in (ROOT / "echorl_jax").rglob("*.py"):
        if path.name not in ("config.py", "config_file.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    read.add(node.attr)
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    read.add(node.target.id)  # a setting of Objective, taken over by its name
    for key, _, _ in describe_options():
        assert key.rpartition(".")[2] in read, f"nobody reads config.{key}"
