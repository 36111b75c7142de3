"""``entropy/covariance`` against NumPy's own covariance, and its edges."""

import numpy as np
import pytest

from echorl_jax.training.metrics import covariance_metric
from echorl_jax.types import TrainBatch


def batch_of(logprobs, advantages, loss_mask, on_policy) -> TrainBatch:
    rows, width = loss_mask.shape
    nothing = np.zeros((rows, width), np.float32)
    return TrainBatch(
        tokens=np.zeros((rows, width + 1), np.int32),
        prompt_length=np.ones(rows, np.int32),
        length=np.full(rows, width + 1, np.int32),
        loss_mask=loss_mask,
        advantages=advantages,
        old_logprobs=nothing,
        rollout_logprobs=logprobs,
        token_weights=nothing,
        echo_weights=nothing,
        on_policy=on_policy,
    )


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_covariance_over_the_policys_own_tokens(seed):
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (12, 9)).astype(np.float32)
    advantages = rng.normal(size=12).astype(np.float32)
    mask = (rng.random((12, 9)) < 0.7).astype(np.float32)
    own = rng.random(12) < 0.8
    pairs = [
        (logprobs[n, t], advantages[n])
        for n in range(12)
        for t in range(9)
        if own[n] and mask[n, t]
    ]
    expected = np.cov(np.array(pairs, np.float64).T, bias=True)[0, 1]
    found = covariance_metric(batch_of(logprobs, advantages, mask, own))
    assert found["entropy/covariance"] == pytest.approx(expected, rel=1e-9)


def test_by_hand():
    # log pi -1 and -3 about their mean -2, A +1 and -1 about 0: (1 * 1 + -1 * -1) / 2 = 1.
    logprobs = np.array([[-1.0, -7.0], [-3.0, np.nan]], np.float32)
    mask = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    advantages = np.array([1.0, -1.0], np.float32)
    batch = batch_of(logprobs, advantages, mask, np.array([True, True]))
    assert covariance_metric(batch) == {"entropy/covariance": 1.0}


def test_no_token_and_equal_advantages_give_zero():
    logprobs = np.array([[-1.0], [-3.0]], np.float32)
    ones = np.ones((2, 1), np.float32)
    own = np.array([True, True])
    assert covariance_metric(batch_of(logprobs, np.zeros(2, np.float32), ones, own)) == {
        "entropy/covariance": 0.0
    }
    nothing = batch_of(logprobs, np.array([1.0, -1.0], np.float32), 0 * ones, own)
    assert covariance_metric(nothing) == {"entropy/covariance": 0.0}
