"""Runs `echorl plan` for TPUs that are not present and checks the compiler's figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
CONFIG = f"{ROOT / 'configs' / 'paper.py'}:qwen2.5-math-7b,grpo,echo"
GB = 10**9
# A Qwen2 that compiles in seconds: 4 layers, heads as long as those of the 7B model.
WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD, VOCAB = 1024, 2816, 4, 8, 2, 128, 32768
SMALL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "eos_token_id": 2,
}
CHIPS, CHIP_BYTES = 4, 16 * GB  # v5e:2x2


@pytest.fixture(scope="module")
def search_path(libtpu: str) -> str:
    """PYTHONPATH with this package and libtpu."""
    return os.pathsep.join([str(ROOT), libtpu])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    (directory / "config.json").write_text(json.dumps(SMALL))
    return directory


def plan(model: Path, search_path: str, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of the command."""
    command = [sys.executable, "-m", "echorl_jax", "plan", f"--config={CONFIG}"]
    command += ["--topology=v5e:2x2", "--json", "--tries=0", f"--config.model.path={model}"]
    command += ["--config.data.max_prompt_tokens=128", "--config.rollout.max_new_tokens=384"]
    command += ["--config.rollout.prompts_per_step=16", *words]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": search_path, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


def parameters() -> int:
    """Counted from the shapes of the published architecture, not by this package."""
    attention = 2 * WIDTH * HEADS * HEAD + 2 * WIDTH * KV_HEADS * HEAD
    biases = (HEADS + 2 * KV_HEADS) * HEAD
    layer = attention + biases + 3 * WIDTH * MLP + 2 * WIDTH
    return LAYERS * layer + 2 * VOCAB * WIDTH + WIDTH


@pytest.mark.slow
def test_compiled_memory_matches_the_shapes(model: Path, search_path: str) -> None:
    code, found = plan(model, search_path, "--config.optim.micro_batch_tokens=4096")
    assert code == 0 and found["fits"] and found["chips"] == CHIPS
    assert found["usable_bytes_per_chip"] == pytest.approx(0.95 * CHIP_BYTES)
    programs = {p["program"]: p for p in found["programs"]}
    assert list(programs) == ["prefill", "decode", "accumulate", "apply"]
    for program in programs.values():
        assert program["source"] == "compiler" and program["compile_s"] > 0
        assert program["arguments"] > 0 and program["weights"] > 0
        assert program["total"] <= found["peak_bytes_per_chip"] <= 0.95 * CHIP_BYTES
    assert programs["accumulate"]["temporaries"] > 0
    # On each of 4 chips: weights, gradient and two moments in float32, each split 4 ways.
    state = 4 * parameters() / CHIPS
    assert programs["apply"]["arguments"] == pytest.approx(4 * state, rel=0.03)
    assert programs["apply"]["optimizer"] == pytest.approx(2 * state, rel=0.03)
    # The gradient's sum is added to in place, beside weights and one micro-batch of tokens.
    assert programs["accumulate"]["arguments"] == pytest.approx(2 * state, rel=0.03)
    # Sampling has the weights whole in bfloat16, and keys and values of 16 prompts x 128 tokens
    # and of 128 rows x 384 on 4 chips.
    position = 2 * LAYERS * KV_HEADS * HEAD * 2
    cache = (16 * 128 + 128 // CHIPS * 384) * position
    assert programs["decode"]["arguments"] == pytest.approx(2 * parameters() + cache, rel=0.05)


@pytest.mark.slow
def test_a_program_that_the_compiler_refuses_does_not_fit(model: Path, search_path: str) -> None:
    """Every product of 4 layers for 131,072 tokens a chip: some 28 GB of them alone."""
    code, found = plan(
        model,
        search_path,
        "--config.optim.micro_batch_tokens=131072",
        "--config.rollout.prompts_per_step=128",
        "--config.model.remat=none",
    )
    assert code == 1 and not found["fits"]
    too_large = {p["program"] for p in found["programs"] if p["total"] > 0.95 * CHIP_BYTES}
    assert too_large == {"accumulate"}
    assert found["peak_bytes_per_chip"] > 0.95 * CHIP_BYTES
