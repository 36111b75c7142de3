"""A grading process of the pool: ``python -m echorl_jax.rewards.grading_process FD``.

Requests are pickled by the pool, which trusts itself; answers are JSON, so that nothing a hostile
response might do to this process can reach the pool's unpickler.
"""

import fcntl
import json
import os
import select
import signal
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from echorl_jax.rewards.loading import RAISED, Verdict, clean_reason, load_grader

# So long that any time limit comes first (seconds).
FOREVER = 1e6
LEAK_BYTES = 2**26


def misbehave(response: str, row: Mapping[str, Any], shares: Mapping[str, float]) -> None:
    """Makes this process hang, crash or leak for a share of the responses.

    Which ones follows from the response and its row, so that a repeated run has the same.

    Args:
      shares: "hang", "crash" or "leak" -> share of the items, in [0, 1].
    """
    place = fate(response, row)
    for kind, share in shares.items():
        if place < share:
            FAULTS[kind]()
        place -= share


def fate(response: str, row: Mapping[str, Any]) -> float:
    """A number in [0, 1) that is drawn from the item itself."""
    text = f"{response}|{row.get('reward_model')}"
    return zlib.crc32(text.encode(errors="replace")) / 2**32


def _hang() -> NoReturn:
    while True:
        time.sleep(FOREVER)


def _crash() -> NoReturn:
    os._exit(1)


def _leak() -> NoReturn:
    hoard = []
    while True:
        hoard.append(bytes(LEAK_BYTES))


FAULTS: Mapping[str, Callable[[], NoReturn]] = {"hang": _hang, "crash": _crash, "leak": _leak}


def serve(connection: Connection) -> None:
    """Reads the set-up, says that it is ready, then answers each item with its verdicts."""
    search_path, spec, settings, memory_mb, faults = connection.recv()
    sys.path[:] = search_path
    try:
        grader = load_grader(spec, **settings)
        _limit_memory(memory_mb)
    except Exception as error:
        connection.send_bytes(json.dumps({"failed": clean_reason(str(error))}).encode())
        return
    connection.send_bytes(json.dumps({"ready": True}).encode())
    with suppress(EOFError, ConnectionError):  # the pool has gone, killed perhaps
        while True:
            responses, row, tokens = connection.recv()
            try:
                for response in responses:
                    misbehave(response, row, faults)
                verdicts = grader.judge_all(responses, row, tokens)
            except MemoryError:
                verdicts = [Verdict.wrong(f"{RAISED} MemoryError")] * len(responses)
            answer = [[v.score, v.correct, v.reason, v.metrics, v.answer] for v in verdicts]
            connection.send_bytes(json.dumps(answer).encode())


def die_with_owner() -> None:
    """Has the kernel kill this process and its children when the pool's process ends, on Linux.

    Standard input is a pipe into which the pool never writes: the only event on it is its end. The
    kernel then sends SIGKILL to this process group, whatever a grader is doing; a thread could not
    end one that computes in C.
    """
    if not hasattr(fcntl, "F_SETSIG") or os.getpgrp() != os.getpid():
        return
    pipe = os.dup(0)
    with open(os.devnull) as nothing:  # a grader that reads standard input finds its end
        os.dup2(nothing.fileno(), 0)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # the pool was gone before
        os.killpg(0, signal.SIGKILL)


def _limit_memory(memory_mb: int) -> None:
    """Caps the address space at what is in use now and ``memory_mb`` MiB more, on Linux."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + memory_mb * 2**20
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    die_with_owner()
    serve(Connection(int(sys.argv[1])))
