"""The example programs do what they say."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax import core
from echorl_jax.custom import load_custom
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


def test_the_snippet_of_the_readme_runs_and_has_the_gradient_of_its_clip():
    readme = (EXAMPLES.parent / "README.md").read_text()
    (snippet,) = [
        block.removeprefix("python\n")
        for block in readme.split("```")
        if block.startswith("python\n") and "mine_echo_clips" in block
    ]
    # Two prompts of two rows; token 9 ends a step. Row 1 is right; its second step has the highest
    # entropy, so the clip is its first four tokens.
    ids = jnp.array([[1, 9, 2, 9, 3, 3]] * 4)
    entropy = jnp.array([[0.1, 0.1, 0.9, 0.9, 0.2, 0.2]] * 4)

    def loss(logprobs):
        names = {
            "completion_ids": ids,
            "completion_mask": jnp.ones((4, 6)),
            "is_delimiter": jnp.arange(10) == 9,
            "token_entropy": entropy,
            "correct": jnp.array([False, True, False, False]),
            "group": jnp.array([0, 0, 1, 1]),
            "P": 2,
            "policy_loss": 7.0,
            "logprobs": logprobs,
        }
        exec(snippet, names)
        return names["loss"]

    value, slope = jax.value_and_grad(loss)(jnp.full((4, 6), -0.5))
    expected = np.zeros((4, 6))
    expected[1, :4] = -1e-3 / 4
    np.testing.assert_allclose(value, 7.0 + 1e-3 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(slope, expected, atol=1e-9)


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


def test_custom_clip_rule_and_metric_of_the_example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    entropy = jnp.array([[0.1, 0.9, 0.4, 0.4, 0.4]])
    # Sums: 0.1, 0.9 and 1.2, so the clip is the whole row.
    clips = core.mine_echo_clips(
        entropy,
        jnp.array([[0, 1, 2, 2, 2]]),
        jnp.array([True]),
        jnp.array([0]),
        num_groups=1,
        num_steps=3,
        select=core.load_clip_rule("custom_objective:surprising_and_long"),
    )
    assert clips.length.item() == 5
    rollouts = SimpleNamespace(
        completion_ids=np.array([[7, 7, 7, 1], [5, 6, 6, 6]]), completion_length=np.array([3, 2])
    )
    repeated = load_custom("custom_objective:repeated_tokens", "metric")
    assert repeated(rollouts) == 2 / 3  # 7 7 7 has two pairs, 5 6 one that differs
