"""A lock on a directory, so that two processes never write into one."""

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
# Identifies this boot of the machine; all its containers share it, unlike host names.
BOOT = Path("/proc/sys/kernel/random/boot_id")
# A network file system frees the lock of a lost machine within this time (seconds).
FREED_WITHIN_S = 100.0


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
