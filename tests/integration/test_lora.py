"""Runs with adapters: only they are trained and saved, and all that reads a run reads them."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from echorl_jax.commands.train import finish
from echorl_jax.config import Config, ConfigError
from echorl_jax.data import load_tokenizer
from echorl_jax.data.tokens import model_path
from echorl_jax.errors import UserError
from echorl_jax.files import read_steps
from echorl_jax.models import load_model, save_model
from echorl_jax.remote import Mirror
from echorl_jax.training import loop
from echorl_jax.training.convert import convert
from echorl_jax.training.diagnose import replay
from echorl_jax.training.run import open_run
from echorl_jax.training.sft import train_supervised
from echorl_jax.types import PyTree
from tests.integration.conftest import small_config
from tests.integration.test_faults import cache_of, command
from tests.integration.test_train import steady

BUILTIN = model_path("builtin:countdown")
ONE = jax.devices()[:1]


def lora_config(**sections: Any) -> Config:
    """A short run with adapters of rank 4 and a learning rate that moves them."""
    lora = {"rank": 4, "alpha": 8.0, **sections.pop("lora", {})}
    optim = {"compile_ahead": False, "learning_rate": 1e-3, **sections.pop("optim", {})}
    return small_config(lora=lora, optim=optim, **sections)


def equal(a: PyTree, b: PyTree) -> bool:
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.all(same)


def test_a_run_trains_saves_and_exports_adapters_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = lora_config(
        steps=2,
        checkpoint={"every": 1, "export": True, "merge": True},
        objective={"name": "grpo", "kl_coef": 0.01},
        debug={"dump_step": 2},
    )
    run = tmp_path / "run"
    state = loop.train(config, run, devices=ONE)
    assert all(
        path[-1].key in "ab" for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
    )
    b = state.params["layers"]["mlp"]["down"]["lora"]["b"]
    assert b.dtype == np.float32 and np.abs(b).max() > 0
    lines = list(read_steps(run / "metrics.jsonl"))
    # The reference is the base: equal at first, then the adapters part from it.
    assert abs(lines[0]["kl/ref"]) < 1e-3 and all(line["optim/skipped"] == 0 for line in lines)
    saved = sum(f.stat().st_size for f in (run / "checkpoints" / "2").rglob("*") if f.is_file())
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert saved < 3 * trained + 200_000

    adapter = load_file(run / "export" / "adapter" / "adapter_model.safetensors")
    down = adapter["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    np.testing.assert_array_equal(down, np.asarray(b)[0].T)
    finish(Mirror(str(run), run), report=False)
    assert f"model:   {run / 'export'} (Hugging Face format)\n" in capsys.readouterr().out
    # The merged model and the adapter on the base are the same policy.
    merged = load_model(run / "export", dtype="float32")
    apart = load_model(BUILTIN, dtype="float32", adapter=run / "export" / "adapter")
    tokens = np.arange(12, dtype=np.int32)[None]
    ours, theirs = (np.asarray(jax.jit(m.logits)(p, tokens)) for m, p in (merged, apart))
    np.testing.assert_allclose(ours, theirs, atol=0.06)  # merged in bfloat16, as the base is stored

    assert replay(run / "dumps" / "step_000002_update_00").reproduced
    convert(str(run), tmp_path / "adapter")
    again = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(np.array_equal(again[key], value) for key, value in adapter.items())
    convert(str(run), tmp_path / "merged", merge=True)
    convert(BUILTIN, tmp_path / "joined", adapter=str(tmp_path / "adapter"))
    for name, bound in (("merged", 0.0), ("joined", 2e-3)):  # the latter on a base in float32
        tensors = load_file(tmp_path / name / "model.safetensors")
        for key, value in load_file(run / "export" / "model.safetensors").items():
            np.testing.assert_allclose(tensors[key], value, rtol=2**-8 if bound else 0, atol=bound)


@pytest.mark.parametrize(
    "base",
    ["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "bfloat16"))],
)
def test_sampler_and_trainer_agree(base: str, tmp_path: Path) -> None:
    config = lora_config(
        steps=2,
        model={"base_dtype": base},
        rollout={
            **{"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 24},
            "check_every": 1,
        },
    )
    loop.train(config, tmp_path, devices=ONE)
    lines = list(read_steps(tmp_path / "metrics.jsonl"))
    assert len(lines) == 2 and all(line["rollout/logprob_gap_max"] < 0.15 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_meshes_give_the_same_run(axes: dict[str, int], tmp_path: Path) -> None:
    rollout = {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 16}
    options: dict[str, Any] = {"steps": 1, "rollout": rollout}
    options["model"] = {"dtype": "float32", "base_dtype": "float32"}
    one = loop.train(lora_config(**options), tmp_path / "one", devices=ONE)
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, **axes}
    many = loop.train(lora_config(**options, mesh=mesh), tmp_path / "many", devices=jax.devices())
    lines = [next(read_steps(tmp_path / name / "metrics.jsonl")) for name in ("one", "many")]
    assert lines[0]["reward/mean"] == lines[1]["reward/mean"]
    assert lines[0]["loss/total"] == pytest.approx(lines[1]["loss/total"], abs=1e-5)
    np.testing.assert_allclose(
        *(s.params["layers"]["attention"]["q"]["lora"]["a"] for s in (one, many)), atol=3e-3
    )


def test_a_resumed_run_goes_on_bit_for_bit_and_refuses_another_base(tmp_path: Path) -> None:
    """Steps 1 and 2 in two processes' worth of runs equal those of one."""
    base = tmp_path / "base"
    save_base(base, seed=0)
    model = {"path": str(base), "base_dtype": "int8"}
    straight = loop.train(lora_config(steps=2, model=model), tmp_path / "straight", devices=ONE)
    loop.train(lora_config(steps=1, model=model), tmp_path / "halted", devices=ONE)
    resumed = loop.train(lora_config(steps=2, model=model), tmp_path / "halted", devices=ONE)
    assert equal(resumed.params, straight.params) and equal(resumed.opt_state, straight.opt_state)
    save_base(base, seed=1)
    config = lora_config(steps=3, model=model)
    with pytest.raises(ConfigError) as error:
        loop.train(config, tmp_path / "halted", devices=ONE)
    assert "weights under config.model.path" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_as_an_undisturbed_one(tmp_path: Path) -> None:
    """SIGKILL during the update of step 2 and during the save of step 3."""
    options = {"steps": 3, "checkpoint": {"every": 1, "export": True}}
    straight, killed, inject = (
        tmp_path / "straight",
        tmp_path / "killed",
        "kill@update:2,kill@save:3",
    )
    plain, faulty = lora_config(**options), lora_config(**options, debug={"inject": inject})
    cache = cache_of(straight)
    assert command(plain, straight, **cache).wait() == 0
    codes = [command(faulty, killed, **cache).wait() for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert steady(killed) == steady(straight)
    adapters = [d / "export" / "adapter" / "adapter_model.safetensors" for d in (killed, straight)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    # Nothing is left to train, so these are the states of the last checkpoints.
    one, other = (
        loop.train(config, d, devices=ONE) for config, d in ((faulty, killed), (plain, straight))
    )
    assert equal(one.params, other.params) and equal(one.opt_state, other.opt_state)


def save_base(directory: Path, *, seed: int) -> None:
    """The model of this package with a little noise, so that seeds tell two bases apart."""
    model, params = load_model(BUILTIN, dtype="float32")
    if seed:
        params = jax.tree.map(lambda leaf: leaf * 1.01, params)
    save_model(directory, model, params, load_tokenizer(BUILTIN))


def test_a_run_goes_on_from_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = {"targets": "q_proj,down_proj", "rslora": True, "init": "gaussian"}
    first = lora_config(steps=1, lora=lora, checkpoint={"every": 0, "export": True})
    state = loop.train(first, tmp_path / "first", devices=ONE)
    assert sorted(state.params["layers"]) == ["attention", "mlp"]
    assert sorted(state.params["layers"]["attention"]) == ["q"]
    adapter = str(tmp_path / "first" / "export" / "adapter")
    raw = json.loads((Path(adapter) / "adapter_config.json").read_text())
    assert raw["target_modules"] == ["q_proj", "down_proj"] and raw["use_rslora"] is True
    first = tmp_path / "first"
    finish(Mirror(str(first), first), report=False)
    told = capsys.readouterr().out
    assert "Hugging Face format" not in told and "--config.checkpoint.merge=true" in told
    assert f"echorl evaluate --model=builtin:countdown --adapter={adapter}\n" in told
    for place in (tmp_path / "first" / "export", Path(adapter)):
        with pytest.raises(UserError, match="holds an adapter, not a model: name its base"):
            load_tokenizer(str(place))
    config = lora_config(steps=1, lora={"rank": 0, "adapter": adapter})
    with open_run(config, tmp_path / "second", prompts_per_step=4, devices=ONE) as (run, opened):
        assert equal(opened.params, state.params) and run.setup.model.lora is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["luffy", "uft", "kl_cov", "dapo"])
def test_other_objectives_train_adapters(name: str, tmp_path: Path) -> None:
    config = lora_config(
        steps=2, objective={"name": name, "kl_coef": None}, data={"max_prompt_tokens": 64}
    )
    state = loop.train(config, tmp_path, devices=ONE)
    assert np.abs(state.params["layers"]["attention"]["v"]["lora"]["b"]).max() > 0


@pytest.mark.slow
def test_supervised_training_lowers_the_loss_by_adapters(tmp_path: Path) -> None:
    # The same eight rows at every step.
    config = lora_config(
        steps=4,
        objective={"name": "sft"},
        optim={"sft_rows_per_step": 8, "learning_rate": 1e-2},
        data={"train": "countdown:split=train&count=8"},
    )
    config = dataclasses.replace(config, echo=dataclasses.replace(config.echo, enabled=False))
    train_supervised(config, tmp_path, devices=ONE)
    lines = list(read_steps(tmp_path / "metrics.jsonl"))
    assert lines[-1]["loss/nll"] < lines[0]["loss/nll"]


@pytest.mark.slow
def test_a_dump_is_not_replayed_on_another_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base(base, seed=0)
    config = lora_config(steps=1, model={"path": str(base)}, debug={"dump_step": 1})
    loop.train(config, tmp_path / "run", devices=ONE)
    save_base(base, seed=1)
    with pytest.raises(UserError, match="are not those of the run"):
        replay(tmp_path / "run" / "dumps" / "step_000001_update_00")
