"""The sampler, compiled ahead of time for accelerators, copies and sends no large array."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def output_of(command: list[str], plugin: str, **environment: str) -> dict:
    """The JSON that the program prints, with a compiler from a separate directory."""
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
def test_a_decode_step_on_gpu_reads_weights_without_copies(mesh, most, cuda_plugin):
    """One kernel per layer, no copy of a matrix, and on a mesh two sums over ``tensor`` per layer;
    the other collectives are those of the embedding and of sampling.
    """
    script = str(Path(__file__).parent / "aot_gpu.py")
    found = output_of([script, *map(str, mesh)], cuda_plugin)
    assert found["attend"] == found["layers"] == 4
    assert found["matrices_made"] == []
    kinds = found["collectives"]
    sums = kinds.get("all-reduce", 0) + kinds.get("all-reduce-start", 0)
    assert (sums >= 2 * 4) == (most > 0) and sums <= most


@pytest.mark.slow
def test_a_decode_step_on_tpu_reads_blocks_without_copies(libtpu):
    found = output_of(
        [str(ROOT / "benchmarks" / "decode_step.py")],
        libtpu,
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
    )
    assert found["blocks_copied"] == 0
    operations = found["operations_of_one_layer"]
    assert operations["compiler"] == pytest.approx(operations["formula"], rel=0.05)
    assert 0.5 < found["turn_ms"]["share"] < 1
