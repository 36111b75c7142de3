"""The sampler, compiled for accelerators on this machine: what it does not copy or send."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def output_of(command: list[str], plugin: str, **environment: str) -> dict:
    """What the program prints, with a compiler that is installed apart."""
    path = os.pathsep.join([str(ROOT), plugin])
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, most", [((1, 1, 1), 0), ((2, 2, 2), 2 * 4 + 4)])
def test_on_gpu_a_turn_reads_weights_where_they_lie(mesh, most, cuda_plugin):
    """One kernel a layer, no copy of a matrix, and on a mesh two sums over ``tensor`` a layer; the
    embedding and the sampling of a whole turn have the other collectives.
    """
    script = str(Path(__file__).parent / "aot_gpu.py")
    found = output_of([script, *map(str, mesh)], cuda_plugin)
    assert found["attend"] == found["layers"] == 4
    assert found["matrices_made"] == []
    kinds = found["collectives"]
    sums = kinds.get("all-reduce", 0) + kinds.get("all-reduce-start", 0)
    assert (sums >= 2 * 4) == (most > 0) and sums <= most


@pytest.mark.slow
def test_on_tpu_a_turn_reads_blocks_where_they_lie(libtpu):
    found = output_of(
        [str(ROOT / "benchmarks" / "decode_turn.py")],
        libtpu,
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
    )
    assert found["blocks_copied"] == 0
    operations = found["operations_of_one_layer"]
    assert operations["compiler"] == pytest.approx(operations["formula"], rel=0.05)
    assert 0.5 < found["turn_ms"]["share"] < 1
