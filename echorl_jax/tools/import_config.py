"""Writes a config for `echorl train` from a run script or a config of verl, or a config of TRL.

A setting that the file leaves out has that project's default, not ours, so that the run means the
same. Every setting ends in the receipt: taken over, changed in meaning, or without a counterpart.
"""

import ast
import dataclasses
import itertools
import json
import operator
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from echorl_jax.choices import Aggregation
from echorl_jax.config import ConfigError
from echorl_jax.config_file import flatten, from_dict
from echorl_jax.core import OBJECTIVES, load_objective
from echorl_jax.errors import UserError, one_line
from echorl_jax.other_names import PROJECTS, OtherName, other_names

# What the projects do where a file says nothing, by the names of our table.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "trl": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-6,
        "num_generations": 8,
        "max_completion_length": 256,
        "beta": 0.0,
        "epsilon": 0.2,
        "loss_type": "dapo",
        "num_iterations": 1,
        "temperature": 1.0,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "lr_scheduler_type": "linear",
        "num_train_epochs": 3.0,
    },
    "verl": {
        "data.train_batch_size": 1024,
        "data.max_prompt_length": 512,
        "data.max_response_length": 512,
        "actor_rollout_ref.actor.optim.lr": 1e-6,
        "actor_rollout_ref.actor.optim.weight_decay": 0.01,
        "actor_rollout_ref.actor.grad_clip": 1.0,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 256,
        "actor_rollout_ref.actor.clip_ratio": 0.2,
        "actor_rollout_ref.actor.clip_ratio_c": 3.0,
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
        "actor_rollout_ref.actor.kl_loss_coef": 0.001,
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.rollout.n": 1,
        "algorithm.adv_estimator": "gae",
        "trainer.total_epochs": 30,
        "trainer.save_freq": -1,
        "trainer.test_freq": -1,
    },
}
_ACTOR = "actor_rollout_ref.actor."
_VARIABLE = re.compile(
    r"\$(?:(?P<plain>[A-Za-z_]\w*)|\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^{}]*))?\})"
)
_ARITHMETIC = re.compile(r"\$\(\((.*?)\)\)(?!\))")
# Defaults within defaults that are replaced, and characters of a line that variables make, at most.
_NESTED = 8
_LONGEST = 10**6
# Our keys that follow from the hardware here and are not taken over.
_BY_ITSELF = {"rollout.slots", "mesh.tensor", "mesh.fsdp"}
_ESTIMATORS = {
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
}
_KL = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"} | {k: k for k in ("k1", "k2", "k3", "abs")}
_LOSS_MODES = {"geo_mean": "gmpo"}
_LOSS_TYPES = {
    "grpo": {"objective.aggregation": "seq-mean-token-mean"},
    "bnpo": {"objective.aggregation": "token-mean"},
    "dapo": {"objective.aggregation": "token-mean"},
    "dr_grpo": {"objective.aggregation": "seq-mean-token-sum-norm"},
    "cispo": {"objective.name": "cispo"},
    "sapo": {"objective.name": "sapo"},
}


# A value and all settings to ours.
Rule = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


class Refused(ValueError):
    """A value that has no counterpart; says why."""


class Imported(NamedTuple):
    """The settings of a file in our keys, and the lines of the receipt."""

    project: str
    values: dict[str, Any]  # our keys
    taken: list[str]  # lines of the receipt
    changed: list[str]
    missing: list[str]


def import_file(file: Path) -> Imported:
    """Reads a file and maps its settings.

    Raises:
      UserError: the file cannot be read, or holds no settings of a known project.
    """
    settings = read_settings(file)
    project = _project(settings, file)
    found = Imported(project, {}, [], [], [])
    known = {name: line for line in other_names() if line.project == project for name in line.names}
    given = {**DEFAULTS[project], **_with_objects(settings)}
    for name, value in given.items():
        default = name in DEFAULTS[project] and name not in settings
        origin = f" (default of {PROJECTS[project]})" if default else ""
        shown = f"{name} = {' '.join(str(value).split()):.80}{origin}"
        line = known.get(name)
        if line is None:
            found.missing.append(f"{shown}: not known here")
        elif not line.key or line.key.startswith("--") or line.key in _BY_ITSELF:
            found.missing.append(f"{shown}: {line.meaning}")
        else:
            _take(found, given, name, shown, line)
    _drop_unused(found)
    _drop_invalid(found)
    return found


def _with_objects(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``chat_template_kwargs.enable_thinking`` and the like joined to the object they are of."""
    joined: dict[str, Any] = {}
    members: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        whole, found, member = name.partition("chat_template_kwargs.")
        if found:
            members.setdefault(f"{whole}chat_template_kwargs", {})[member] = _plain(value)
        else:
            joined[name] = value
    return members | joined


def _drop_invalid(found: Imported) -> None:
    """Takes out values that no config may have, alone or beside the others, into the receipt."""
    while True:
        try:
            from_dict(_nested(found.values))
            return
        except ConfigError as error:
            named = re.match(r"config\.([\w.]+) = ", str(error))
            if named is None or named[1] not in found.values:
                raise
            del found.values[named[1]]
            found.missing.append(str(error))


def _drop_unused(found: Imported) -> None:
    """Takes out settings that the objective has no use for: it has its own way."""
    name = found.values.get("objective.name", "grpo")
    fields = {field.name for field in dataclasses.fields(OBJECTIVES[name])}
    for key, value in list(found.values.items()):
        section, _, setting = key.partition(".")
        if section != "objective" or setting not in fields:
            continue
        try:
            load_objective(name, **{setting: value})
        except ValueError as error:
            # An estimator alone does nothing, but beside its coefficient it does.
            if setting != "kl_estimator":
                del found.values[key]
                found.missing.append(f"{key} = {value!r}: {error}")


def _take(
    found: Imported, given: Mapping[str, Any], name: str, shown: str, line: OtherName
) -> None:
    """Adds a setting's values and its line of the receipt."""
    value, key, note = given[name], line.key, line.note
    rule = _RULES.get(name)
    try:
        values = {key: _plain(value)} if rule is None else rule(_plain(value), given)
    except (Refused, ValueError, TypeError, ZeroDivisionError) as error:
        found.missing.append(f"{shown}: {error}")
        return
    found.values.update(values)
    ours = ", ".join(f"{key} = {value!r}" for key, value in values.items()) or "nothing to set"
    receipt = found.changed if note else found.taken
    receipt.append(f"{shown}: {ours}" + (f" ({note})" if note else ""))


def config_text(found: Imported, file: Path) -> str:
    """The config as a Python file."""
    lines = [f"# From {file.name!r} ({PROJECTS[found.project]}), by `echorl import`.", ""]
    lines += ["from ml_collections import ConfigDict", ""]
    lines += ["from echorl_jax.config_file import default_config", "", ""]
    lines += ["def get_config() -> ConfigDict:", "    config = default_config()"]
    lines += [f"    config.{key} = {value!r}" for key, value in sorted(found.values.items())]
    lines += ["    # EchoRL on top; False is the run as it was.", "    config.echo.enabled = True"]
    return "\n".join([*lines, "    return config", ""])


def receipt_text(found: Imported) -> str:
    """All settings by what became of them."""
    parts = (
        ("taken over", found.taken),
        ("taken over, but read how it differs", found.changed),
        ("not taken over", found.missing),
    )
    return "\n".join(
        f"{title} ({len(lines)}):\n" + "".join(f"  {line}\n" for line in sorted(lines))
        for title, lines in parts
    )


def read_settings(file: Path) -> dict[str, Any]:
    """The settings of a YAML or JSON file with dotted names, or of the command in a shell script.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix in (".yaml", ".yml", ".json"):
            tree = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
            if not isinstance(tree, dict):
                raise ValueError("no settings by name")
            return flatten({str(name): value for name, value in tree.items()})
        return _shell_settings(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: {one_line(error)}") from None


def _shell_settings(text: str) -> dict[str, Any]:
    """``key.word=value``, ``--key=value`` and ``--key value`` of all commands and arrays.

    Variables that the script sets are replaced, with their defaults (``${NAME:-x}``), and so is
    whole-number arithmetic (``$((2 * n))``); other variables stay as they are.
    """
    variables: dict[str, str] = {}
    settings: dict[str, Any] = {}
    for words in _commands(text, variables):
        option, assigning = "", True
        for word in words:
            name, equals, value = word.lstrip("+").partition("=")
            if option and not word.startswith("-"):
                settings[option], option = word, ""
            elif word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                name = name.replace("-", "_")
                settings[name] = value if equals else "true"
                option = "" if equals else name
            elif equals and re.fullmatch(r"[A-Za-z_][\w]*(\.[\w]+)+", name):
                settings[name] = value
            elif equals and assigning and name.isidentifier():
                variables[name] = value
                continue
            assigning = False
    return settings


def _commands(text: str, variables: Mapping[str, str]) -> Iterator[list[str]]:
    """The words of each command, with variables replaced as they are before its line."""
    pending = ""
    for line in text.replace("\\\n", " ").splitlines():
        pending = f"{pending}\n{line}" if pending else line
        expanded = _expanded(pending.removeprefix("export "), variables)
        lexer = shlex.shlex(expanded, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            continue  # a quotation goes on in the next line
        pending = ""
        for separator, command in itertools.groupby(words, lambda word: not word.strip(";&|")):
            if not separator:
                yield list(command)


def _expanded(line: str, variables: Mapping[str, str]) -> str:
    """The line with known variables and whole-number arithmetic replaced, innermost first."""

    def variable(match: re.Match[str]) -> str:
        name, default = match["plain"] or match["name"], match["default"]
        unknown = f"${name}" if default is None else default.strip("\"'")
        return variables.get(name, os.environ.get(name, unknown) if name == "HOME" else unknown)

    for _ in range(_NESTED):
        line, before = _VARIABLE.sub(variable, line), line
        if len(line) > _LONGEST:
            raise ValueError(f"variables make a line of more than {_LONGEST} characters")
        if line == before:
            break
    return _ARITHMETIC.sub(lambda match: _sum_text(match[1], variables), line)


def _sum_text(text: str, variables: Mapping[str, str]) -> str:
    """The value of a whole-number expression; the text itself if it is none."""
    operators: dict[type, Callable[[int, int], int]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.floordiv,
    }

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return int(variables[node.id])
        raise ValueError("not a whole number")

    try:
        return str(value(ast.parse(text.strip(), mode="eval").body))
    except (ValueError, KeyError, SyntaxError, ZeroDivisionError, RecursionError):
        return text


def _project(settings: Mapping[str, Any], file: Path) -> str:
    """The project whose names the file holds."""
    counts = {
        project: sum(
            name in settings
            for line in other_names()
            if line.project == project
            for name in line.names
        )
        for project in DEFAULTS
    }
    best = max(counts, key=counts.__getitem__)
    if counts[best] < 2:
        known = " and ".join(PROJECTS[project] for project in DEFAULTS)
        raise UserError(f"{file}: no settings of {known} found in it")
    return best


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def _plain(value: Any) -> Any:
    """Text of a command line as the number, truth value or text that it is."""
    if not isinstance(value, str):
        return value
    lowered = value.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def _listed(value: Any) -> str:
    """Several files or names, given as a list or as the text of one, with commas between."""
    if isinstance(value, str):
        return ",".join(part.strip(" '\"") for part in value.strip("[] ").split(","))
    return ",".join(map(str, value))


def _get(given: Mapping[str, Any], name: str) -> Any:
    return _plain(given[name]) if name in given else None


def _steps(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if value < 1:
        return {}
    return {"steps": value}


def _epochs(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Both projects prefer a number of steps, if there is one."""
    steps = _get(given, "max_steps") or _get(given, "trainer.total_training_steps")
    return {"epochs": value} if not isinstance(steps, int) or steps < 1 else {}


def _both_bounds(high: str) -> Rule:
    """A clip range, and its upper bound unless the setting ``high`` gives that."""

    def rule(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        upper = _get(given, high)
        return {
            "objective.epsilon_low": value,
            "objective.epsilon_high": value if upper is None else upper,
        }

    return rule


def _every(key: str) -> Rule:
    return lambda value, given: {key: max(0, value)}


def _chosen(key: str, names: Mapping[Any, Any]) -> Rule:
    """A value by its name there; None sets nothing."""

    def rule(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        if value not in names:
            raise Refused("there is no such thing here")
        return {} if names[value] is None else {key: names[value]}

    return rule


def _estimator(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    name = _ESTIMATORS.get(value, value)
    if name not in OBJECTIVES:
        raise Refused(f"there is no {value!r} here; set config.objective.name")
    mode = str(_get(given, f"{_ACTOR}policy_loss.loss_mode") or "vanilla").replace("-", "_")
    mode = _LOSS_MODES.get(mode, mode)
    if name == "grpo" and mode in OBJECTIVES:
        name = mode
    elif name == "grpo" and _get(given, "algorithm.norm_adv_by_std_in_grpo") is False:
        name = "dr_grpo"
    return {"objective.name": name}


def _mini_batches(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    prompts = _get(given, "data.train_batch_size")
    if prompts % value:
        raise Refused(f"a step of {prompts} prompts is no whole number of mini-batches")
    return {"objective.mini_batches": prompts // value}


def _kl_coef(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"objective.kl_coef": value if _get(given, f"{_ACTOR}use_kl_loss") else 0.0}


def _kl_estimator(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if not _get(given, f"{_ACTOR}use_kl_loss"):
        return {}
    return _chosen("objective.kl_estimator", _KL)(value, given)


def _micro_batch(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    tokens = _get(given, "data.max_prompt_length") + _get(given, "data.max_response_length")
    return {"optim.micro_batch_tokens": value * tokens}


def _overlong(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"objective.overlong_buffer": value / _get(given, "data.max_response_length")}


def _verl_grader(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    function = given.get("custom_reward_function.name", "compute_score")
    return {"data.grader": f"{value}:{function}"}


def _trl_graders(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Functions by their dotted names, each with its weight; TRL's accuracy is our math."""
    names = _listed(value).split(",")
    weights = _listed(given.get("reward_weights") or [1.0] * len(names)).split(",")
    if len(weights) != len(names):
        raise Refused(f"{len(names)} functions but {len(weights)} weights")
    entries = []
    for name, weight in zip(names, weights, strict=True):
        module, _, function = name.rpartition(".")
        if not module and name != "accuracy_reward":
            raise Refused("set config.data.grader, see docs/graders.md")
        path = f"{module}:{function}" if module else "math"
        entries.append(path if float(weight) == 1 else f"{path}@{weight}")
    return {"data.grader": ", ".join(entries)}


def _trl_prompts(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"rollout.prompts_per_step": _whole(value, _get(given, "num_generations"))}


def _trl_accumulation(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of one device; each generation is for so many of TRL's batches."""
    if "generation_batch_size" in given:
        return {}
    batches = _get(given, "steps_per_generation") or value
    rows = batches * _get(given, "per_device_train_batch_size")
    return {"rollout.prompts_per_step": _whole(rows, _get(given, "num_generations"))}


def _trl_updates(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    accumulated = _get(given, "gradient_accumulation_steps")
    if value % accumulated:
        raise Refused(f"{value} batches are no whole number of updates of {accumulated}")
    return {"objective.mini_batches": value // accumulated}


def _whole(rows: int, group: int) -> int:
    if rows % group:
        raise Refused(f"{rows} rows are no whole number of groups of {group}")
    return rows // group


def _loss_type(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if value not in _LOSS_TYPES:
        raise Refused("there is no such loss here")
    values = {"objective.name": "grpo", **_LOSS_TYPES[value]}
    scaled = _get(given, "scale_rewards")
    if values["objective.name"] == "grpo" and scaled in (False, "none"):
        values["objective.name"] = "dr_grpo"
    if _get(given, "importance_sampling_level") == "sequence":
        values["objective.name"] = "gspo"
    return values


def _scaled(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"objective.std_of": "batch"} if value == "batch" else {}


def _nothing(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """For settings that another one's rule reads."""
    return {}


def _warmup_ratio(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A number of steps is preferred."""
    steps = _get(given, "warmup_steps") or _get(given, f"{_ACTOR}optim.lr_warmup_steps")
    return {"optim.warmup_ratio": value} if not isinstance(steps, int) or steps < 1 else {}


def _data_source(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"data.train": f"hf:{value}?split={given.get('dataset_train_split', 'train')}"}


def _trackers(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The trackers by their names, with the project that another setting names."""
    project = str(given.get("wandb_project") or given.get("trainer.project_name") or "echorl")
    names = {"wandb", "mlflow", "tensorboard"} if value == "all" else _listed(value).split(",")
    keys = {"wandb": "log.wandb_project", "mlflow": "log.mlflow_experiment"}
    return {key: project for name, key in keys.items() if name in names} | {
        "log.tensorboard": "tensorboard" in names
    }


def _project_name(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read by the rule of the trackers; without a list of them verl has W&B."""
    return {} if "trainer.logger" in given else {"log.wandb_project": str(value)}


def _push(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if not _get(given, "push_to_hub"):
        return {}
    if not given.get("hub_model_id"):
        raise Refused("set config.checkpoint.push to OWNER/NAME; hub_model_id is not given")
    return {"checkpoint.push": str(given["hub_model_id"])}


def _template_kwargs(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"data.template_kwargs": value if isinstance(value, str) else json.dumps(value)}


_FILES = {"data.train_files": "data.train", "data.val_files": "data.eval"}
_TYPES = {"bfloat16": "bfloat16", "float32": "float32", "auto": None, True: "bfloat16", False: None}
# How values are converted, where the name alone does not say it.
_RULES: dict[str, Rule] = {
    # verl
    **{name: lambda v, g, key=key: {key: _listed(v)} for name, key in _FILES.items()},
    "trainer.total_training_steps": _steps,
    "trainer.total_epochs": _epochs,
    "trainer.save_freq": _every("checkpoint.every"),
    "trainer.test_freq": _every("eval.every"),
    "trainer.logger": _trackers,
    "trainer.project_name": _project_name,
    "data.apply_chat_template_kwargs": _template_kwargs,
    "trainer.resume_mode": _chosen("checkpoint.resume", {"auto": "auto", "disable": "none"}),
    "custom_reward_function.path": _verl_grader,
    "custom_reward_function.name": _nothing,
    "reward_model.overlong_buffer.len": _overlong,
    **dict.fromkeys(
        (f"{_ACTOR}optim.warmup_style", f"{_ACTOR}optim.lr_scheduler_type"),
        _chosen("optim.schedule", {kind: kind for kind in ("constant", "cosine")}),
    ),
    f"{_ACTOR}optim.lr_warmup_steps": _every("optim.warmup_steps"),
    f"{_ACTOR}optim.lr_warmup_steps_ratio": _warmup_ratio,
    "algorithm.adv_estimator": _estimator,
    "algorithm.norm_adv_by_std_in_grpo": _nothing,
    f"{_ACTOR}policy_loss.loss_mode": _nothing,
    f"{_ACTOR}ppo_mini_batch_size": _mini_batches,
    f"{_ACTOR}ppo_micro_batch_size_per_gpu": _micro_batch,
    f"{_ACTOR}clip_ratio": _both_bounds(f"{_ACTOR}clip_ratio_high"),
    f"{_ACTOR}loss_agg_mode": _chosen(
        "objective.aggregation", {name: name for name in get_args(Aggregation)}
    ),
    f"{_ACTOR}use_kl_loss": _nothing,
    f"{_ACTOR}kl_loss_coef": _kl_coef,
    f"{_ACTOR}kl_loss_type": _kl_estimator,
    "actor_rollout_ref.rollout.top_k": lambda v, g: {"rollout.top_k": max(0, v)},
    "actor_rollout_ref.model.enable_gradient_checkpointing": _chosen(
        "model.remat", {True: "layer", False: "none"}
    ),
    "actor_rollout_ref.model.target_modules": lambda v, g: {"lora.targets": _listed(v)},
    # TRL
    **dict.fromkeys(("dtype", "torch_dtype", "bf16"), _chosen("model.dtype", _TYPES)),
    "gradient_checkpointing": _chosen("model.remat", {True: "layer", False: "none"}),
    "max_steps": _steps,
    "num_train_epochs": _epochs,
    "dataset_name": _data_source,
    "reward_funcs": _trl_graders,
    "reward_weights": _nothing,
    "multi_objective_aggregation": _chosen(
        "objective.normalise_each", {"sum_then_normalize": None, "normalize_then_sum": True}
    ),
    "generation_batch_size": _trl_prompts,
    "gradient_accumulation_steps": _trl_accumulation,
    "per_device_train_batch_size": _nothing,
    "steps_per_generation": _trl_updates,
    "epsilon": _both_bounds("epsilon_high"),
    "loss_type": _loss_type,
    "importance_sampling_level": _nothing,
    "scale_rewards": _scaled,
    "warmup_ratio": _warmup_ratio,
    "lr_scheduler_type": _chosen(
        "optim.schedule",
        {kind: kind for kind in ("constant", "linear", "cosine")}
        | {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"}
        | {"warmup_stable_decay": "wsd"},
    ),
    "report_to": _trackers,
    "push_to_hub": _push,
    "hub_model_id": _push,
    "chat_template_kwargs": _template_kwargs,
    "lora_target_modules": lambda v, g: {"lora.targets": _listed(v)},
    "use_peft": _nothing,
    "resume_from_checkpoint": _nothing,
    "log_completions": _nothing,
    "vllm_importance_sampling_correction": _nothing,
    "vllm_importance_sampling_cap": lambda v, g: {
        "objective.old_logprobs": "trainer",
        "objective.tis_cap": v,
    },
}
