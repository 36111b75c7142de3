"""Reads the files of a working directory, whatever state a run left them in.

A killed run leaves a torn last line, a resumed one may log a step twice, and a run that has just
started has no files. None of this is an error: the readers return what can be read, and
:attr:`Run.notes` says what was left out.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from echorl_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a working directory.

    ``metrics`` holds one mapping per step in order of steps, finite numbers only. ``config`` and
    ``environment`` are empty where their file is missing or unreadable.
    """

    path: Path
    name: str
    metrics: tuple[dict[str, float], ...]
    config: dict[str, Any]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which ``key`` was logged, and its values."""
        rows = [row for row in self.metrics if key in row]
        return [int(row["step"]) for row in rows], [row[key] for row in rows]

    @property
    def steps_done(self) -> int:
        """Logged training steps; a row with nothing but an evaluation does not count."""
        rows = ([k for k in row if k != "step" and k[:5] != "eval/"] for row in self.metrics)
        return sum(map(bool, rows))

    def keys(self) -> list[str]:
        """Every metric that was logged at least once, sorted, without ``step``."""
        return sorted({key for row in self.metrics for key in row} - {"step"})

    def sample_files(self) -> list[tuple[int, Path]]:
        """``(step, file)`` of each samples file, in order of steps."""
        found = self.path.glob("samples/step_*.jsonl")
        matches = ((re.fullmatch(r"step_(\d+)\.jsonl", path.name), path) for path in found)
        return sorted((int(match[1]), path) for match, path in matches if match)


def read_run(workdir: Path, *, name: str | None = None) -> Run:
    """Reads a working directory.

    Args:
      workdir: an existing directory; its files may be missing or incomplete.
      name: shown for the run; the directory's name by default.

    Raises:
      ConfigError: ``workdir`` is not a directory.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ConfigError(f"{workdir}: not a directory; a run's --workdir is expected")
    notes: list[str] = []
    metrics = _read_metrics(workdir / "metrics.jsonl", notes)
    config, environment = (
        _read_object(workdir / f"{file}.json", notes) for file in ("config", "environment")
    )
    name = name or workdir.resolve().name
    return Run(workdir, name, metrics, config, environment, tuple(notes))


def read_runs(workdirs: list[Path]) -> list[Run]:
    """Reads several working directories, each once, and gives them different names.

    Directories of the same name are named by as much of their path as tells them apart.
    """
    paths = list(dict.fromkeys(Path(w).resolve() for w in workdirs))
    depth, longest = 1, max((len(path.parts) for path in paths), default=1)
    while depth < longest and len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read_run(path, name="/".join(path.parts[-depth:])) for path in paths]


def read_jsonl(path: Path, broken: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file one at a time; nothing if the file does not exist.

    Args:
      path: the file.
      broken: receives the numbers of lines that are not JSON objects, such as a torn last line.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            value = _parse(line)
            if isinstance(value, dict):
                yield value
            elif broken is not None:
                broken.append(number)


def study_file(workdir: Path, name: str) -> Path:
    """The JSONL file with the rows of a study."""
    return workdir / "analysis" / f"{name}.jsonl"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes one object per line, non-finite numbers as null; creates missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", errors="replace")
    return path


def finite(value: Any) -> Any:
    """The same nested value with every infinite or NaN number replaced by None.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    return map_leaves(value, lambda v: None if isinstance(v, float) and not math.isfinite(v) else v)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The nested dicts and lists of ``value`` with ``change`` applied to everything else."""
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_leaves(item, change) for item in value]
    return change(value)


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float; False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def integer(value: Any) -> int | None:
    """``value`` as an integer, or None if it is not a finite number."""
    return int(value) if is_number(value) else None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _read_metrics(path: Path, notes: list[str]) -> tuple[dict[str, float], ...]:
    broken: list[int] = []
    by_step: dict[int, dict[str, float]] = {}
    repeated = dropped = 0
    for row in read_jsonl(path, broken):
        numbers = {str(key): value for key, value in row.items() if is_number(value)}
        if "step" not in numbers:
            broken.append(0)
            continue
        dropped += sum(isinstance(v, float) and not math.isfinite(v) for v in row.values())
        # A resumed run repeats the steps after its checkpoint; the last row of a step is valid.
        repeated += int(numbers["step"]) in by_step
        by_step[int(numbers["step"])] = numbers
    for count, what in (
        (len(broken), "unreadable line(s) left out"),
        (repeated, "step(s) logged again after a resume; the last counts"),
        (dropped, "value(s) were not finite and are not drawn"),
    ):
        if count:
            notes.append(f"{path.name}: {count} {what}")
    return tuple(by_step[step] for step in sorted(by_step))


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = _parse(path.read_text(encoding="utf-8", errors="replace"))
    if isinstance(value, dict):
        return value
    notes.append(f"{path.name}: not a JSON object, left out")
    return {}
