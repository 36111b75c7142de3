"""Reads the files of a working directory, whatever state a run left them in.

A run that was killed leaves a torn last line, one that was resumed may log a step twice, one that
just started has no files at all. None of this is an error here: what can be read is read, and
:attr:`Run.notes` says what was left out.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from echorl_jax.config import ConfigError

_SAMPLE_FILE = re.compile(r"step_(\d+)\.jsonl")


@dataclasses.dataclass(frozen=True)
class Run:
    """A working directory, read once.

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
        """Training steps that were logged; an evaluation alone, as before the first, is none."""
        return sum(any(_of_training(key) for key in row) for row in self.metrics)

    def keys(self) -> list[str]:
        """Every metric that was logged at least once, sorted, without ``step``."""
        return sorted({key for row in self.metrics for key in row} - {"step"})

    def sample_files(self) -> list[tuple[int, Path]]:
        """``(step, file)`` of each samples file, in order of steps."""
        found = (
            (_SAMPLE_FILE.fullmatch(p.name), p) for p in self.path.glob("samples/step_*.jsonl")
        )
        return sorted((int(match[1]), path) for match, path in found if match)

    @property
    def ledger_file(self) -> Path:
        """The file with the outcome of every group of every step; it may not exist."""
        return self.path / "samples" / "ledger.jsonl"


def read_run(workdir: Path, *, name: str | None = None) -> Run:
    """Reads a working directory.

    Args:
      workdir: the directory; its files may be missing or incomplete, the directory may not.
      name: what the run is called; the directory's name by default.

    Raises:
      ConfigError: ``workdir`` is not a directory.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ConfigError(f"{workdir}: not a directory; a run's --workdir is expected")
    notes: list[str] = []
    metrics = _read_metrics(workdir / "metrics.jsonl", notes)
    return Run(
        path=workdir,
        name=name or workdir.resolve().name,
        metrics=metrics,
        config=_read_object(workdir / "config.json", notes),
        environment=_read_object(workdir / "environment.json", notes),
        notes=tuple(notes),
    )


def read_runs(workdirs: list[Path]) -> list[Run]:
    """Reads several working directories and gives each a name that tells it from the others.

    Directories of the same name take as much of their path as it needs; a directory given twice is
    read once.
    """
    paths = list(dict.fromkeys(Path(w).resolve() for w in workdirs))
    depth = 1
    longest = max((len(p.parts) for p in paths), default=1)
    while depth < longest and len({p.parts[-depth:] for p in paths}) < len(paths):
        depth += 1
    return [read_run(p, name="/".join(p.parts[-depth:])) for p in paths]


def read_jsonl(path: Path, broken: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file one at a time; nothing for a file that is not there.

    Args:
      path: the file.
      broken: gets the numbers of the lines that hold no JSON object, such as the torn last line of
        a killed run.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield value
            elif broken is not None:
                broken.append(number)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes one object per line, non-finite numbers as null, folders as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", errors="replace")
    return path


def finite(value: Any) -> Any:
    """The same nested value with every infinite or NaN number replaced by None.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a finite number and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def integer(value: Any) -> int | None:
    """``value`` as an integer, or None where it is not a finite number."""
    return int(value) if is_number(value) else None


def _of_training(key: str) -> bool:
    return key != "step" and not key.startswith("eval/")


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
        # A resumed run does some steps again; what it logged last is what it went on from.
        repeated += int(numbers["step"]) in by_step
        by_step[int(numbers["step"])] = numbers
    if broken:
        notes.append(f"{path.name}: {len(broken)} unreadable line(s) left out")
    if repeated:
        notes.append(
            f"{path.name}: {repeated} step(s) logged again after a resume; the last counts"
        )
    if dropped:
        notes.append(f"{path.name}: {dropped} value(s) were not finite and are not drawn")
    return tuple(by_step[step] for step in sorted(by_step))


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name}: not a JSON object, left out")
        return {}
    return value
