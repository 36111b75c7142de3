"""The example programs do what they say."""

import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax import core
from echorl_jax.types import StepData

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
    step = StepData.plain(
        rewards=jnp.array([1.0, 1.0, 0.0]),
        group=jnp.array([0, 0, 0]),
        num_groups=1,
        mask=jnp.array([[True, True]] * 3),
        token_entropy=jnp.array([[0.5, 1.5]] * 3),
    )
    assert core.compute_advantages(step, objective).tolist() == [0.5, 0.5, -0.5]
    # (1 - 2/3) / 0.57735 = 0.57735 for a success, spread over its tokens by 0.5 and 1.5.
    by_surprise = core.load_objective("custom_objective:by_surprise")
    found = core.compute_advantages(step, by_surprise)
    np.testing.assert_allclose(found[0], [0.288675, 0.866025], rtol=1e-4)


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
