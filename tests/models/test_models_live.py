"""Random configurations give the results of transformers, which runs in the test."""

import dataclasses
import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import CASES, load_golden, random_cases
from reference_check import check_gradients, check_greedy, check_logits, write_case

from echorl_jax.models import Decoder, from_hf, init_params, save_model
from echorl_jax.parallel import make_mesh

SEED, COUNT = 0, 18


@pytest.fixture(scope="session")
def live(torch_python, tmp_path_factory) -> Path:
    """The results of transformers for the drawn cases."""
    out = tmp_path_factory.mktemp("live")
    _run(torch_python, "--out", str(out), "--random", str(COUNT), "--seed", str(SEED))
    return out


def _run(python: str, *arguments: str) -> None:
    script = Path(__file__).parent / "make_golden.py"
    subprocess.run([python, str(script), *arguments], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", random_cases(SEED, COUNT))
def test_random_configurations_equal_transformers(name, live, tmp_path):
    case = random_cases(SEED, COUNT)[name]
    golden = load_golden(live, name)
    directory = write_case(tmp_path, case, json.loads((live / f"{name}.json").read_text()))
    check_logits(directory, case, golden["logits"], "float32", 1e-4)
    if "greedy" in golden:
        check_greedy(directory, case, golden["greedy"])
    if any(key.startswith("gradient/") for key in golden):
        check_gradients(directory, case, golden)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_llama3", "qwen2_window", "qwen3_window_bias"])
def test_transformers_loads_what_we_save(name, torch_python, tmp_path):
    """Saves float32 shards from a mesh; transformers reads them and gives the same logits."""
    config = from_hf(CASES[name]["config"])
    config = dataclasses.replace(config, initializer_range=0.2, stored_dtype="float32")
    model = Decoder(config, dtype="float32")
    mesh = make_mesh(2, 2, 2)
    params = init_params(model, jax.random.key(0), mesh)
    save_model(tmp_path, model, params, shard_bytes=8000)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 33), np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    _run(torch_python, "--out", str(tmp_path), "--load", str(tmp_path))
    ours = jax.jit(model.logits)(jax.device_get(params), jnp.asarray(tokens))
    np.testing.assert_allclose(ours, np.load(tmp_path / "logits.npy"), atol=1e-4)
