"""The same comparison over configurations drawn at random, with torch run on the spot."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hf_reference import load_golden, random_cases
from reference_check import check_gradients, check_greedy, check_logits, write_case

SEED, COUNT = 0, 18


@pytest.fixture(scope="session")
def torch_python() -> str:
    """An interpreter with torch and transformers: ``ECHORL_TORCH_PYTHON``, or this one,
    completed.
    """
    given = os.environ.get("ECHORL_TORCH_PYTHON")
    if given:
        return given
    if importlib.util.find_spec("torch") is None:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "torch==2.13.0"]
        subprocess.run(install, check=True)
    return sys.executable


@pytest.fixture(scope="session")
def live(torch_python, tmp_path_factory) -> Path:
    """What transformers computes for the drawn cases."""
    out = tmp_path_factory.mktemp("live")
    script = Path(__file__).parent / "make_golden.py"
    arguments = ["--out", str(out), "--random", str(COUNT), "--seed", str(SEED)]
    subprocess.run([torch_python, str(script), *arguments], check=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", random_cases(SEED, COUNT))
def test_random_configurations_equal_transformers(name, live, tmp_path):
    case = random_cases(SEED, COUNT)[name]
    golden = load_golden(live, name)
    directory = write_case(tmp_path, case, json.loads((live / f"{name}.json").read_text()))
    check_logits(directory, case, golden["logits"], "float32", 1e-4)
    if "greedy" in golden:
        check_greedy(directory, case, golden["greedy"])
    if any(key.startswith("gradient/") for key in golden):
        check_gradients(directory, case, golden)
