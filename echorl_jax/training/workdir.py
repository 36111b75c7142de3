"""The working directory of a run: one config, one history."""

import json
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from echorl_jax.config import Config, ConfigError
from echorl_jax.config_file import to_dict

# A run may be continued with other values of these: they do not change what it computes so far.
MAY_CHANGE = ("steps", "checkpoint", "eval", "log")


def open_workdir(path: str | Path, config: Config) -> Path:
    """Creates the directory, or checks that it belongs to the same config.

    Writes ``config.json`` and ``environment.json``.

    Raises:
      ConfigError: it holds a run of another config (names the first key that differs), or cannot
        be written.
    """
    workdir = Path(path)
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if file.exists():
            _require_same(workdir, json.loads(file.read_text()), to_dict(config))
        _write_json(file, to_dict(config))
        _write_json(workdir / "environment.json", environment())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from error
    except OSError as error:
        raise ConfigError(f"workdir {workdir}: {error.strerror or error}") from error
    return workdir


def rewind(workdir: Path, step: int) -> None:
    """Forgets what was written after ``step`` and any torn line: a resumed run writes it again."""
    for name in ("metrics.jsonl", "samples/ledger.jsonl"):
        path = workdir / name
        if path.exists():
            kept = [line for line in whole_lines(path) if line["step"] <= step]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    for path in (workdir / "samples").glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, up to a line that a kill left half written."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def environment() -> dict[str, Any]:
    """Versions and devices, for the record."""
    packages = ("echorl-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "packages": versions,
    }


def _require_same(workdir: Path, before: dict, now: dict) -> None:
    for key, old, new in _differences(before, now):
        if key.split(".")[0] not in MAY_CHANGE:
            raise ConfigError(
                f"workdir {workdir} holds a run with config.{key} = {old!r}, not {new!r}; "
                "take another --workdir or the same config"
            )


def _differences(before: dict, now: dict, prefix: str = ""):
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
