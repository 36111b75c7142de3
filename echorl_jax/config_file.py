"""Reads a file under ``configs/`` and ``--config.key=value`` into a validated :class:`Config`."""

import dataclasses
import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_collections

from echorl_jax.config import LARGEST, Config, ConfigError, validate
from echorl_jax.errors import nearest
from echorl_jax.files import read_json

# The files under configs/, which an installed package has too.
CONFIGS = Path(__file__).parent / "assets" / "configs"
# Keys of configs that were saved before these had their present names.
RENAMED = {"optim.max_bad_updates": "max_bad_steps"}


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict, locked: a file that sets an unknown key fails at once."""
    config = ml_collections.ConfigDict(to_dict(Config()), convert_dict=True)
    return config.lock()


def to_dict(config: Config) -> dict[str, Any]:
    """The plain nested dict that is saved beside a run; :func:`from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one, with dotted keys.

    >>> flatten({"steps": 9, "echo": {"top_k": 1}}, "config.")
    {'config.steps': 9, 'config.echo.top_k': 1}
    """
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def from_dict(values: Mapping[str, Any]) -> Config:
    """Reads and validates a nested mapping; keys that are not given keep their defaults.

    Raises:
      ConfigError: an unknown key (with the nearest valid one), a wrong type or value.
    """
    return validate(_read(Config, values, prefix=""))


def load_config(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """Runs a configuration file and applies overrides.

    Args:
      spec: ``FILE.py`` or ``FILE.py:ARGUMENT``; the file's ``get_config`` is called with the
        argument, if there is one. A ``.json`` file is that of a run's workdir. Where there is no
        such ``configs/FILE.py``, that of this package is meant.
      overrides: dotted key to text, as typed on the command line.

    Raises:
      ConfigError: as :func:`from_dict`, or the file is missing or fails.
    """
    values = read_json(Path(spec)) if spec.endswith(".json") else _run_file(spec)
    for key, text in (overrides or {}).items():
        _set(values, key, _Typed(text))
    return from_dict(values)


def describe_options() -> Iterator[tuple[str, str, str]]:
    """Every option as (key, default, meaning); the meaning is the comment above the field."""
    for prefix, cls in [("", Config), *((f.name, f.type) for f in _sections())]:
        meaning, fresh = "", True
        for line in inspect.getsource(typing.cast(type, cls)).splitlines()[2:]:
            text = line.strip()
            if text.startswith("#"):
                meaning = (text[1:] if fresh else f"{meaning} {text[1:].strip()}").strip()
                fresh = False
                continue
            name, _, rest = text.partition(":")
            if "default_factory" not in rest:
                yield f"{prefix}.{name}".lstrip("."), rest.rpartition("= ")[2], meaning
            fresh = True


def _sections() -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]


@dataclasses.dataclass(frozen=True)
class _Typed:
    """Text from the command line, to be read as whatever type its key has."""

    text: str


def _run_file(spec: str) -> dict[str, Any]:
    path, colon, argument = spec.partition(".py:")
    file = Path(path + ".py" if colon else path)
    shipped = CONFIGS / file.name
    if file.parent == Path("configs") and not _is_file(file) and _is_file(shipped):
        file = shipped
    if not _is_file(file):
        near = _hint(file.name, [p.name for p in file.parent.glob("*.py")])
        raise ConfigError(f"config file {file} does not exist{near}")
    module_spec = importlib.util.spec_from_file_location(f"echorl_config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"config file {file}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(argument) if colon else module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # the file is the user's program: anything can go wrong in it
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {file}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"config file {file}: get_config returned {type(config).__name__}")
    return config.to_dict()


def _is_file(path: Path) -> bool:
    """False for a path that no file can have too, such as one that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _set(values: dict[str, Any], key: str, value: _Typed) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            where = ".".join(sections[: depth + 1])
            raise ConfigError(f"config.{key}: config.{where} is a value, it has no keys")
    values[name] = value


def _read(cls: Any, values: Mapping[str, Any], *, prefix: str) -> Any:
    if isinstance(values, _Typed) or not isinstance(values, Mapping):
        raise ConfigError(f"config.{prefix.rstrip('.')} is a section; set one of its keys")
    kinds = typing.get_type_hints(cls)  # without the bounds, which validate() reads
    values = {RENAMED.get(f"{prefix}{name}", name): value for name, value in values.items()}
    for name in values:
        if name not in kinds:
            raise ConfigError(f"unknown key config.{prefix}{name}{_suggest(prefix, name)}")
    read = {}
    for name, value in values.items():
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            read[name] = _read(kind, value, prefix=f"{prefix}{name}.")
        else:
            read[name] = _convert(f"{prefix}{name}", value, kind)
    return cls(**read)


def _convert(key: str, value: Any, kind: Any) -> Any:
    """The value as ``kind``: bool, int, float, str, Literal, tuple of int, perhaps or None."""
    original = value.text if isinstance(value, _Typed) else value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        none = original is None or (isinstance(value, _Typed) and value.text.lower() == "none")
        if none and type(None) in args:
            return None
        if str in args and isinstance(original, str) and ":" in original:  # an import path
            return original
        return _convert(key, value, args[0])
    if isinstance(value, _Typed):
        value = _parse(value.text, kind)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list | tuple) and all(map(_is_whole, value)):
        return tuple(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:
            return float(value)
    if kind is int and _is_whole(value):
        return value
    if kind in (bool, str) and type(value) is kind:
        return value
    near = _hint(str(original), [str(a) for a in args]) if origin is Literal else ""
    raise ConfigError(f"config.{key} = {original!r}: must be {_name(kind)}{near}")


def _is_whole(value: Any) -> bool:
    return type(value) is int and -LARGEST <= value <= LARGEST


def _parse(text: str, kind: Any) -> Any:
    """The text as ``kind``; unchanged where it is none, and the caller's type check reports it."""
    if typing.get_origin(kind) is tuple:
        parts = [_parse(part, int) for part in text.strip("()[] ").split(",") if part.strip()]
        return text if any(isinstance(part, str) for part in parts) else parts
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " | ".join(repr(a) for a in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"whole numbers separated by commas, of at most {LARGEST}"
    whole, number = f"a whole number of at most {LARGEST}", "a number, and finite"
    return {bool: "true or false", int: whole, float: number, str: "text"}[kind]


def _suggest(prefix: str, name: str) -> str:
    """Suggests the key that was meant: that of another project's name, of another section, or near.

    A key that is like none gets no suggestion, for a wrong one would change the run.
    """
    from echorl_jax.other_names import PROJECTS, named_elsewhere  # a table, for this error alone

    if elsewhere := named_elsewhere(prefix + name):
        return f", a name in {PROJECTS[elsewhere.project]}; {elsewhere.meaning}"
    keys = [key for key, _, _ in describe_options()] + [f.name for f in _sections()]
    same_name = [key for key in keys if key.rpartition(".")[2] == name]
    near = same_name[0] if same_name else nearest(prefix + name, keys, cutoff=0.7)
    return f"; did you mean config.{near}?" if near else ", and none is like it: see echorl options"


def _hint(word: str, known: list[str]) -> str:
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""
