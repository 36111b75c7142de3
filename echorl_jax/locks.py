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

from echorl_jax.errors import UserError

NAME = ".lock"
# A network file system frees the lock of a machine that is lost after so long (seconds).
FREED_WITHIN_S = 100.0


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Makes the directory and keeps other processes from writing there until the end.

    The system frees the lock of a process that dies, however it dies. A file system that knows no
    locks keeps nobody out.

    Raises:
      UserError: a process of this machine has it, or one of another does not give it up.
      OSError: it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / NAME).open("a+") as file:
        _lock(file, directory)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _lock(file: TextIO, directory: Path) -> None:
    deadline, told = time.monotonic() + FREED_WITHIN_S, False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200) or "another process"
        except OSError:
            return
        here = holder.endswith(f" on {platform.node()}")
        if here or time.monotonic() > deadline:
            gone = "" if here else f" (if that machine is lost for good, remove {NAME} there)"
            raise UserError(f"{directory}: {holder} is writing there{gone}")
        if not told:
            print(f"{directory}: waiting for {holder}, which holds it", file=sys.stderr)
            told = True
        time.sleep(1.0)
