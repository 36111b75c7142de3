"""Values and gradients of the reference implementations (verl, LUFFY), key by key.

Every key of the file is an input, an advantage or a loss with its gradient; a key of another kind
fails. ``ECHORL_GOLDEN`` names another file with keys of the same kinds, or its directory. What the
references do that is not our default is set here, and stands in docs/method.md: verl bounds the
clipped loss at A < 0 by c = 3 unless told otherwise; LUFFY clips on-policy tokens from below.
"""

import dataclasses
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax import core
from echorl_jax.types import TrainBatch

TOLERANCE = 1e-5
INPUTS = {
    "old_logprobs",
    "logprobs",
    "ref_logprobs",
    "mask",
    "rewards",
    "group_ids",
    "group_size",
    "advantages",
    "offpolicy_mask",
}


def golden_file() -> dict:
    path = Path(os.environ.get("ECHORL_GOLDEN", Path(__file__).parents[1] / "golden"))
    path = path / "objectives.npz" if path.is_dir() else path
    with np.load(path) as file:
        return dict(file)


GOLDEN = golden_file()


def keys(kind: str) -> list[str]:
    return [key for key in GOLDEN if key.split("/")[1] == kind]


def of_seed(key: str):
    seed = key.split("/")[0]
    return lambda name: jnp.asarray(GOLDEN[f"{seed}/{name}"])


def test_every_key_is_known():
    kinds = {key.split("/")[1] for key in GOLDEN}
    assert kinds <= INPUTS | {"advantage", "loss", "grad"}
    assert {key.replace("/grad/", "/loss/") for key in keys("grad")} == set(keys("loss"))


ADVANTAGES = {
    "grpo": lambda r, g, n, lengths, own: core.group_advantages(r, g, num_groups=n),
    "drgrpo": lambda r, g, n, lengths, own: core.group_advantages(
        r, g, num_groups=n, divide_by_std=False
    ),
    "luffy_split": lambda r, g, n, lengths, own: core.group_advantages(
        r, g, num_groups=n, on_policy=own
    ),
    "rloo": lambda r, g, n, lengths, own: core.rloo_advantages(r, g, num_groups=n),
    "opo": lambda r, g, n, lengths, own: core.opo_advantages(r, g, lengths, num_groups=n),
    "reinforce_pp": lambda r, g, n, lengths, own: core.whitened_advantages(
        r, g, lengths, num_groups=n
    ),
    "reinforce_pp_baseline": lambda r, g, n, lengths, own: core.whitened_advantages(
        r, g, lengths, num_groups=n, group_baseline=True
    ),
}


@pytest.mark.parametrize("key", keys("advantage"))
def test_advantage(key):
    golden, name = of_seed(key), key.split("/", 2)[2]
    mask, group = golden("mask"), golden("group_ids")
    own = ~jnp.any(golden("offpolicy_mask"), axis=1)
    groups = int(group.max()) + 1
    ours = ADVANTAGES[name](golden("rewards"), group, groups, jnp.sum(mask, axis=1), own)
    # The reference spreads a rollout's advantage over its tokens.
    np.testing.assert_allclose(ours[:, None] * mask, golden(f"advantage/{name}"), atol=TOLERANCE)


def reference_objective(name: str, numbers: list[float]) -> core.Objective:
    """Our objective with the settings that a key's name carries, as in ``gspo_3e-4_4e-4``."""
    table = core.OBJECTIVES
    kind = name.split("_", 1)[0]
    if kind == "ppo":
        low = high = numbers[0]
        return core.Objective(epsilon_low=low, epsilon_high=high, dual_clip=3.0)
    if kind == "dapo":
        low, high = numbers
        return dataclasses.replace(table["dapo"], epsilon_low=low, epsilon_high=high, dual_clip=3.0)
    if kind in ("gspo", "cispo"):
        low, high = numbers
        return dataclasses.replace(table[kind], epsilon_low=low, epsilon_high=high)
    if name.startswith("kl_cov"):
        return dataclasses.replace(table["kl_cov"], selected_fraction=numbers[0])
    if kind == "kl":
        estimator = name.removeprefix("kl_")
        zero = dataclasses.replace(table["sft"], token_loss=no_loss)
        return dataclasses.replace(zero, kl_coef=1.0, kl_estimator=estimator)
    if kind == "luffy":
        return dataclasses.replace(table["luffy"], shaping=numbers[0], epsilon_low=0.2)
    return table[kind]


def no_loss(logprobs, batch, objective):
    return jnp.zeros_like(logprobs)


@jax.jit
def golden_batch(golden: dict, weights, selected) -> TrainBatch:
    rows = golden["mask"].shape[0]
    return TrainBatch(
        tokens=jnp.zeros(golden["mask"].shape, jnp.int32),
        prompt_length=jnp.zeros(rows, jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
        loss_mask=golden["mask"],
        advantages=golden["advantages"][:, 0],
        old_logprobs=golden["old_logprobs"],
        rollout_logprobs=golden["old_logprobs"],
        token_weights=weights,
        echo_weights=jnp.zeros_like(golden["mask"]),
        on_policy=~jnp.any(golden["offpolicy_mask"], axis=1),
        ref_logprobs=golden["ref_logprobs"],
        selected=selected,
    )


def total(logprobs, batch, objective):
    return core.batch_loss(logprobs, jnp.zeros_like(logprobs), batch, objective, echo_coef=0.0)[0]


value_and_slope = jax.jit(jax.value_and_grad(total), static_argnums=2)


@pytest.mark.parametrize("key", keys("loss"))
def test_loss_and_gradient(key):
    golden = of_seed(key)
    _, _, name, aggregation = key.split("/")
    numbers = [float(number) for number in re.findall(r"(?<=_)\d[\d.e-]*", name)]
    objective = reference_objective(name, numbers)
    mask = golden("mask")
    # The name has another meaning in verl since February 2026, and here.
    mode = {"seq-mean-token-sum-norm": "token-sum-norm"}.get(aggregation, aggregation)
    weights = core.aggregation_weights(mask, mode=mode, max_tokens=mask.shape[1])
    inputs = {field: golden(field) for field in INPUTS - {"group_size"}}
    selected = None
    if objective.select_tokens is not None:
        slope = golden(f"grad/{name}/{aggregation}") / jnp.where(mask > 0, weights, 1.0)
        selected = reference_selection(golden, objective, slope)
    batch = golden_batch(inputs, weights, selected)
    value, slope = value_and_slope(golden("logprobs"), batch, objective)
    np.testing.assert_allclose(value, golden(f"loss/{name}/{aggregation}"), atol=TOLERANCE)
    np.testing.assert_allclose(slope, golden(f"grad/{name}/{aggregation}"), atol=TOLERANCE)


def reference_selection(golden, objective, slope):
    """Our tokens for KL-Cov, except that a tie for the last place is broken as the reference did.

    Which of several equal covariances ``torch.topk`` returns is undefined; ours are the first. The
    reference's pick shows in its gradient: a selected token adds 1 or -1 to the plain -A rho.
    """
    logprobs, advantages = golden("logprobs"), golden("advantages")[:, 0]
    old_logprobs, mask = golden("old_logprobs"), golden("mask") > 0
    fraction = objective.selected_fraction
    ours = core.kl_cov_selection(logprobs, advantages, mask, fraction=fraction)
    covariance = core.token_covariance(logprobs, advantages, mask)
    last = jnp.min(jnp.where(ours, covariance, jnp.inf))
    tied = mask & (jnp.abs(covariance - last) < 1e-6)
    plain = -advantages[:, None] * jnp.exp(logprobs - old_logprobs)
    selected = jnp.where(tied, jnp.abs(slope - plain) > 0.5, ours)
    assert selected.sum() == ours.sum()
    return selected
