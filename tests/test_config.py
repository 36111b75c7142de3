"""Options: strict types, helpful errors, and no key without effect."""

import ast
import contextlib
import dataclasses
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
        ("max_steps", "4", "a name in TRL; config.steps"),
        ("loss_type", "grpo", "a name in TRL; config.objective.aggregation: grpo: seq-mean"),
        ("rollout.n", "4", "a name in verl; config.rollout.group_size"),
        ("repetition_penalty", "2", "a name in TRL; not here: the trainer would compute"),
        ("ppo", "4", "and none is like it"),
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
        ("objective.entropy_kappa", "0.5", "at least 1"),
        ("objective.overlong_buffer", "2.0", "in [0, 1]"),
        ("objective.epsilon_low", "-0.2", "at least 0"),
        ("objective.kl_coef", "-1", "at least 0"),
        ("objective.hint_steps", "-3", "at least 0"),
        ("objective.mini_batches", "0", "at least 1"),
        ("objective.expert_rows", "-1", "None or at least 0"),
        ("eval.temperature", "-1", "0 or at least 1e-30"),
        ("optim.beta2", "1", "in [0, 1)"),
        ("mesh.tensor", "0", "-1 or at least 1"),
        ("echo.threshold", "1", "in (0, 1)"),
        ("data.retire_above", "0", "in (0, 1]"),
        ("mesh.data", "-1", "when another axis is -1"),
        ("data.eval", "", "0 without data.eval"),
        ("seed", str(2**63), "a whole number of at most 2147483647"),
        ("steps", "9" * 5000, "a whole number of at most"),
        ("rollout.temperature", "inf", "a number, and finite"),
        ("rollout.temperature", "1e-40", "at least 1e-30"),
        ("eval.temperature", "nan", "a number, and finite"),
        ("optim.learning_rate", "1e999", "a number, and finite"),
        ("objective.tis_cap", "infinity", "a number, and finite"),
        ("log.profile_steps", "--5", "whole numbers separated by commas"),
        ("log.profile_steps", "3,-5", "steps from 1 on"),
        ("log.profile_steps", "\u00b2", "whole numbers separated by commas"),
        ("echo.delimiter_ids", f"1,{2**40}", "of at most 2147483647"),
        ("checkpoint.resume", "9" * 30, "the step of a checkpoint"),
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
        ("return {'steps': 3}", "get_config returned dict"),
        ("return None", "get_config returned NoneType"),
        ("config.echo.coef = float('nan')", "a number, and finite"),
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


def test_a_config_of_this_package_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/countdown.py") == load_config(COUNTDOWN)
    with pytest.raises(ConfigError, match="config file configs/none_such.py does not exist"):
        load_config("configs/none_such.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "countdown.py").write_text(
        "from echorl_jax.config_file import default_config as get_config\n"
    )
    assert load_config("configs/countdown.py") == Config()  # a file that is there comes first


def test_a_missing_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean countdown.py"):
        load_config(str(ROOT / "configs" / "countdwn.py"))


KEYS = [key for key, _, _ in describe_options()] + ["echo", "", ".", "steps.x", "data..train"]
numbers = st.integers() | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), numbers.map(str) | st.text(max_size=12), max_size=3))
def test_any_override_is_read_or_named(overrides: dict[str, str]) -> None:
    with contextlib.suppress(ConfigError):
        config = load_config(COUNTDOWN, overrides)
        assert from_dict(to_dict(config)) == config
        jax.random.key(config.seed)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KEYS), values, st.text(max_size=300))
def test_any_saved_config_and_any_file_name_is_read_or_named(
    key: str, value: object, name: str
) -> None:
    *section, last = key.split(".")
    with contextlib.suppress(ConfigError):
        from_dict({section[0]: {last: value}} if section else {last: value})
    with contextlib.suppress(ConfigError):
        load_config(name)


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


SECTIONS = {field.name: field.type for field in dataclasses.fields(Config)}
TYPES = {kind.__name__: name for name, kind in SECTIONS.items() if dataclasses.is_dataclass(kind)}


def last_name(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def section_of(node: ast.AST, names: dict[str, str]) -> str:
    """The section that an expression stands for; an Objective has the settings of its section."""
    if isinstance(node, ast.Attribute) and last_name(node.value) == "config":
        return node.attr
    if last_name(node) in ("config", "objective"):
        return last_name(node)
    return names.get(last_name(node), "") if isinstance(node, ast.Name) else ""


def local_names(function: ast.FunctionDef) -> dict[str, str]:
    """The sections of ``sizes = config.mesh``, ``echo: EchoConfig`` and the like."""
    names = {}
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and last_name(node.annotation) in TYPES:
            names[node.arg] = TYPES[last_name(node.annotation)]
        elif isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            parts = zip(target.elts, value.elts, strict=True) if both else [(target, value)]
            names |= {last_name(name): section_of(part, {}) for name, part in parts}
    return names


def test_every_option_is_read() -> None:
    read = set()
    for path in (ROOT / "echorl_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.name not in ("config.py", "config_file.py"):
            for function in (f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)):
                names = local_names(function)
                for node in (n for n in ast.walk(function) if isinstance(n, ast.Attribute)):
                    section = section_of(node.value, names)
                    read.add(f"{section}.{node.attr}".removeprefix("config."))
    unread = [key for key, _, _ in describe_options() if key not in read]
    assert not unread, f"no code reads {unread}"


def test_muon_needs_whole_matrices() -> None:
    with pytest.raises(ConfigError, match="optim.optimizer = 'muon': must be adamw with adapters"):
        load_config(COUNTDOWN, {"optim.optimizer": "muon", "lora.rank": "4"})
