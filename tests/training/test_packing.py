"""Packed demonstrations: the same loss and gradient as one to a row, and less padding."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from echorl_jax.config import ConfigError
from echorl_jax.core import load_objective
from echorl_jax.models import load_model
from echorl_jax.parallel import make_mesh
from echorl_jax.training.micro_batches import first_fit, pack_rows
from echorl_jax.training.setup import Setup, static_setup
from echorl_jax.training.sft import packs, train_supervised
from echorl_jax.training.update import micro_gradient
from echorl_jax.types import TrainBatch
from tests.integration.conftest import small_config

ASSETS = "echorl_jax/assets/countdown"
PROMPTS, TARGETS = [3, 5, 2, 4, 6, 3, 1], [9, 4, 12, 1, 7, 2, 5]


@pytest.fixture(scope="module")
def tiny_setup() -> tuple[Setup, dict]:
    """Supervised training of the shipped model."""
    mesh = make_mesh(devices=jax.devices()[:1])
    model, params = load_model(ASSETS, dtype="float32", mesh=mesh)
    objective = load_objective("sft")
    return static_setup(small_config(), mesh, model, objective, platform="cpu"), params


def demonstrations(vocab: int) -> TrainBatch:
    """Rows with token weights that all differ, so that a token in a wrong place shows."""
    draw = np.random.default_rng(0)
    rows, width = len(PROMPTS), 14
    inside = np.arange(width)[None, :] < np.array(TARGETS)[:, None]
    tokens = draw.integers(3, vocab, (rows, 20)).astype(np.int32)
    length = np.array(PROMPTS) + np.array(TARGETS)
    zeros = np.zeros((rows, width), np.float32)
    return TrainBatch(
        tokens=np.where(np.arange(20)[None, :] < length[:, None], tokens, 0),
        prompt_length=np.array(PROMPTS, np.int32),
        length=length.astype(np.int32),
        loss_mask=inside.astype(np.float32),
        advantages=np.ones(rows, np.float32),
        old_logprobs=zeros,
        rollout_logprobs=zeros,
        token_weights=np.where(inside, draw.uniform(0.1, 1, (rows, width)), 0).astype(np.float32),
        echo_weights=zeros,
        on_policy=np.zeros(rows, bool),
    )


def test_the_scale_of_the_entropy_bonus_goes_with_its_rows() -> None:
    batch = demonstrations(100)
    scaled = dataclasses.replace(batch, entropy_scale=np.full(len(PROMPTS), 0.25, np.float32))
    packed = pack_rows(scaled, width=32)
    assert packed.entropy_scale is not None and len(packed.entropy_scale) == len(packed.tokens)
    assert set(packed.entropy_scale.tolist()) == {0.25}
    assert pack_rows(batch, width=32).entropy_scale is None
    uneven = dataclasses.replace(batch, entropy_scale=np.arange(len(PROMPTS), dtype=np.float32))
    with pytest.raises(ValueError, match="rows differ in entropy_scale"):
        pack_rows(uneven, width=32)


def test_the_loss_and_gradient_are_those_of_single_rows(
    tiny_setup: tuple[Setup, dict],
) -> None:
    setup, params = tiny_setup
    batch = demonstrations(setup.model.config.vocab_size)
    packed = pack_rows(batch, width=20)
    # 64 tokens in rows of 20.
    assert len(packed.length) == 4 and packed.length.sum() == batch.length.sum()
    alone = micro_gradient(setup, params, batch, echo_coef=0.0)
    together = micro_gradient(setup, params, packed, echo_coef=0.0)
    np.testing.assert_allclose(together.loss, alone.loss, rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(together.gradient), jax.tree.leaves(alone.gradient), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6)


def test_rows_are_filled_longest_first() -> None:
    lengths = [7, 2, 5, 3, 3, 8]
    bins = first_fit(lengths, 8)
    assert sorted(place for row in bins for place in row) == list(range(6))
    assert all(sum(lengths[place] for place in row) <= 8 for row in bins)
    # 28 tokens in rows of 8: four rows cannot be fewer.
    assert len(bins) == 4


def test_what_cannot_be_packed_is_refused() -> None:
    batch = demonstrations(50)
    with pytest.raises(ValueError, match="a sequence of 14 tokens, rows of 13"):
        pack_rows(batch, width=13)
    mixed = dataclasses.replace(batch, advantages=np.arange(7, dtype=np.float32))
    with pytest.raises(ValueError, match="rows differ in advantages"):
        pack_rows(mixed, width=20)


def test_dynamic_rope_is_not_packed(tiny_setup: tuple[Setup, dict]) -> None:
    model = tiny_setup[0].model
    rope = dataclasses.replace(model.config.rope, kind="dynamic", factor=2.0)
    dynamic = dataclasses.replace(model, config=dataclasses.replace(model.config, rope=rope))
    config = small_config(objective={"name": "sft", "kl_coef": None}, echo={"enabled": False})
    assert packs(config, model) and not packs(config, dynamic)
    asked = small_config(optim={"sft_packing": "on"})
    with pytest.raises(ConfigError, match="config.optim.sft_packing = 'on'"):
        packs(asked, dynamic)


def test_a_run_learns_the_same_with_and_without(tmp_path: Path) -> None:
    losses = {}
    for packing in ("on", "off"):
        config = small_config(
            steps=2,
            data={"train": "countdown:split=train", "max_prompt_tokens": 64},
            objective={"name": "sft", "kl_coef": None},
            echo={"enabled": False},
            optim={"sft_packing": packing, "sft_rows_per_step": 16},
            checkpoint={"every": 0},
        )
        train_supervised(config, tmp_path / packing, devices=jax.devices()[:1])
        text = (tmp_path / packing / "metrics.jsonl").read_text()
        losses[packing] = [json.loads(line)["loss/nll"] for line in text.splitlines()]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)
