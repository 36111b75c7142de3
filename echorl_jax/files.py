"""Files: whole or not written, read in spite of a torn end, and one writer for a directory."""

import fcntl
import json
import math
import os
import platform
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from echorl_jax.errors import RunStopped, UserError

NAME = ".lock"
# Identifies this boot of the machine; all its containers share it, unlike host names.
BOOT = Path("/proc/sys/kernel/random/boot_id")
# A network file system frees the lock of a lost machine within this time (seconds).
FREED_WITHIN_S = 100.0
# Models that come with the package.
BUILTIN = {
    f"builtin:{name}": Path(__file__).parent / "assets" / name for name in ("countdown", "shapes")
}


def model_path(path: str, revision: str = "") -> str:
    """The directory of a model that comes with the package, else the path itself.

    >>> model_path("runs/1/export")
    'runs/1/export'
    """
    if path in BUILTIN:
        return str(BUILTIN[path])
    source = os.path.expanduser(path)
    if revision and os.path.isdir(source):
        raise UserError(f"{path} is a directory: revision {revision!r} is only for a repository id")
    return f"{source}@{revision}" if revision else source


def split_revision(source: str) -> tuple[str, str | None]:
    """The repository id and the revision of :func:`model_path`'s result; None is the default one.

    >>> split_revision("owner/name@v2")
    ('owner/name', 'v2')
    """
    name, _, revision = source.partition("@")
    return name, revision or None


def hub_answers() -> bool:
    """False if nothing answers at the hub's address, where its client would try for a minute.

    Behind a proxy, which may reach more than this machine does, the client has to try.
    """
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies():
        return True
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[TextIO]:
    """Opens a new file that takes the place of ``path`` at the end, unless an error is raised.

    A kill or a power cut leaves the old content or the new. ``mode`` is that of a new file, before
    the umask.
    """
    fresh = path.with_name(f"{path.name}.partial")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT, mode)
    with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
        yield file
        file.flush()
        os.fsync(descriptor)
    fresh.replace(path)


def replace_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes a file as a whole, as :func:`replacing` does."""
    with replacing(path, mode=mode) as file:
        file.write(text)


def replace_json(path: Path, content: Any) -> None:
    """Writes a JSON file as a whole."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def replace_directory(fresh: Path, path: Path) -> None:
    """Moves a finished directory to its name; an earlier one of that name is deleted."""
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)


def sync_tree(directory: Path) -> None:
    """Waits until all files below a directory, and their names, are on the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: anything else, with the reason in one line.

    >>> parse_object('{"a": 1}')
    {'a': 1}
    """
    try:
        value = json.loads(text)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      UserError: it holds anything else.
      OSError: it cannot be read.
    """
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def read_jsonl(path: Path, broken: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file one at a time; nothing if the file does not exist.

    Args:
      broken: receives the numbers of lines that are not JSON objects, such as a torn last line.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    yield parse_object(line)
            except ValueError:
                if broken is not None:
                    broken.append(number)


def read_steps(path: Path, broken: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file that have a whole number as their ``step``; see read_jsonl."""
    return (line for line in read_jsonl(path, broken) if type(line.get("step")) is int)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Writes one object per line, non-finite numbers as null; creates missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    replace_text(path, "".join(lines))
    return path


def cut_torn_line(path: Path) -> int:
    """Cuts off a last line that a kill left unfinished; returns the number of whole lines."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        lines = end = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            lines, end = lines + 1, end + len(line)
    return lines


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


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Makes the directory and keeps other processes from writing there until the end.

    The system frees the lock of a process that dies, for any reason. On a file system without
    locks there is no protection.

    Raises:
      UserError: a process of this machine holds the lock.
      RunStopped: a process of another machine holds it, and may still be lost.
      OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / NAME).open("a+") as file:
        _lock(file, directory)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n{_machine()}\n")
        file.flush()
        yield


def _lock(file: TextIO, directory: Path) -> None:
    deadline, told = time.monotonic() + FREED_WITHIN_S, False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder, _, machine = file.read(200).strip().partition("\n")
            holder = holder or "another process"
        except OSError:
            return
        if machine == _machine():
            raise UserError(f"{directory}: {holder} is writing there")
        if time.monotonic() > deadline:
            raise RunStopped(
                f"{directory}: {holder} is writing there; if that machine is lost for good, remove "
                f"{directory / NAME}"
            )
        if not told:
            print(f"{directory}: waiting for {holder}, which holds it", file=sys.stderr)
            told = True
        time.sleep(1.0)


def _machine() -> str:
    return BOOT.read_text().strip() if BOOT.exists() else platform.node()
