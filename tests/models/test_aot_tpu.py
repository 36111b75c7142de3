"""The model of a training step, compiled for TPU by libtpu here, uses splash and fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GIB = 2**30


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape,accelerator,topology,fsdp,tensor,rows,hbm",
    [
        ("qwen2.5-1.5b", "v5litepod-8", "v5e:2x4", 8, 1, 8, 16 * GIB),
        ("qwen2.5-7b", "v5litepod-16", "v5e:4x4", 8, 2, 8, 16 * GIB),
        ("qwen2.5-1.5b", "v5p-16", "v5p:2x2x2", 4, 1, 16, 95 * GIB),
        ("qwen2.5-7b", "v5p-16", "v5p:2x2x2", 4, 2, 8, 95 * GIB),
    ],
)
def test_training_step_compiles_for_tpu(
    shape, accelerator, topology, fsdp, tensor, rows, hbm, libtpu, capsys
):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), libtpu]),
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": accelerator,
    }
    script = str(Path(__file__).parent / "aot_tpu.py")
    arguments = [shape, topology, str(fsdp), str(tensor), str(rows), "4096"]
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print("\n" + json.dumps(result))
    assert result["kernels"] >= 3  # forward, and two of the backward pass
    assert result["arguments_bytes"] + result["temporary_bytes"] < hbm
