"""Several processes as one run, started the way a launcher does, for tests."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).parent / "cluster" / "one_process.py"
SECRET = "known to the processes of a test"
LIMITS = {"start_timeout_s": 30.0, "lost_after_s": 3.0}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@dataclasses.dataclass
class Run:
    """Processes of one run, as a launcher starts them."""

    processes: int = 2
    port: int = dataclasses.field(default_factory=free_port)
    started: list[subprocess.Popen[str]] = dataclasses.field(default_factory=list)

    def start(
        self,
        process: int,
        *command: str,
        facts: Mapping[str, Any] | None = None,
        limits: Mapping[str, float] = LIMITS,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        words = [str(self.port), str(self.processes), str(process), json.dumps(facts or {})]
        self.started.append(
            subprocess.Popen(
                [sys.executable, str(DRIVER), *words, json.dumps(limits), "--"]
                + [sys.executable, "-c", *command],
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "ECHORL_SECRET": SECRET,
                    **(environment or {}),
                },
            )
        )
        return self.started[-1]

    def ends(self, *, within_s: float = 30.0) -> list[tuple[int, str]]:
        """Exit code and last line of each process."""
        deadline = time.monotonic() + within_s
        found = []
        for process in self.started:
            _, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            found.append((process.returncode, (said.splitlines() or [""])[-1]))
        return found


def number_in(path: Path, *, within_s: float = 20.0) -> int:
    """The process number that a child writes when it runs."""
    deadline = time.monotonic() + within_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.02)
    return int(path.read_text())


def gone(number: int, *, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
