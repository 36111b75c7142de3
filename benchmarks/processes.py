"""Measurements as processes of their own, which take turns so that noise falls on all alike."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]


def measure(command: list[str]) -> dict[str, Any] | None:
    """The last line that the process prints, or None, with its complaint shown."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        print(f"failed: {' '.join(command)}\n{done.stderr[-600:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turns(programs: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Runs every program ``rounds`` times, one after the other; what failed is left out."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, command in programs.items():
            run = measure(command)
            if run is not None:
                found[name].append(run)
    return found


def median_of(runs: list[dict[str, Any]], key: str) -> float:
    """Of all values in the lists that the runs hold under ``key``."""
    return median(value for run in runs for value in run[key])
