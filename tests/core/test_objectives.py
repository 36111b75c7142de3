"""The table, and objectives that live outside the package."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from echorl_jax import core
from echorl_jax.types import StepData

OUTSIDE = """
import jax.numpy as jnp
from echorl_jax.core import Objective

def above_half(step, objective):
    return step.rewards - 0.5

def likelihood_ratio(logprobs, batch, objective):
    return -batch.advantages[:, None] * logprobs

objective = Objective(advantages=above_half, token_loss=likelihood_ratio)
not_one = 3
"""


def test_the_table_is_complete():
    named = (
        "grpo dr_grpo dapo gspo cispo rloo reinforce_pp reinforce_pp_baseline luffy uft sft kl_cov "
        "clip_cov rl_zvp maxrl sapo dppo_tv dppo_kl gmpo luspo scale_rl psr nsr w_reinforce "
        "ordergrad curverl lite_ppo avspo mcpo vespo m2po topr"
    )
    assert set(named.split()) <= set(core.OBJECTIVES)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("grpo", {"trust_bound": 0.1}),
        ("sapo", {"epsilon_low": 0.1}),
        ("rloo", {"baseline": "on_policy"}),
        ("maxrl", {"virtual_rewards": 2}),
        ("topr", {"dual_clip": 3.0}),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(name, setting):
    with pytest.raises(ValueError, match=f"'{name}' has no use for {next(iter(setting))}"):
        core.load_objective(name, **setting)


@pytest.mark.parametrize(
    ("setting", "needed"),
    [
        ({"importance_high": 3.0}, {"importance_mask": "sequence"}),
        ({"importance_low": 0.5}, {"importance_mask": "token"}),
        ({"entropy_kappa": 4.0}, {"entropy_alpha": 0.4}),
        ({"kl_estimator": "k2"}, {"kl_coef": 0.01}),
    ],
)
def test_a_setting_that_needs_another_is_refused_alone(setting, needed):
    (name,), (other,) = setting, needed
    with pytest.raises(ValueError, match=f"{name} does nothing without {other}"):
        core.load_objective("dapo", **setting)
    assert getattr(core.load_objective("dapo", **setting, **needed), name) == setting[name]


def test_every_public_function_shows_an_example():
    functions = [f for f in map(vars(core).get, core.__all__) if inspect.isfunction(f)]
    assert len(functions) > 30
    assert [f.__name__ for f in functions if ">>>" not in (f.__doc__ or "")] == []


def test_none_keeps_the_objectives_own_setting():
    objective = core.load_objective("dapo", epsilon_low=0.1, epsilon_high=None)
    assert (objective.epsilon_low, objective.epsilon_high) == (0.1, 0.28)
    assert hash(core.load_objective("dapo")) == hash(core.OBJECTIVES["dapo"])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("grop", {}, "did you mean 'grpo'"),
        ("grpo", {"epsilon_lo": 0.1}, "did you mean 'epsilon_low'"),
        ("no_such_package.module:objective", {}, "no_such_package"),
        ("outside:not_one", {}, "outside:not_one"),
        ("outside:absent", {}, "outside:absent"),
    ],
)
def test_mistakes_are_named(name, settings, message, outside):
    with pytest.raises(ValueError, match=message):
        core.load_objective(name, **settings)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_an_objective_by_import_path(outside):
    objective = core.load_objective("outside:objective", aggregation="seq-mean-token-sum")
    assert objective.aggregation == "seq-mean-token-sum"
    step = StepData.plain(rewards=jnp.array([1.0, 0.0]), group=jnp.array([0, 0]), num_groups=1)
    advantages = core.compute_advantages(step, objective)
    assert advantages.tolist() == [0.5, -0.5]


def test_extreme_ratios_stay_finite():
    logprobs = jnp.array([[-200.0, 0.0]])
    old = jnp.array([[0.0, -200.0]])
    for advantage in (1.0, -1.0):

        def total(x, advantage=advantage):
            ratio = core.token_log_ratio(x, old)
            return jnp.sum(
                core.policy_loss(ratio, jnp.array([advantage]), epsilon_low=0.2, epsilon_high=0.2)
            )

        value, slope = jax.value_and_grad(total)(logprobs)
        assert jnp.isfinite(value) and jnp.isfinite(slope).all()


def test_dual_clip_bounds_only_negative_advantages():
    log_ratio = jnp.log(jnp.array([[50.0], [50.0]]))
    loss = core.policy_loss(log_ratio, jnp.array([1.0, -1.0]), epsilon_high=100.0, dual_clip=10.0)
    assert loss[0, 0].item() == pytest.approx(-50.0, rel=1e-5) and loss[1, 0].item() == 10.0


def test_unknown_estimator_and_bound_are_refused():
    with pytest.raises(ValueError, match="k3"):
        core.kl_penalty(jnp.zeros((1, 1)), jnp.zeros((1, 1)), estimator="k4")
    with pytest.raises(ValueError, match="dual_clip"):
        core.policy_loss(jnp.zeros((1, 1)), jnp.zeros(1), dual_clip=0.5)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        core.policy_loss(jnp.zeros((2, 1)), jnp.zeros(3))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("from math import no_such_name", "ImportError"),
        ("def push(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("raise ValueError('two\\nlines')", "two"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line_that_names_it(
    tmp_path, monkeypatch, text, reason
):
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"{name}:mine") as caught:
        core.load_objective(f"{name}:mine")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
