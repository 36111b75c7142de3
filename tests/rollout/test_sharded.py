"""Eight virtual devices give the same samples, with only small collectives in the decode loop."""

import math
import re

import jax
import pytest

from echorl_jax.models import init_params
from echorl_jax.parallel import make_mesh
from echorl_jax.rollout import Resources, Sampling, generate, host, score_rollouts
from echorl_jax.rollout.engine import lower_prefill
from tests.rollout.conftest import EOS, PROMPTS, check_equal, completions, decoder

SETTINGS = {"group_size": 6, "max_new_tokens": 20, "eos_ids": EOS}
KEY = jax.random.key(1)
COLLECTIVE = re.compile(
    r"= (.*?) ((?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?)\("
)


@pytest.fixture(scope="module")
def base(model, params):
    return generate(model, params, PROMPTS, KEY, **SETTINGS)


def collectives(program: str) -> list[tuple[str, int]]:
    """Each collective of a compiled program, with the elements of its result."""
    found = []
    for results, kind in COLLECTIVE.findall(program):
        for shape in re.findall(r"\[([\d,]*)\]", results):
            found.append((kind, math.prod(map(int, filter(None, shape.split(","))))))
    return found


@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 2, 4), (8, 1, 1)])
def test_prefill_gathers_no_store(shape):
    """Compilers for TPU would gather all of it for each block that is read."""
    mesh, model = make_mesh(*shape), decoder(num_heads=8, num_kv_heads=4)
    sampling, resources = Sampling(group_size=2, max_new_tokens=16), Resources(slots=8, mesh=mesh)
    # Several pieces of 512 tokens in a row, so that earlier ones are read from the store.
    lowered = lower_prefill(model, sampling, resources, prompts=64, prompt_tokens=2048)
    sent = collectives(lowered.compile().as_text())
    # New keys and values go to all devices; what is read from the store is there already.
    assert [kind for kind, _ in sent].count("all-gather") == 2
    store = 2 * 64 * 2048 * 4 * 8 // shape[2]  # layers, prompts, tokens, heads, width: of keys
    assert max(size for _, size in sent) < store / 4


@pytest.mark.parametrize("shape, slots", [((2, 2, 2), 8), ((4, 1, 2), 0), ((1, 2, 4), 8)])
def test_same_samples_on_any_mesh(model, base, shape, slots, monkeypatch):
    mesh = make_mesh(*shape)
    decode, programs = host.decode_call, []

    def watch(*arguments, **settings):
        if not programs:
            programs.append(decode.lower(*arguments, **settings).compile().as_text())
        return decode(*arguments, **settings)

    monkeypatch.setattr(host, "decode_call", watch)
    params = init_params(model, jax.random.key(0), mesh)
    told = {}

    def finished(rows, tokens):
        told.update(zip(rows, (ids.tolist() for ids in tokens), strict=True))

    rollouts = generate(
        model, params, PROMPTS, KEY, **SETTINGS, slots=slots, mesh=mesh, finished=finished
    )
    check_equal(rollouts, base)
    assert [told[row] for row in range(24)] == completions(base)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(rollouts))
    in_loop = programs[0].split("\nENTRY")[0]
    sizes = collectives(in_loop)
    rows = (slots or 24) // (8 // shape[2])
    # Activations of a device's rows, block sums and one number per slot travel; logits [rows, V]
    # and caches do not.
    assert max((size for _, size in sizes), default=0) <= max(rows * 32, 24)


def test_an_untied_bf16_head_on_a_mesh():
    """The head is split over the vocabulary; sampler and trainer agree."""
    model, mesh = decoder("bfloat16", tied_embeddings=False), make_mesh(2, 2, 2)
    params = init_params(model, jax.random.key(0), mesh)
    rollouts = generate(model, params, PROMPTS, KEY, **SETTINGS, mesh=mesh)
    logprobs, _ = score_rollouts(model, jax.device_get(params), jax.device_get(rollouts))
    assert abs(logprobs - jax.device_get(rollouts.rollout_logprobs)).max() < 0.3
