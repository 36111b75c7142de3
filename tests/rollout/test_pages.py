"""Paged completions give the samples of the ring, whatever the slots, the pages and the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echorl_jax.models import init_adapters, init_params, with_adapters
from echorl_jax.models.config import Lora
from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import (
    Resources,
    Sampling,
    cache,
    engine,
    generate,
    host,
    kernel,
    pages,
    weights,
)
from tests.rollout.conftest import EOS, PROMPTS, check_equal, check_scores, completions, decoder

SETTINGS = {"group_size": 6, "max_new_tokens": 40, "eos_ids": EOS}
KEY = jax.random.key(1)
LIMITS = [1 + 7 * row % 40 for row in range(24)]


@pytest.fixture(scope="module")
def base(model, params):
    """The rollouts of the ring."""
    return generate(model, params, PROMPTS, KEY, **SETTINGS, row_limits=LIMITS)


@pytest.fixture
def small_pages(monkeypatch):
    """Pages of 4 positions, so that short completions have several."""
    monkeypatch.setattr(cache, "BLOCK", dict.fromkeys(("cpu", "gpu", "tpu"), 4))
    monkeypatch.setattr(cache, "WORKER_BLOCK", 4)


@pytest.mark.parametrize(
    "settings, restarts",
    [
        ({"page_tokens": 1000}, False),
        ({"slots": 7, "page_tokens": 320}, False),
        # 44 positions are 11 pages, enough for one row of 40 tokens that begins within a page.
        ({"slots": 7, "page_tokens": 44}, True),
        ({"page_tokens": 60, "steps_per_poll": 5}, True),
        ({"slots": 8, "page_tokens": 44, "cpu_workers": 2}, True),
    ],
    ids=str,
)
def test_samples_do_not_depend_on_pages(model, params, base, small_pages, settings, restarts):
    polls, told = [], {}

    def finished(rows, tokens):
        for row, ids in zip(rows, tokens, strict=True):
            assert row not in told
            told[row] = ids.tolist()

    rollouts = generate(
        model,
        params,
        PROMPTS,
        KEY,
        **SETTINGS,
        row_limits=LIMITS,
        **settings,
        progress=polls.append,
        finished=finished,
    )
    check_equal(rollouts, base)
    assert [told[row] for row in range(24)] == completions(base)
    assert (polls[-1].restarted > 0) == restarts
    assert polls[-1].rows_done == 24
    assert polls[-1].tokens == sum(map(len, completions(base)))


@pytest.mark.parametrize("page_tokens", [200, 44])
def test_samples_do_not_depend_on_pages_and_mesh(model, base, small_pages, page_tokens):
    mesh = make_mesh(2, 2, 2)
    params = init_params(model, jax.random.key(0), mesh)
    rollouts = generate(
        model,
        params,
        PROMPTS,
        KEY,
        **SETTINGS,
        row_limits=LIMITS,
        slots=16,
        page_tokens=page_tokens,
        mesh=mesh,
    )
    check_equal(rollouts, base)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_narrow_pages_hold_what_the_ring_holds(model, params, small_pages, kv_dtype):
    """Sums in another order round a key or value of the next layer the other way now and then."""
    settings = {**SETTINGS, "row_limits": LIMITS, "slots": 7, "kv_dtype": kv_dtype}
    paged = generate(model, params, PROMPTS, KEY, **settings, page_tokens=44)
    ring = generate(model, params, PROMPTS, KEY, **settings)
    assert completions(ring) == completions(paged)
    gap = np.abs(np.asarray(ring.rollout_logprobs - paged.rollout_logprobs))
    assert gap.max() < 0.05 and gap.mean() < 1e-3


def test_windows_cut_pages(small_pages):
    windowed = decoder(model_type="qwen3", qk_norm=True, qkv_bias=False, windows=(None, 9))
    params = init_params(windowed, jax.random.key(3))
    settings = {"group_size": 3, "max_new_tokens": 40, "eos_ids": ()}
    limits = [40, 17, 5, 39, 21, 8, 1, 40, 33, 12, 20, 30]
    rollouts = generate(
        windowed, params, PROMPTS, KEY, **settings, row_limits=limits, slots=4, page_tokens=60
    )
    assert rollouts.completion_length.tolist() == limits
    check_scores(windowed, params, PROMPTS, rollouts)


def test_adapters_write_pages(model, params, base, small_pages):
    lora = Lora.uniform(model.config, ("q", "k", "v", "down"), rank=2, alpha=8.0, rslora=False)
    adapters = init_adapters(model, lora, jax.random.key(5), init="gaussian")
    adapters = jax.tree.map(lambda x: jnp.where(x == 0, 0.1, x), adapters)  # b begins as zeros
    adapted = with_adapters(model, params, lora, adapters)
    settings = {**SETTINGS, "row_limits": LIMITS, "slots": 7}
    rollouts = generate(*adapted, PROMPTS, KEY, **settings, page_tokens=44)
    check_equal(rollouts, generate(*adapted, PROMPTS, KEY, **settings))
    check_scores(*adapted, PROMPTS, rollouts)
    assert completions(rollouts) != completions(base)


def test_full_blocks_become_pages_in_front():
    """Two parts of 8 pages, blocks of 4. In the first, slot 1 has taken another row than the one
    whose pages are 1 and 3, so page 4 moves to the gap at 1, and new pages follow from 3 on.
    """
    before = pages.Pages(
        slot=jnp.array([[0, 1, 2, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 2, 0]]),
        row=jnp.array([[5, 6, 7, 6, 5, 0, 0, 0], [20, 20, 20, 20, 21, 21, 22, 0]]),
        start=jnp.array([[-1, 0, -2, 4, 3, 0, 0, 0], [0, 4, 8, 12, -3, 1, 0, 0]]),
        used=jnp.array([5, 7]),
    )
    row = jnp.array([[5, 8, 7], [20, 21, 22]])
    position = jnp.array([[11, 2, 6], [20, 9, 8]])
    plan = jax.jit(functools.partial(pages.plan_flush, idle=99, block=4))
    after, moves, leaves = plan(before, row, position)
    assert after.used.tolist() == [6, 8]
    assert after.slot[0, :6].tolist() == [0, 0, 2, 0, 1, 2]
    assert after.row[0, :6].tolist() == [5, 5, 7, 5, 8, 7]
    assert after.start[0, :6].tolist() == [-1, 3, -2, 7, -2, 2]
    assert (moves.moved[0], moves.source[0, 0], moves.target[0, 0]) == (1, 4, 1)
    # The second part lacks two pages of ten: its youngest row leaves with one, and needs none.
    assert leaves.tolist() == [[False] * 3, [False, False, True]]
    assert after.row[1].tolist() == [20] * 4 + [21] * 2 + [20, 21]
    assert after.start[1, 6:].tolist() == [16, 5]
    assert moves.slot[1, :2].tolist() == [0, 1] and moves.written.tolist() == [3, 2]
    assert moves.first.tolist() == [3, 6]


def test_a_part_takes_rows_while_they_find_a_page_each():
    """Of 40 pages 2 are kept free, 30 are in use by 4 rows: 4 more fit. An empty part takes one."""
    used = pages.Pages(
        slot=jnp.array([[0, 1, 2, 3] * 10, [0] * 40]),
        row=jnp.array([[0, 1, 2, 3] * 10, [9] * 40]),
        start=jnp.zeros((2, 40), jnp.int32),
        used=jnp.array([30, 40]),
    )
    row = jnp.array([[0, 1, 2, 3, 99], [99] * 5])
    assert pages.room(used, row, row < 99).tolist() == [4, 38]
    full = jnp.array([[0, 1, 2, 3, 99], [9, 99, 99, 99, 99]])
    assert pages.room(used, full, full < 99).tolist() == [4, 0]


@pytest.mark.parametrize("eos_ids", [EOS, ()], ids=str)
def test_a_decode_step_copies_no_pages(model, eos_ids):
    """Without EOS nothing orders a write of pages after the reads of the same step."""
    mesh = make_mesh(devices=jax.devices()[:1])
    sampling = Sampling(4, 2048, eos_ids=eos_ids)
    resources = Resources(slots=8, page_tokens=2**16, mesh=mesh)
    prefill = engine.lower_prefill(model, sampling, resources, prompts=8, prompt_tokens=16)
    decode = engine.lower_decode(model, sampling, resources, prefill, prefill.compile())
    memory = decode.compile().memory_analysis()
    pool = 2**16 * 2 * 2 * 2 * 8 * 4  # positions, k and v, layers, heads, head size, bytes
    assert memory.temp_size_in_bytes < pool / 8
    assert memory.alias_size_in_bytes > pool


@pytest.mark.parametrize(
    "settings",
    [{"slots": 5, "page_tokens": 400, "kv_dtype": "int8"}, {"page_tokens": 176}],
    ids=str,
)
def test_the_kernel_reads_pages(monkeypatch, settings):
    """In interpret mode, with pages of 16 positions and a window in a layer."""
    monkeypatch.setattr(pages, "PAGED_BLOCKS", 2)
    monkeypatch.setattr(cache, "BLOCK", dict.fromkeys(("cpu", "gpu", "tpu"), 16))
    model = decoder(head_dim=16, windows=(None, 25))
    params = init_params(model, jax.random.key(0))
    settings = {"group_size": 2, "max_new_tokens": 60, "eos_ids": EOS, **settings}
    blocks = generate(model, params, PROMPTS, KEY, **settings)
    monkeypatch.setattr(kernel, "INTERPRET", jax.default_backend() != "gpu")
    for module in (engine, host, weights):
        monkeypatch.setattr(module, "platform_of", lambda mesh: "gpu")
    check_equal(generate(model, params, PROMPTS, KEY, **settings), blocks)
    assert np.max(blocks.completion_length) > 48
