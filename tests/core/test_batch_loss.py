"""The total loss, for every objective: splits, order, padding, meshes, NaN, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from echorl_jax import core
from echorl_jax.types import StepData, TrainBatch

ROWS, LENGTH, PROMPTS = 8, 6, 2
ECHO = np.float32(0.5)


def distinct_losses() -> list[str]:
    """The first objective of each kind of token loss; advantages are data of the batch's loss."""
    first: dict[tuple, str] = {}
    for name, objective in core.OBJECTIVES.items():
        bounds = objective.epsilon_low, objective.epsilon_high, objective.dual_clip
        kind = (
            *(objective.token_loss, objective.log_ratio, objective.select_tokens),
            *(objective.trust_divergence, core.token_level(objective)),
            *(bound is None for bound in bounds),
        )
        first.setdefault(kind, name)
    return list(first.values())


NAMES = distinct_losses()


def full(name: str) -> core.Objective:
    """The objective with every optional term switched on."""
    objective = core.OBJECTIVES[name]
    return dataclasses.replace(
        objective,
        kl_coef=0.02,
        entropy_coef=0.03,
        nll_coef=0.04,
        tis_cap=1.2,
        selected_fraction=0.1,
    )


def example(objective: core.Objective, seed: int = 0) -> tuple[np.ndarray, np.ndarray, TrainBatch]:
    """Log-probabilities, entropies and a batch as the loop would make it; one row is empty."""
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < np.array([6, 5, 0, 3, 6, 1, 4, 2])[:, None]
    old = -3 * rng.random((ROWS, LENGTH))
    logprobs = old + rng.normal(0, 0.3, old.shape)
    rewards = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    group = jnp.array([0, 1, 0, 1, 0, 1, 0, 1])
    on_policy = jnp.array([True, True, True, False, True, True, False, True])
    f32 = functools.partial(np.asarray, dtype=np.float32)
    loss_mask = f32(mask)
    entropy = f32(rng.random(old.shape))
    step = StepData.plain(
        rewards=rewards,
        group=group,
        num_groups=PROMPTS,
        mask=jnp.asarray(mask),
        on_policy=on_policy,
        token_entropy=entropy,
    )
    advantages = core.compute_advantages(step, objective)
    clips = core.mine_echo_clips(
        entropy,
        jnp.where(mask, 0, -1),
        rewards > 0,
        group,
        num_groups=PROMPTS,
        num_steps=1,
        on_policy=on_policy,
    )
    batch = TrainBatch(
        tokens=jnp.zeros((ROWS, LENGTH), jnp.int32),
        prompt_length=jnp.zeros(ROWS, jnp.int32),
        length=jnp.asarray(mask.sum(1), jnp.int32),
        loss_mask=loss_mask,
        advantages=advantages,
        old_logprobs=f32(old),
        rollout_logprobs=f32(old + rng.normal(0, 0.2, old.shape)),
        token_weights=core.aggregation_weights(
            loss_mask,
            mode=objective.aggregation,
            max_tokens=LENGTH,
            group=group,
            num_groups=PROMPTS,
        ),
        echo_weights=core.clip_weights(clips, (ROWS, LENGTH)),
        on_policy=on_policy,
        nll_weights=f32(rng.random(old.shape) * mask * (rng.random(old.shape) < 0.3)),
        ref_logprobs=f32(old + rng.normal(0, 0.2, old.shape)),
        solved=group == 1 if objective.acts_on_solved else None,
    )
    logprobs = f32(logprobs)
    if objective.select_tokens is not None:
        selected = objective.select_tokens(batch, logprobs, jax.random.key(0), objective)
        batch = dataclasses.replace(batch, selected=selected)
    return logprobs, entropy, jax.tree.map(np.asarray, batch)


def total(inputs, batch, objective, echo_coef):
    return core.batch_loss(*inputs, batch, objective, echo_coef=echo_coef)


value_and_slopes = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=2)


def close(got, expected, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol), got, expected)


def rows(tree, index, pad_to):
    """Some rows, then rows of padding that hold NaN where no weight says what to do with it."""

    def take(x):
        padding = np.full((pad_to - len(index), *x.shape[1:]), np.nan if x.ndim > 1 else 0)
        return np.concatenate([x[index], padding.astype(x.dtype)])

    return jax.tree.map(take, tree)


def without_weights(batch, kept):
    """Padding rows have all weights 0."""
    fields = ("loss_mask", "token_weights", "echo_weights", "nll_weights")
    zeroed = {}
    for field in fields:
        value = vars(batch)[field].copy()
        value[kept:] = 0.0
        zeroed[field] = value
    return dataclasses.replace(batch, **zeroed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_any_split_order_and_padding_adds_up_to_the_whole(name):
    objective = full(name)
    logprobs, entropy, batch = example(objective)
    rng = np.random.default_rng(1)
    for echo_coef in (np.float32(0.0), ECHO):
        (whole, terms), slopes = value_and_slopes((logprobs, entropy), batch, objective, echo_coef)
        order = rng.permutation(ROWS)
        cuts = np.sort(rng.integers(0, ROWS + 1, 3))
        parts, sums, gathered = 0.0, None, (np.zeros_like(logprobs), np.zeros_like(entropy))
        for index in np.split(order, cuts):
            piece = without_weights(rows(batch, index, ROWS), len(index))
            inputs = rows((logprobs, entropy), index, ROWS)
            (value, part), slope = value_and_slopes(inputs, piece, objective, echo_coef)
            parts += value
            sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
            for target, source in zip(gathered, slope, strict=True):
                assert not source[len(index) :].any()
                target[index] = source[: len(index)]
        close((parts, sums, gathered), (whole, terms, slopes))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_number_shows_and_an_unused_one_does_not(name):
    objective = full(name)
    logprobs, entropy, batch = example(objective)
    real, unused = logprobs.copy(), logprobs.copy()
    real[0, 2] = np.nan
    unused[batch.loss_mask == 0] = np.nan
    batch.old_logprobs[batch.loss_mask == 0] = np.nan
    batch.rollout_logprobs[batch.loss_mask == 0] = -np.inf
    (value, _), slopes = value_and_slopes((real, entropy), batch, objective, ECHO)
    assert np.isnan(value) and np.isnan(slopes[0][0]).any()
    (value, _), slopes = value_and_slopes((unused, entropy), batch, objective, ECHO)
    assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)
    assert not slopes[0][batch.loss_mask == 0].any()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_learn_is_exactly_zero(name):
    objective = full(name)
    logprobs, entropy, batch = example(objective)
    empty = without_weights(batch, 0)
    logprobs[0, 0] = np.nan
    (value, terms), slopes = value_and_slopes((logprobs, entropy), empty, objective, ECHO)
    assert value == 0.0 and not any(slope.any() for slope in slopes)
    assert all(leaf == 0.0 for leaf in jax.tree.leaves(terms))
    assert terms["loss/policy"].mean() == 0.0


# Every kind of token loss once. Not those of CISPO, DPPO, VESPO and TOPR: their weight is a
# constant by design, so their gradient is not that of their value; golden gradients test them.
@pytest.mark.parametrize(
    "name",
    ("grpo dapo gspo rloo luffy sft kl_cov clip_cov sapo gmpo rl_zvp mcpo m2po").split(),
)
def test_gradient_against_central_differences(name):
    objective = full(name)
    if name == "gspo":
        # Its token form has the gradient of its value while a sequence's tokens weigh the same.
        objective = dataclasses.replace(objective, tis_cap=None)
    made = example(objective)
    with jax.enable_x64(True):
        logprobs, entropy, batch = jax.tree.map(
            lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else x, made
        )

        def value(inputs):
            return total(inputs, batch, objective, 0.5)[0]

        slopes = jax.jit(jax.grad(value))((logprobs, entropy))
        # [sign, moved entry, logprobs or entropy, B, T].
        moves = 1e-5 * np.eye(2 * ROWS * LENGTH).reshape(-1, 2, ROWS, LENGTH)
        moves = np.stack([moves, -moves])
        points = logprobs + moves[:, :, 0], entropy + moves[:, :, 1]
        up, down = jax.jit(jax.vmap(jax.vmap(value)))(points)
        numeric = np.asarray((up - down) / 2e-5).reshape(2, ROWS, LENGTH)
        close(tuple(numeric), slopes, atol=1e-8)


def test_the_sum_of_all_terms_by_hand():
    objective = core.Objective(kl_coef=2.0, kl_estimator="k1", entropy_coef=3.0, nll_coef=5.0)
    batch = TrainBatch(
        tokens=jnp.zeros((1, 2), jnp.int32),
        prompt_length=jnp.array([0]),
        length=jnp.array([2]),
        loss_mask=jnp.array([[1.0, 0.0]]),
        advantages=jnp.array([4.0]),
        old_logprobs=jnp.array([[-1.0, -9.0]]),
        rollout_logprobs=jnp.array([[-1.0, -9.0]]),
        token_weights=jnp.array([[0.5, 0.0]]),
        echo_weights=jnp.array([[0.25, 0.25]]),
        on_policy=jnp.array([True]),
        nll_weights=jnp.array([[0.0, 1.0]]),
        ref_logprobs=jnp.array([[-1.5, -9.0]]),
    )
    logprobs, entropy = jnp.array([[-1.0, -2.0]]), jnp.array([[0.5, 7.0]])
    value, terms = core.batch_loss(logprobs, entropy, batch, objective, echo_coef=8.0)
    # policy 0.5 * -4; kl 2 * 0.5 * 0.5; entropy -3 * 0.5 * 0.5; echo 8 * 0.25 * (1 + 2); nll 5 * 2.
    assert value == -2.0 + 0.5 - 0.75 + 6.0 + 10.0
    assert (terms["loss/policy"].sum, terms["loss/policy"].mean()) == (-2.0, -4.0)
    assert (
        terms["loss/echo"].sum == 0.75
        and terms["loss/nll"].sum == 2.0
        and terms["kl/ref"].mean() == 0.5
    )


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_the_entropy_bonus_is_of_the_mean_entropy_whatever_adds_up_token_losses(mode):
    objective = dataclasses.replace(core.OBJECTIVES["rloo"], aggregation=mode, entropy_coef=0.5)
    logprobs, entropy, batch = example(objective)
    batch = dataclasses.replace(batch, entropy_scale=core.mean_scale(batch.token_weights))
    halves = [
        jax.tree.map(lambda x, rows=rows: x[rows], (logprobs, entropy, batch))
        for rows in (np.arange(3), np.arange(3, ROWS))
    ]
    terms = [total(half[:2], half[2], objective, 0.0)[1]["entropy/weighted"].sum for half in halves]
    real = np.asarray(batch.loss_mask) > 0
    assert sum(terms) == pytest.approx(np.asarray(entropy)[real].mean(), rel=1e-5)


def test_terms_that_are_off_need_no_field_and_have_no_gradient():
    objective = core.OBJECTIVES["dapo"]
    logprobs, entropy, batch = example(objective)
    bare = dataclasses.replace(batch, nll_weights=None, ref_logprobs=None)
    (value, terms), slopes = value_and_slopes((logprobs, entropy), bare, objective, 0.0)
    assert value == terms["loss/policy"].sum and not slopes[1].any()
    assert terms["kl/ref"].mean() == terms["loss/nll"].mean() == 0.0


def test_missing_fields_are_named():
    logprobs, entropy, batch = example(core.OBJECTIVES["grpo"])
    with pytest.raises(ValueError, match="ref_logprobs"):
        bare = dataclasses.replace(batch, ref_logprobs=None)
        core.batch_loss(logprobs, entropy, bare, core.OBJECTIVES["grpo"], echo_coef=0.0)
    with pytest.raises(ValueError, match="selected"):
        core.batch_loss(logprobs, entropy, batch, core.OBJECTIVES["kl_cov"], echo_coef=0.0)


# One objective of each kind by default; the others in the slow suite.
MESH = "grpo gspo luffy rl_zvp gmpo mcpo vespo".split()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in MESH else pytest.mark.slow)
        for name in core.OBJECTIVES
    ],
)
def test_rows_spread_over_a_mesh_and_run_without_jit(name):
    objective = full(name)
    logprobs, entropy, batch = example(objective)
    mesh = jax.make_mesh((ROWS,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(((logprobs, entropy), batch), jax.NamedSharding(mesh, jax.P("data")))
    sharded = value_and_slopes(*spread, objective, ECHO)
    close(sharded, value_and_slopes((logprobs, entropy), batch, objective, ECHO))
    with jax.disable_jit():
        close(sharded[0], total((logprobs, entropy), batch, objective, ECHO))


def test_importance_weights_only_touch_what_the_policy_sampled():
    objective = dataclasses.replace(core.OBJECTIVES["rloo"], tis_cap=2.0)
    plain = core.OBJECTIVES["rloo"]
    logprobs, entropy, batch = example(objective)
    slope = value_and_slopes((logprobs, entropy), batch, objective, 0.0)[1][0]
    base = value_and_slopes((logprobs, entropy), batch, plain, 0.0)[1][0]
    factor = np.minimum(np.exp(batch.old_logprobs - batch.rollout_logprobs), 2.0)
    factor[~batch.on_policy] = 1.0
    np.testing.assert_allclose(slope, base * factor, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_loss_hides_nan(name):
    """Neither clipping nor selection turns the NaN of a model that has failed into a number."""
    objective = dataclasses.replace(core.OBJECTIVES[name], dual_clip=3.0)
    logprobs, _, batch = example(objective)
    counted = batch.loss_mask[:, 0] > 0
    assert np.isfinite(objective.token_loss(logprobs, batch, objective)[counted]).all()
    logprobs[:, 0] = np.nan
    loss = np.asarray(objective.token_loss(logprobs, batch, objective))
    assert counted.sum() == 7 and np.isnan(loss[counted, 0]).all()
