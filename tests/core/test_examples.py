"""The example programs do what they say."""

import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from echorl_jax import core

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_compose_learns_its_task(capsys):
    source = EXAMPLES / "compose.py"
    assert len(source.read_text().splitlines()) < 80
    # optax itself multiplies integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        runpy.run_path(str(source), run_name="__main__")
    first, *_, last = capsys.readouterr().out.splitlines()
    assert float(first.split()[3]) < 0.5 and float(last.split()[3]) > 0.9


def test_custom_objective_by_import_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    objective = core.load_objective("custom_objective:half_baseline", entropy_coef=0.1)
    assert objective.entropy_coef == 0.1
    advantages = objective.advantages(
        jnp.array([1.0, 1.0]), jnp.array([0, 0]), num_groups=1, lengths=None, on_policy=None
    )
    assert advantages.tolist() == [0.5, 0.5]


def test_custom_grader_by_import_path_in_a_process_of_its_own():
    program = (
        "from echorl_jax.rewards import load_grader\n"
        "grade = load_grader('custom_objective:ends_with_answer')\n"
        "row = {'reward_model': {'ground_truth': '42'}}\n"
        "print(grade('it is 42', row).correct, grade('it is 41', row).correct)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}", "JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.split() == ["True", "False"]
