"""Rows, prompts and weights that change under the same name between two starts."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from echorl_jax.config import Config, ConfigError
from echorl_jax.data import load_rows, load_tokenizer
from echorl_jax.data.tokens import model_path
from echorl_jax.training.inputs import digest
from echorl_jax.training.run import open_run
from tests.integration.conftest import small_config
from tests.training.test_run import opened

PUZZLES = "countdown:count=8&seed={}"
# Writes the microsecond of the rendering into each prompt.
CLOCK = "{{ strftime_now('%M%S%f') }} {{ messages[0]['content'] }}"


def write_rows(file: Path, seed: int) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in load_rows(PUZZLES.format(seed))))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(model_path("builtin:countdown"), tmp_path / "model")
    return tmp_path / "model"


def config_of(tmp_path: Path, model: Path, **sections: Any) -> Config:
    write_rows(tmp_path / "rows.jsonl", 1)
    sections.setdefault("data", {})["train"] = str(tmp_path / "rows.jsonl")
    return small_config(model={"path": str(model)}, steps=9, **sections)


def test_other_rows_under_the_same_name_are_refused(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model)
    opened(config, tmp_path / "run")
    opened(config, tmp_path / "run")
    write_rows(tmp_path / "rows.jsonl", 2)
    with pytest.raises(ConfigError, match="rows under config.data.train = '.*rows.jsonl' are not"):
        opened(config, tmp_path / "run")
    write_rows(tmp_path / "rows.jsonl", 1)
    opened(config, tmp_path / "run")


def test_another_chat_template_is_refused(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model)
    opened(config, tmp_path / "run")
    change_template(model, "{{ messages[0]['content'] }}")
    with pytest.raises(ConfigError, match="prompts that the tokenizer of .*model' makes are not"):
        opened(config, tmp_path / "run")


def change_template(model: Path, text: str) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": text}))


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_other_weights_are_told_and_refused_where_they_stay_in_use(
    tmp_path: Path, model: Path, kl_coef: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a KL term the weights under the path are the reference policy."""
    config = config_of(tmp_path, model, objective={"kl_coef": kl_coef})
    assert config.model.init == "pretrained" or pytest.skip("the small run draws its weights")
    opened(config, tmp_path / "run")
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + np.ones((), tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    wanted = f"weights under config.model.path = '{model}' are not those that the run began with"
    capsys.readouterr()
    if kl_coef:
        with pytest.raises(ConfigError, match=wanted):
            opened(config, tmp_path / "run")
    else:
        opened(config, tmp_path / "run")
        assert wanted in capsys.readouterr().err


def test_other_rows_of_the_evaluation_are_told(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "eval.jsonl", 3)
    data = {"eval": str(tmp_path / "eval.jsonl")}
    config = config_of(tmp_path, model, data=data, eval={"every": 100, "rows": 2})
    opened(config, tmp_path / "run")
    write_rows(tmp_path / "eval.jsonl", 4)
    capsys.readouterr()
    opened(config, tmp_path / "run")
    assert "warning: the rows under config.data.eval = " in capsys.readouterr().err


def test_a_date_in_the_prompt_is_that_of_the_first_start(tmp_path: Path, model: Path) -> None:
    change_template(model, CLOCK)
    config = config_of(tmp_path, model, data={"max_prompt_tokens": 200})
    opened(config, tmp_path / "run")
    first = next_prompts(config, tmp_path / "run")
    time.sleep(1.1)
    assert next_prompts(config, tmp_path / "run") == first


def next_prompts(config: Config, workdir: Path) -> list[str]:
    """The texts of the next step's prompts at another start."""
    tokenizer = load_tokenizer(config.model.path)
    with open_run(config, workdir, prompts_per_step=4, devices=jax.devices()[:1]) as (run, _):
        return [tokenizer.decode(prompt.ids) for prompt in next(run.stream)]


def test_a_checkpoint_of_an_earlier_version_has_no_digests(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model)
    opened(config, tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints" / "1" / "notes").glob("metadata")
    notes = json.loads(file.read_text())
    del notes["inputs"], notes["digest"]
    file.write_text(json.dumps({**notes, "digest": digest(notes)}))
    write_rows(tmp_path / "rows.jsonl", 2)
    workdir = tmp_path / "run"
    with open_run(config, workdir, prompts_per_step=4, devices=jax.devices()[:1]) as (_, state):
        assert int(state.step) == 1
