"""The model card of an export: what was trained, on what, how well it did, and how to repeat it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from echorl_jax.config import Config
from echorl_jax.config_file import flatten, to_dict
from echorl_jax.files import read_json, read_steps, replace_text

CARD = "README.md"


def write_card(directory: Path, workdir: Path, config: Config, step: int, *, base: str) -> None:
    """Writes ``README.md`` into an exported directory.

    Args:
      directory: of a model, or of an adapter.
      workdir: of the run, whose metrics and command are told.
      config: of the run.
      step: of the exported parameters.
      base: the model that the run began with, as the user named it.
    """
    adapter = (directory / "adapter_config.json").exists()
    published = "/" in base and not Path(base).expanduser().exists()
    names = [place for place in _sources(config) if place.startswith("hf:")]
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        **({"base_model": base} if published else {}),
        **({"datasets": [name[3:].partition("?")[0] for name in names]} if names else {}),
        "tags": ["reinforcement-learning", "echorl", config.objective.name],
    }
    text = "\n".join(_text(workdir, config, step, base=base, adapter=adapter))
    replace_text(directory / CARD, f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{text}\n")


def _text(workdir: Path, config: Config, step: int, *, base: str, adapter: bool) -> Iterator[str]:
    method = config.objective.name + (" with EchoRL" if config.echo.enabled else "")
    revision = f" (revision {config.model.revision})" if config.model.revision else ""
    yield f"# {workdir.resolve().name}"
    yield ""
    yield (
        f"{'A LoRA adapter of' if adapter else 'Trained from'} {base}{revision} by {method} with "
        f"echorl_jax: step {step} of {config.steps}."
    )
    yield from ("", "## Scores", "", *_scores(workdir, step))
    yield from ("", "## Data", "", f"- training: `{config.data.train}`")
    if config.data.eval:
        yield f"- evaluation: `{config.data.eval}`"
    environment = workdir / "environment.json"
    known = read_json(environment) if environment.exists() else {}
    if "command" in known:
        yield from ("", "## Command", "", "```bash", known["command"], "```", "")
        packages = known.get("packages", {}).items()
        yield ", ".join(f"{name} {version}" for name, version in packages)
    yield from ("", "## Config", "", "What differs from the defaults:", "", "```json")
    yield json.dumps(_changed(config), indent=2)
    yield "```"


def _scores(workdir: Path, step: int) -> Iterator[str]:
    """The newest value up to the step of each evaluation's pass@k, and the step's reward."""
    newest: dict[str, tuple[float, int]] = {}
    for line in read_steps(workdir / "metrics.jsonl"):
        for name, value in line.items():
            told = name.startswith("eval/") and "/pass@" in name
            if line["step"] <= step and value is not None and (told or name == "reward/mean"):
                newest[name] = (value, line["step"])
    if not newest:
        yield "None were measured."
        return
    yield from ("| metric | value | step |", "| --- | --- | --- |")
    for name, (value, at) in sorted(newest.items()):
        yield f"| {name} | {value:.4g} | {at} |"


def _changed(config: Config) -> dict[str, Any]:
    plain = flatten(to_dict(Config()))
    return {key: value for key, value in flatten(to_dict(config)).items() if value != plain[key]}


def _sources(config: Config) -> list[str]:
    return [place.strip() for place in f"{config.data.train},{config.data.eval}".split(",")]
