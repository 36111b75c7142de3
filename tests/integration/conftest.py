"""Short runs on Countdown: the real loop, the shipped model, few rows."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from echorl_jax.config import Config
from echorl_jax.config_file import load_config

collect_ignore = ["tunix_check.py"]  # needs Tunix
ROOT = Path(__file__).parent.parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def small_config(**sections: dict[str, Any]) -> Config:
    """configs/countdown.py cut to 3 steps of 4 prompts x 4 rollouts; sections override fields."""
    config = load_config(str(ROOT / "configs" / "countdown.py"))
    defaults: dict[str, dict[str, Any]] = {
        "data": {"eval": "", "max_prompt_tokens": 32},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 24},
        "eval": {"every": 0},
        "checkpoint": {"every": 1, "export": False},
        "log": {"tensorboard": False, "samples_every": 1},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "optim": {"compile_ahead": False},
    }
    steps = sections.pop("steps", 3)
    for section, values in sections.items():
        defaults.setdefault(section, {}).update(values)
    changed = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in defaults.items()
    }
    return dataclasses.replace(config, steps=steps, **changed)


@pytest.fixture
def shared_data() -> Path:
    """Real data files, where they are at hand."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}")
    return SHARED_DATA
