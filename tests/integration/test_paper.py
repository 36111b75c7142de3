"""The paper's configs train: two steps of a tiny random model of the same family."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from echorl_jax.config import Config
from echorl_jax.config_file import load_config
from echorl_jax.data.tokens import BUILTIN
from echorl_jax.files import read_steps
from echorl_jax.models import to_hf
from echorl_jax.models.published import architecture
from echorl_jax.training import loop
from echorl_jax.training.sft import train_supervised
from tests.test_paper_config import FILE

# Every model, the paper's four methods with and without echo, and supervised training: a run
# takes half a minute of compiling. The other objectives run in test_objectives.py.
CASES = [
    ("qwen2.5-math-1.5b", "luffy", True),
    ("qwen2.5-math-7b", "grpo", True),
    ("qwen2.5-7b-instruct", "dapo", True),
    ("llama-3.1-8b-instruct", "uft", True),
    ("llama-3.1-8b-instruct", "luffy", False),
    ("qwen2.5-math-1.5b", "uft", False),
    ("qwen2.5-math-7b", "dapo", False),
    ("qwen2.5-7b-instruct", "grpo", False),
    ("qwen2.5-math-7b", "sft", False),
]


def tiny_directory(directory: Path, path: str) -> Path:
    """The architecture of ``path`` with small sizes, and the tokenizer of this package.

    Heads keep their grouping, embeddings their tying, rope its kind.
    """
    builtin = BUILTIN["builtin:countdown"]
    shutil.copytree(builtin, directory, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    vocabulary = json.loads((builtin / "config.json").read_text())["vocab_size"]
    known = architecture(path)
    small = dataclasses.replace(
        known,
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=known.num_heads // known.num_kv_heads,
        num_kv_heads=1,
        head_dim=8,
        windows=(),
        eos_ids=(),
        bos_id=None,
    )
    (directory / "config.json").write_text(json.dumps(to_hf(small)))
    return directory


def tiny(config: Config, directory: Path) -> Config:
    """The recipe with small numbers where time and memory go, and Countdown's rows."""
    sections = {
        # XLA's CPU backend has no product of small bfloat16 matrices with a float32 result.
        "model": {"path": str(directory), "init": "random", "dtype": "float32"},
        "data": {
            "train": "countdown:split=train",
            "eval": "",
            "template": "chat",
            "grader": "countdown",
            "grader_workers": 0,
            "max_prompt_tokens": 64,
        },
        "rollout": {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 24},
        "objective": {"max_rounds": 1},
        # The ids of "\n" in Qwen's vocabulary are beyond that of the tiny tokenizer.
        "echo": {"delimiter": "newline", "delimiter_ids": ()},
        "eval": {"every": 0},
        "optim": {"sft_rows_per_step": 8, "compile_ahead": False},
        "checkpoint": {"every": 0, "export": False},
        "log": {"tensorboard": False, "report": False},
    }
    changed = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in sections.items()
    }
    # `sft` takes all devices, `train` the one it is given.
    mesh = dataclasses.replace(config.mesh, fsdp=-1)
    return dataclasses.replace(config, steps=2, mesh=mesh, **changed)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "echo"), CASES)
def test_two_steps_of_every_recipe(model: str, method: str, echo: bool, tmp_path: Path) -> None:
    config = load_config(f"{FILE}:{model},{method}{',echo' if echo else ''}")
    config = tiny(config, tiny_directory(tmp_path / "model", config.model.path))
    if method == "sft":
        state = train_supervised(config, tmp_path / "run")
    else:
        state = loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    lines = list(read_steps(tmp_path / "run" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2]
    leaves = jax.tree.leaves(jax.device_get(state.params))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert all(line["optim/skipped"] == 0 for line in lines)
    assert lines[0]["optim/learning_rate"] == pytest.approx(1e-6)
    if method in ("grpo", "luffy"):
        # The entropy bonus gives every row a gradient, right or wrong.
        assert all(line["train/rows_skipped_fraction"] == 0 for line in lines)
        assert all(line["optim/grad_norm"] > 0 for line in lines)
