"""Reads the files of a working directory, whatever state a run left them in.

A killed run leaves a torn last line, a resumed one may log a step twice, and a run that has just
started has no files. None of this is an error: the readers return what can be read, and
:attr:`Run.notes` says what was left out.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, TypeGuard

from echorl_jax.config import ConfigError
from echorl_jax.files import parse_object, read_jsonl


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


def study_file(workdir: Path, name: str) -> Path:
    """The JSONL file with the rows of a study."""
    return workdir / "analysis" / f"{name}.jsonl"


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float; False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def integer(value: Any) -> int | None:
    """``value`` as an integer, or None if it is not a finite number."""
    return int(value) if is_number(value) else None


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
    try:
        return parse_object(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        notes.append(f"{path.name}: not a JSON object, left out")
        return {}
