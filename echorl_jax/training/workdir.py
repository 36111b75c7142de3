"""The working directory of a run: one config, one history."""

import itertools
import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from echorl_jax.config import Config, ConfigError
from echorl_jax.config_file import RENAMED, flatten, to_dict
from echorl_jax.errors import writing
from echorl_jax.files import (
    parse_object,
    read_json,
    read_steps,
    replace_json,
    replace_text,
    sole_writer,
)
from echorl_jax.parallel import is_first, wait_for_all
from echorl_jax.remote import is_remote

# Keys of the course of a run, whose change is told.
COURSE = (
    *("steps", "epochs", "optim.learning_rate", "optim.warmup_steps", "optim.warmup_ratio"),
    *("optim.schedule", "optim.min_lr_ratio", "optim.decay_ratio"),
)
# A run may be continued with other values of these sections and keys: they decide where, how fast
# and how closely watched it computes, and how long, but not what.
MAY_CHANGE = (
    *("mesh", "checkpoint", "eval", "log", "debug"),
    *("model.remat", "model.attention", "data.eval", "data.grader_workers"),
    *("rollout.slots", "rollout.expected_tokens", "rollout.check_every", "rollout.max_logprob_gap"),
    *("optim.micro_batch_tokens", "optim.max_bad_steps", "optim.compile_ahead"),
    "optim.compile_in_background",
    *COURSE,
    "optim.sft_packing",
    *RENAMED,
)
# Superseded files, moved instead of deleted.
ASIDE = "set_aside"
# A file that one host has written must appear on the others within this time (seconds).
SEEN_WITHIN_S = 90.0


@contextmanager
def open_workdir(path: str | Path, config: Config) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Creates the directory, or checks that it belongs to the same config; holds it until the end.

    Writes ``config.json`` and ``environment.json``. Of several processes the first one writes, and
    the others check that they see it.

    Yields:
      The directory, and the config of its run before, with dotted keys; empty if it is new, and on
      other processes than the first.

    Raises:
      UserError: it holds a run of another config (names the first key that differs), is written by
        another run at the moment, is no directory, or is another directory for each process.
      RunStopped: it cannot be written, such as on a full disk.
    """
    if is_remote(path):
        raise ConfigError(f"workdir {path} is remote: open it with echorl_jax.remote.mirrored")
    workdir = Path(path)
    file, before = workdir / "config.json", {}
    # Processes meet for the first time here; a first one that is waiting they would not wait for.
    wait_for_all("start")
    with ExitStack() as held:
        if is_first():
            before = _claim(workdir, file, config, held)
        wait_for_all("workdir")
        if not is_first():
            _require_shared(workdir, file, config)
        yield workdir, flatten(before)


def _claim(workdir: Path, file: Path, config: Config, held: ExitStack) -> dict[str, Any]:
    before: dict[str, Any] = {}
    try:
        with writing(workdir):
            held.enter_context(sole_writer(workdir))
            if file.exists() and _has_begun(workdir):
                before = read_json(file)
                _require_same(workdir, before, config)
            replace_json(file, to_dict(config))
            replace_json(workdir / "environment.json", environment())
    except (NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"workdir {workdir}: {error.strerror}") from error
    return before


def _has_begun(workdir: Path) -> bool:
    """True if a run wrote more than its config: a start that failed binds nothing."""
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    logged = metrics.is_file() and metrics.stat().st_size > 0
    return logged or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _require_shared(workdir: Path, file: Path, config: Config) -> None:
    """Checks that what the first process has written is here; network file systems take a while."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not (file.exists() and parse_object(file.read_bytes()) == to_dict(config)):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"workdir {workdir.absolute()}: process {jax.process_index()} on "
                f"{platform.node()} does not see what process 0 wrote there; it must be on a file "
                "system that all hosts share"
            )
        time.sleep(0.5)


def require_new(path: str | Path) -> None:
    """For ``checkpoint.resume = none``: nothing that a run wrote may be lost.

    Raises:
      ConfigError: a run has been there.
    """
    if _has_begun(Path(path)):
        raise ConfigError(
            f"workdir {path} holds a run already, and config.checkpoint.resume = none starts none "
            "over; take another --workdir, or auto to go on"
        )


def set_aside(workdir: Path, path: Path) -> Path:
    """Moves a directory into ``set_aside/``, under a name that is free; returns it."""
    target = _free_place(workdir, path)
    path.rename(target)
    return target


def copy_aside(workdir: Path, path: Path) -> None:
    """Keeps a copy of a file, if there is one, in ``set_aside/``."""
    if path.exists():
        shutil.copy(path, _free_place(workdir, path))


def _free_place(workdir: Path, path: Path) -> Path:
    (workdir / ASIDE).mkdir(exist_ok=True)
    names = (f"{path.name}-{number}" for number in itertools.count(1))
    return next(place for name in names if not (place := workdir / ASIDE / name).exists())


def rewind(workdir: Path, step: int) -> int:
    """Forgets what was written after ``step`` and any torn line: a resumed run writes it again.

    A file in which a whole line is damaged, or whose training steps all go, is copied to
    ``set_aside/`` first.

    Args:
      step: of the checkpoint; -1 where there is none, and everything is written again.

    Returns:
      Lines of metrics.jsonl that stay; 0 on processes that write none.
    """
    if not is_first():
        return 0
    stay = 0
    for name in ("samples/ledger.jsonl", "metrics.jsonl"):
        path = workdir / name
        if path.exists():
            lines = list(read_steps(path))
            damaged = len(lines) < path.read_bytes().count(b"\n")
            if damaged or (step < 0 and last_step(path) > 0):
                copy_aside(workdir, path)
            kept = [line for line in lines if line["step"] <= step]
            replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            stay = len(kept) if name == "metrics.jsonl" else stay
    for path in (workdir / "samples").glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal() and int(number) > step:
            path.unlink()
    return stay


def last_step(path: Path) -> int:
    """The largest step of a JSON-lines file; -1 without a file or a step."""
    return max((line["step"] for line in read_steps(path)), default=-1)


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
        "command": _command(),
        "packages": versions,
    }


def _command() -> str:
    """The command line of this process, as one types it."""
    program, *arguments = sys.argv
    typed = Path(program).name in ("echorl", "__main__.py")
    return shlex.join([*(["echorl"] if typed else ["python", program]), *arguments])


def deciding_keys(config: Config) -> dict[str, Any]:
    """The dotted keys that decide what a run computes, with their values."""
    flat = flatten(to_dict(config))
    return {key: value for key, value in flat.items() if not _may_change(key)}


def first_difference(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """The first key whose values differ, with both. A key that is only in one has its default."""
    default = deciding_keys(Config())
    for key in {**before, **now}:
        old, new = (values.get(key, default.get(key)) for values in (before, now))
        if old != new:
            return key, old, new
    return None


def _require_same(workdir: Path, before: dict, config: Config) -> None:
    decided = {key: value for key, value in flatten(before).items() if not _may_change(key)}
    if found := first_difference(decided, deciding_keys(config)):
        key, old, new = found
        raise ConfigError(
            f"workdir {workdir} holds a run with config.{key} = {old!r}, not {new!r}; "
            "take another --workdir or the same config"
        )


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE
