"""examples/tunix_plugin.py in Tunix itself: EchoRL in another project's learner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_plugin_adds_the_echo_to_tunix_own_loss_and_trains(tunix_packages: str) -> None:
    program = str(Path(__file__).with_name("tunix_check.py"))
    paths = os.pathsep.join([tunix_packages, str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    plain, solved = found["plain"], found["solved"]
    # Without an echo it is Tunix's GRPO loss, KL term and gradient.
    for name in ("loss", "kl", "clipped"):
        assert plain[name][0] == pytest.approx(plain[name][1], rel=1e-5), name
    assert plain["clipped"][1] > 0.05 and plain["gradients_apart"] < 1e-4
    # A solved group without advantages has the loss of its clip.
    assert solved["clips"] == 1 and solved["loss"][1] > 0.1
    assert solved["loss"][0] == pytest.approx(solved["loss"][1], rel=1e-4)
    assert found["finite"] and found["moved"] > 1e-3 and found["moved_by_echo"] > 1e-3
