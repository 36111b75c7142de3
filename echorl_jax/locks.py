"""One writer for a directory: two that write into one would spoil each other's files."""

import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from echorl_jax.errors import RunStopped, UserError

NAME = ".lock"
# This boot of this machine, which its containers share while host names come and go.
BOOT = Path("/proc/sys/kernel/random/boot_id")
# A network file system frees the lock of a machine that is lost after so long (seconds).
FREED_WITHIN_S = 100.0


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Makes the directory and keeps other processes from writing there until the end.

    The system frees the lock of a process that dies, however it dies. A file system that knows no
    locks keeps nobody out.

    Raises:
      UserError: a process of this machine has it.
      RunStopped: one of another machine does not give it up, which may yet come.
      OSError: it cannot be written.
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
