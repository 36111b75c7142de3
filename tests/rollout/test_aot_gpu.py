"""The sampler, compiled for H100s by XLA on this machine: what it does not copy or send."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("mesh, most", [((1, 1, 1), 0), ((2, 2, 2), 2 * 4 + 4)])
def test_a_turn_reads_weights_where_they_lie(mesh, most, cuda_plugin):
    """One kernel a layer, no copy of a matrix, and on a mesh two sums over ``tensor`` a layer; the
    embedding and the sampling of a whole turn have the other collectives.
    """
    script = str(Path(__file__).parent / "aot_gpu.py")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), cuda_plugin]),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, script, *map(str, mesh)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["attend"] == found["layers"] == 4
    assert found["matrices_made"] == []
    sums = found["collectives"].get("all-reduce-start", 0) + found["collectives"].get(
        "all-reduce", 0
    )
    assert (sums >= 2 * 4) == (most > 0) and sums <= most
