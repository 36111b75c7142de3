"""Stop strings: a completion ends with the token whose text completes one, in any spelling."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.config import ConfigError
from echorl_jax.data import Prompt, load_tokenizer
from echorl_jax.data.tokens import BUILTIN
from echorl_jax.environment import Engine, JaxEngine, end_settings, sample_and_grade
from echorl_jax.models import init_params, load_decoder
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import Resources, Sampling
from echorl_jax.types import Rollouts

ROW = {"reward_model": {"ground_truth": {"numbers": [2, 3], "target": 6}}}
GROUP = 24


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("builtin:countdown")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_decoder(str(BUILTIN["builtin:countdown"]), dtype="float32")


class Spelled(Engine):
    """Returns given token ids."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def sample(self, params: Any, prompts: Any, key: Any, **settings: Any) -> Rollouts:
        ids = np.zeros((len(self.rows), 40), np.int32)
        for line, row in zip(ids, self.rows, strict=True):
            line[: len(row)] = row
        one: Any = np.ones(len(ids), np.int32)
        token: Any = np.ones(ids.shape, np.float32)
        return Rollouts(
            prompt_ids=ids[:1],
            prompt_length=one[:1],
            group=one * 0,
            completion_ids=ids,
            completion_length=np.array([len(row) for row in self.rows], np.int32),
            rollout_logprobs=token,
            token_entropy=token,
            truncated=one == 1,
        )


def test_a_string_in_any_spelling_ends_a_row(tokenizer: Any) -> None:
    """Whole, letter by letter, across tokens, none, and a character that takes several bytes."""

    def ids(*parts: str) -> list[int]:
        return [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]

    texts = [
        ids("2*3=6", "\nanswer: 7"),
        ids("2*3=6\na", "n", "s", "w", "e", "r", ": 7"),
        ids("2*3=6", "\nans", "wer: 7"),
        ids("2*3=6\nans"),
        ids("2*3=6", "\né", "answer"),
    ]
    sampling = Sampling(group_size=5, max_new_tokens=40, stop_strings=("answer", "é"))
    with GraderPool("countdown", workers=0) as grader:
        attempts = sample_and_grade(
            Spelled(texts),
            {},
            [Prompt([1], ROW, 0)],
            jax.random.key(0),
            sampling=sampling,
            tokenizer=tokenizer,
            grader=grader,
        )
        responses = attempts.verdicts().responses
    rollouts = attempts.rollouts
    assert responses == (*["2*3=6\nanswer"] * 3, "2*3=6\nans", "2*3=6\né")
    assert rollouts.truncated.tolist() == [False, False, False, True, False]
    for row, text in enumerate(responses):
        length = rollouts.completion_length[row]
        assert tokenizer.decode(rollouts.completion_ids[row, :length].tolist()) == text
        for values in (rollouts.rollout_logprobs, rollouts.token_entropy):
            assert values[row, :length].all() and not values[row, length:].any()
        assert not rollouts.completion_ids[row, length:].any()


def test_sampled_rows_are_those_without_stops_up_to_the_string(tokenizer: Any, model: Any) -> None:
    """The device ends most rows; the same draws with no stop at all show where each should end."""
    stops = ("he", "=1", "\n\n")
    params = init_params(model, jax.random.key(0))
    engine = JaxEngine(model, Resources(), prompt_tokens=4)

    def sample(**settings: Any) -> Any:
        with GraderPool("countdown", workers=0) as grader:
            return sample_and_grade(
                engine,
                params,
                [Prompt([5, 6, 7], ROW, 0)],
                jax.random.key(1),
                sampling=Sampling(group_size=GROUP, max_new_tokens=64, **settings),
                tokenizer=tokenizer,
                grader=grader,
            ).rollouts

    plain = sample(eos_ids=end_settings(tokenizer, model)["eos_ids"])
    found = sample(**end_settings(tokenizer, model, (), stops))
    ended = 0
    for row in range(GROUP):
        ids = plain.completion_ids[row, : plain.completion_length[row]].tolist()
        texts = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
        holds = [any(stop in text for stop in stops) for text in texts]
        length = holds.index(True) + 1 if any(holds) else len(ids)
        ended += any(holds)
        assert found.completion_length[row] == length
        np.testing.assert_array_equal(found.completion_ids[row, :length], ids[:length])
        # Two programs: the last bits may differ.
        np.testing.assert_allclose(
            found.rollout_logprobs[row, :length], plain.rollout_logprobs[row, :length], atol=1e-5
        )
        assert found.truncated[row] == (plain.truncated[row] and not any(holds))
    assert 0 < ended < GROUP  # both kinds are there


def test_stop_ids_join_the_models_own(tokenizer: Any, model: Any) -> None:
    own = end_settings(tokenizer, model)
    more = end_settings(tokenizer, model, (20, 21))
    assert set(more["eos_ids"]) == {*own["eos_ids"], 20, 21} and not more["stop_sequences"]
    with pytest.raises(ConfigError, match="stop_ids = .*the vocabulary has ids from 0 to"):
        end_settings(tokenizer, model, (10**6,))
    assert not jnp.isin(jnp.arange(3), jnp.array((), jnp.int32)).any()
