"""Values and gradients of public code of 2026 (TRL, verl, SkyRL, prime-rl, OrderGrad and others).

Every key of the file is compared to 1e-5, or stands in ``ELSEWHERE`` with the reason why it is not
ours. ``ECHORL_GOLDEN2`` names another file with keys of the same kinds, or its directory. A name's
part after ``@`` is the reference where references differ.
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

# Patterns of keys (without the seed) that are not ours, with the reason.
ELSEWHERE = {
    r"advantage/maxrl_real$": "divides by negative means, which turns every sign; ours is 0 there",
    r"advantage/maxrl_ragged@(prime|authors)": "a group of one keeps A = r here",
    r"advantage/(grpo_passk|pass_at_)": "OrderGrad's max is the pass@k that is built",
    r"advantage/gdpo": "several rewards kept apart are not part of an objective here",
    r"const/avspo/\w+/(none|batch)": "advantages that are not divided by the group's deviation",
    r"const/avspo/one_group_each": "the authors' code repairs uniform batches only",
    r"weights(_empty)?/token-mean@roll": "masked positions count there",
    r"weights_empty/.*@trl": "a row without tokens counts as a row there",
    r"(loss|grad)/prime_": "adds 1e-3 (log rho)^2 on all tokens",
    r"(loss|grad)/rollout_is": "drops tokens by a ratio of its own; importance_mask is the option",
    r"(loss|grad)(_far)?/dro_": "not built",
    r"(loss|grad)/vespo_.*_tis": "the importance weights are a factor here, not part of W",
    r"(loss|grad)(_far)?/kl_k[13]\+": "value of one estimator with the gradient of another",
    r"(loss|grad)(_far)?/kl_.*@nemo": "score-function gradients and cut values",
    r"(loss|grad)(_far)?/kl_k3/": "cut to +-10 there; a large divergence keeps its gradient here",
    r"(loss|grad)/clip_.*entropy_top_0.2@authors": "denominator of the selected tokens alone",
    r"(keep|value)/entropy_top_.*@authors": "a number of tokens, ties as topk leaves them",
    r"const/entropy_top_count_.*@authors": "a number of tokens, as topk counts",
    r"is_weight/.*batch_normalised": "not built",
    r"keep/(rs_|outlier_row)": "other divergences and row maxima are not built",
    r"metric/(m2po|tis|icepop)": "numbers that are not logged here",
    r"metric/luspo": "a share of rows there, of tokens here",
    r"value/m2po": "used by the comparison of its gradient",
    r"(loss)/m2po_0.04_0.3": "floors that the authors' scripts do not set",
    r"(grad)/m2po_0.04_0.3": "floors that the authors' scripts do not set",
}


def golden_file() -> dict:
    path = Path(os.environ.get("ECHORL_GOLDEN2", Path(__file__).parents[1] / "golden"))
    path = path / "objectives2.npz" if path.is_dir() else path
    with np.load(path) as file:
        return dict(file)


GOLDEN = golden_file()


def plain(key: str) -> str:
    """The key without its seed."""
    return key if key.startswith("const/") else key.split("/", 1)[1]


def keys(*kinds: str) -> list[str]:
    """Keys of these kinds that are compared, of every seed."""
    return [
        key
        for key in GOLDEN
        if plain(key).split("/")[0] in kinds
        and not any(re.match(pattern, plain(key)) for pattern in ELSEWHERE)
    ]


def of_seed(key: str):
    seed = key.split("/")[0]
    return lambda name: jnp.asarray(GOLDEN[f"{seed}/{name}"])


def close(ours, golden):
    np.testing.assert_allclose(ours, golden, rtol=TOLERANCE, atol=TOLERANCE)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<=_)\d[\d.e-]*", text)]


def test_every_key_is_compared_or_has_a_reason():
    compared = {"weights", "weights_empty", "advantage", "keep_rows", "loss", "grad", "loss_far"}
    compared |= {"grad_far", "state", "keep", "is_weight", "value", "metric", "const"}
    rest = {
        plain(key)
        for key in GOLDEN
        if "/" in plain(key)
        and plain(key).split("/")[0] not in compared
        and not any(re.match(pattern, plain(key)) for pattern in ELSEWHERE)
    }
    assert not rest
    assert all(any(re.match(p, plain(key)) for key in GOLDEN) for p in ELSEWHERE)


@pytest.mark.parametrize("key", keys("weights", "weights_empty"))
def test_aggregation_weights(key):
    golden, name = of_seed(key), plain(key).split("/")[1]
    mask = golden("mask_empty" if "_empty" in plain(key) else "mask")
    mode = name.split("@")[0].removesuffix("_32")
    mode = "token-sum-norm" if name.endswith("norm@roll") else mode
    group = golden("group_ids")
    length = 32 if name.endswith("_32") else mask.shape[1]
    ours = core.aggregation_weights(
        mask, mode=mode, max_tokens=length, group=group, num_groups=int(group.max()) + 1
    )
    close(ours, GOLDEN[key])


def order(golden, name):
    size, samples, kind = re.match(r"order_N(\d+)_K(\d+)_(\S+)", name).groups()
    kind, _, amount = kind.partition("-")
    rewards = golden(f"order_rewards_{size}")
    ours = core.order_advantages(
        rewards.reshape(-1),
        jnp.repeat(jnp.arange(len(rewards)), int(size)),
        num_groups=len(rewards),
        samples=int(samples),
        statistic=ORDERS[kind],
        amount=float(amount or 1),
    )
    return ours.reshape(rewards.shape)


ORDERS = {
    "ReMax": "max",
    "ReMin": "min",
    "Median": "median",
    "TopM": "top",
    "TrimM": "trimmed",
    "LowerTailMean": "lower_tail",
    "UpperTailMean": "upper_tail",
}


def curve(batches, window: int):
    """Advantages of several batches ``[B, P, G]`` in a row, and the rates of the last ones."""
    past, found = [], []
    for batch in batches:
        groups, size = batch.shape
        rates = np.full(window * groups, np.nan, np.float32)
        known = [rate for step in past[-window:] for rate in step]
        rates[: len(known)] = known
        ours = core.curve_advantages(
            jnp.asarray(batch.reshape(-1), jnp.float32),
            jnp.repeat(jnp.arange(groups), size),
            jnp.asarray(rates),
            num_groups=groups,
            bins=size + 1,
        )
        found.append(ours.reshape(batch.shape))
        means = batch.mean(axis=1)
        past.append(means[(means > 0) & (means < 1)].tolist())
    return np.stack(found), sorted(rate for step in past[-window:] for rate in step)


def advantage(golden, name):
    base, *_ = name.split("@")
    if base.startswith("curverl"):
        return curve(np.asarray(golden("curve_rewards")), window=2)[0]
    if base.startswith("order_"):
        return order(golden, base)
    real, ragged = base.endswith("_real"), base.endswith("_ragged")
    rewards = golden("rewards_real" if real else "rewards_ragged" if ragged else "rewards")
    group = golden("group_ids_ragged" if ragged else "group_ids")
    groups = {"num_groups": int(group.max()) + 1}
    base = base.removesuffix("_real").removesuffix("_ragged")
    success, failure = VERDICTS.get(base, (None, None))
    if success is not None:
        return core.verdict_advantages(rewards > 0, success=success, failure=failure)
    if base == "maxrl":
        return core.maxrl_advantages(rewards, group, **groups)
    if base == "entropy_0.4_2":
        shaped = core.entropy_shaped_advantages(golden("advantages")[:, 0], golden("entropies"))
        return shaped * golden("mask")
    if base == "rlzvp_0.1":
        mixed = core.group_advantages(rewards, group, **groups)
        mask, entropy = golden("mask") > 0, golden("entropies")
        return core.zero_variance_advantages(mixed, rewards > 0, group, entropy, mask, **groups)
    spread = "batch_centred" if "centred" in base else "batch" if "batch" in base else "group"
    eps = numbers(base)[0] if "std" in base else 1e-6
    return core.group_advantages(
        rewards, group, std_of=spread, eps=eps, divide_by_std=base != "group_mean", **groups
    )


VERDICTS = {"psr": (1.0, 0.0), "nsr": (0.0, 1.0), "w_reinforce_0.1": (0.1, 1.0)}


@pytest.mark.parametrize("key", keys("advantage"))
def test_advantage(key):
    close(advantage(of_seed(key), plain(key).split("/")[1]), GOLDEN[key])


@pytest.mark.parametrize("key", keys("state"))
def test_success_rates_in_the_window(key):
    close(curve(np.asarray(of_seed(key)("curve_rewards")), window=2)[1], GOLDEN[key])


@pytest.mark.parametrize("key", keys("keep_rows"))
def test_rows_that_stay_in_the_batch(key):
    kept = advantage(of_seed(key), plain(key).split("/")[1]) != 0
    assert kept.tolist() == (GOLDEN[key] > 0).tolist()


def no_loss(logprobs, batch, objective):
    return jnp.zeros_like(logprobs)


# Parts of a name, the first that fits: settings of the objective, from the numbers in it.
BASES = {
    r"ppo_clip": lambda n: {"epsilon_low": n[0], "epsilon_high": n[0], "dual_clip": 3.0},
    r"two_sided": lambda n: {"epsilon_low": n[0], "epsilon_high": n[1], "dual_clip": n[2]},
    r"clip_0.2\+": lambda n: {"epsilon_low": 0.2, "epsilon_high": 0.2},
    r"clip": lambda n: {"epsilon_low": n[0], "epsilon_high": n[1]},
}
PARTS = {
    r"tis_token": lambda n: {"tis_cap": n[0]},
    r"tis_sequence": lambda n: {"tis_cap": n[0], "importance_weight": "sequence"},
    r"icepop_token": lambda n: {
        "importance_weight": "token",
        "importance_mask": "token",
        "importance_low": n[0],
        "importance_high": n[1],
    },
    r"mask_sequence": lambda n: {
        "importance_weight": "sequence",
        "importance_mask": "sequence",
        "importance_low": n[0] if n[1:] else 0.0,
        "importance_high": n[-1],
    },
    r"geometric_mask_token_weight": lambda n: {
        "importance_weight": "token",
        "importance_mask": "geometric",
        "importance_low": n[0],
        "importance_high": n[1],
    },
    r"opsm": lambda n: {"drift_limit": n[0]},
}


def objective_of(name: str) -> core.Objective:
    """Our objective with the settings that a key's name carries."""
    table, found = core.OBJECTIVES, numbers(name.split("@")[0])
    base, *parts = name.split("@")[0].split("+")
    kind = base.split("_")[0]
    if kind in ("gspo", "luspo"):
        return dataclasses.replace(table[kind], epsilon_low=found[0], epsilon_high=found[1])
    if kind in ("sapo", "topr", "vespo"):
        return table[kind]
    if kind == "m2po":
        return dataclasses.replace(table[kind], second_moment=found[0])
    if kind == "gmpo":
        return table["gmpo"]
    if kind == "dppo":
        cap = found[1] if found[1:] else 1e9
        made = table["_".join(base.split("_")[:2])]
        return dataclasses.replace(made, trust_bound=found[0], ratio_cap=cap)
    if kind == "cispo":
        low, high = (None, found[0] - 1) if "_cap_" in base else found
        return dataclasses.replace(table["cispo"], epsilon_low=low, epsilon_high=high)
    if kind == "kl":
        estimator = base.removeprefix("kl_").replace("_unclamped", "")
        zero = dataclasses.replace(table["sft"], token_loss=no_loss)
        return dataclasses.replace(zero, kl_coef=1.0, kl_estimator=estimator)
    if kind == "vapo":
        return dataclasses.replace(table["sft"], token_loss=no_loss)
    for pattern, settings in BASES.items():
        if re.match(pattern, base.removeprefix("token_advantages_") + ("+" if parts else "")):
            made = core.Objective(**settings(found))
            for part in parts:
                for pattern, settings in PARTS.items():
                    if part.startswith(pattern):
                        made = dataclasses.replace(made, **settings(numbers(part)))
            return made
    raise KeyError(name)


def batch_of(golden, name: str, aggregation: str, far: bool) -> TrainBatch:
    """The rows as the update would make them, with the weights of the aggregation."""
    mask, group = golden("mask"), golden("group_ids")
    old = golden("old_logprobs_far" if far else "old_logprobs")
    rollout = golden("rollout_logprobs")
    if "_sampler" in name and not name.startswith("clip"):
        old = rollout
    behaviour = old if "opsm" in name and "_sampler" not in name else rollout
    mode = {"seq-mean": "seq-mean-token-mean"}.get(aggregation.removesuffix("_32"))
    weights = core.aggregation_weights(
        mask,
        mode=mode or aggregation.removesuffix("_32"),
        max_tokens=32 if aggregation.endswith("_32") else mask.shape[1],
        group=group,
        num_groups=int(group.max()) + 1,
    )
    token_level = name.startswith("token_advantages")
    advantages = golden("token_advantages") if token_level else golden("advantages")[:, 0]
    if "entropy_top" in name:
        top = core.top_entropy_tokens(golden("entropies"), mask > 0, fraction=0.2)
        advantages = jnp.where(top, advantages[:, None], 0.0)
    echo = jnp.zeros_like(mask)
    if "vapo_nll" in name:
        right = mask * golden("rewards")[:, None]
        echo = right / right.sum()
    return TrainBatch.plain(
        tokens=jnp.zeros(mask.shape, jnp.int32),
        prompt_length=jnp.zeros(mask.shape[0], jnp.int32),
        length=jnp.zeros(mask.shape[0], jnp.int32),
        loss_mask=mask,
        advantages=advantages,
        old_logprobs=old,
        rollout_logprobs=behaviour,
        token_weights=weights,
        echo_weights=echo,
        on_policy=jnp.ones(mask.shape[0], jnp.bool_),
        ref_logprobs=old if far else golden("ref_logprobs"),
    )


def total(logprobs, batch, objective, echo_coef):
    entropy = jnp.zeros_like(logprobs)
    value, terms = core.batch_loss(logprobs, entropy, batch, objective, echo_coef=echo_coef)
    return value, terms


value_and_slope = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=2)


@pytest.mark.parametrize("key", keys("loss", "loss_far"))
def test_loss_and_gradient(key):
    golden = of_seed(key)
    kind, name, aggregation = plain(key).split("/")
    far = kind == "loss_far"
    objective = objective_of(name)
    logprobs = golden("logprobs_far" if far else "logprobs")
    batch = batch_of(golden, name, aggregation, far)
    if objective.select_tokens is not None:
        selected = objective.select_tokens(batch, logprobs, jax.random.key(0), objective)
        batch = dataclasses.replace(batch, selected=selected)
    (value, _), slope = value_and_slope(logprobs, batch, objective, 0.1 if "vapo" in name else 0.0)
    expected = np.array(GOLDEN[key.replace("/loss", "/grad")])
    slope = np.array(slope)
    if name.startswith("topr"):
        # The reference goes by the reward's sign, ours by the advantage's.
        same = np.sign(golden("advantages")[:, 0]) == np.where(golden("rewards") > 0, 1, -1)
        slope, expected = slope[same], expected[same]
    elif name.startswith("m2po"):
        # One token sits on the bound, and clipped tokens count 0 in our value.
        free = np.array(golden("value/m2po_0.04/at_bound")) == 0
        slope, expected = slope[free], expected[free]
    elif "dppo" not in name or "@skyrl" not in name:
        # SkyRL's DPPO is -A rho, another value with the same gradient.
        close(value, GOLDEN[key])
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(slope / scale, expected / scale, atol=TOLERANCE)


@pytest.mark.parametrize("key", keys("keep"))
def test_masks(key):
    golden, name = of_seed(key), plain(key).split("/")[1]
    mask, found = golden("mask"), numbers(name.removesuffix("_sampler"))
    compared = golden("old_logprobs"), golden("rollout_logprobs"), mask
    advantages = golden("advantages")[:, 0]
    if name.startswith("dppo"):
        kept = core.dppo_kept(
            golden("logprobs"),
            golden("old_logprobs"),
            advantages,
            bound=found[0],
            divergence=name.split("_")[1],
        )
    elif name.startswith("opsm"):
        behaviour = compared[1] if name.endswith("_sampler") else compared[0]
        kept = ~core.drifted_failures(
            golden("logprobs"), behaviour, advantages, mask, delta=found[0]
        )
    elif name.startswith("entropy_top"):
        entropies = golden("entropies_tied" if "_tied" in name else "entropies")
        kept = core.top_entropy_tokens(entropies, mask > 0, fraction=0.2)
    else:
        level = {"geometric": "geometric", "product": "sequence", "token": "token"}
        kept = core.importance_mask(
            *compared, level=level[name.split("_")[0]], low=found[0], high=found[1]
        )
    assert (np.asarray(kept & (mask > 0)) == (GOLDEN[key] > 0)).all()


@pytest.mark.parametrize("key", keys("is_weight"))
def test_importance_weights(key):
    golden, name = of_seed(key), plain(key).split("/")[1]
    mask = golden("mask")
    made = objective_of(f"clip_0.2_0.28+{name}")
    compared = golden("old_logprobs"), golden("rollout_logprobs"), mask
    weights = core.importance_weights(
        *compared, level=core.importance_level(made), cap=made.tis_cap
    )
    kept = core.importance_mask(
        *compared, level=made.importance_mask, low=made.importance_low, high=made.importance_high
    )
    close(jnp.where(kept, weights, 0.0) * mask, GOLDEN[key])


@pytest.mark.parametrize("key", keys("value", "metric"))
def test_numbers_on_the_way(key):
    golden, name = of_seed(key), plain(key).split("/")[1]
    mask, old, logprobs = golden("mask"), golden("old_logprobs"), golden("logprobs")
    advantages = golden("advantages")[:, 0]
    if name.startswith("vespo"):
        loss = core.vespo_loss(logprobs, old, advantages, mask)
        phi = np.asarray(loss / logprobs / jnp.where(advantages == 0, 1.0, -advantages)[:, None])
        acts = np.asarray(advantages != 0)
        close(phi[acts, 0], GOLDEN[key].reshape(len(acts), -1)[acts, 0])
        return
    objective = objective_of(name)
    kept = core.dppo_kept(
        logprobs,
        old,
        advantages,
        bound=objective.trust_bound,
        divergence=objective.trust_divergence,
    )
    close(np.asarray(~kept)[np.asarray(mask) > 0].mean(), GOLDEN[key])


def test_constants():
    const = {key.removeprefix("const/"): GOLDEN[key] for key in keys("const")}
    group = jnp.asarray(const.pop("maxrl/group_ids"))
    ours = core.maxrl_advantages(jnp.asarray(const.pop("maxrl/rewards")), group, num_groups=2)
    np.testing.assert_allclose(ours, const.pop("maxrl/advantage"), atol=1e-4)
    rewards, group = (jnp.asarray(const.pop(f"rlzvp/{name}")) for name in ("rewards", "group_ids"))
    entropies = jnp.asarray(const.pop("rlzvp/entropies"))
    ours = core.zero_variance_advantages(
        core.group_advantages(rewards, group, num_groups=3),
        rewards > 0,
        group,
        entropies,
        entropies > 0,
        num_groups=3,
    )
    np.testing.assert_allclose(ours, const.pop("rlzvp/advantage_alpha_0.1"), atol=1e-4)
    for case in ("all_right", "all_wrong"):
        rewards = jnp.asarray(const.pop(f"avspo/{case}/rewards"))
        group = jnp.arange(8) // 4
        ours = core.group_advantages(rewards, group, num_groups=2, virtual_rewards=1)
        # The reference adds 1e-4 to the deviation.
        np.testing.assert_allclose(ours, const.pop(f"avspo/{case}/group"), atol=2e-4)
    for case in ("zero_and_one", "single_bin", "two_bins"):
        rewards = const.pop(f"curverl/{case}/rewards").reshape(1, -1, 4)
        close(curve(rewards, 10)[0].reshape(-1), const.pop(f"curverl/{case}/advantage"))
    lagged = np.stack([const.pop(f"curverl/lagged/rewards_{i}").reshape(1, 4) for i in (1, 2)])
    found, pool = curve(lagged, 10)
    close(found[1].reshape(-1), const.pop("curverl/lagged/advantage_2"))
    close(pool, const.pop("curverl/lagged/pool"))
    for name in [name for name in const if name.startswith("order_alpha/")]:
        samples, kind = re.match(r"order_alpha/K(\d+)_(\S+)", name).groups()
        kind, _, amount = kind.partition("-")
        close(core.rank_weights(ORDERS[kind], int(samples), float(amount or 1)), const.pop(name))
    for name in [name for name in const if name.startswith("entropy_top_count_")]:
        fraction = float(name.split("_")[3].split("@")[0])
        entropies, masks = jnp.arange(40.0)[None], jnp.tri(40, dtype=bool)[:, None]
        kept = [core.top_entropy_tokens(entropies, mask, fraction=fraction) for mask in masks]
        assert [row.sum() for row in kept] == const.pop(name).astype(int).tolist()
    assert not const
