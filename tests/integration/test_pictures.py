"""Runs with pictures: pixels reach the loss, both ways, and nothing else changes."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file, save_file

from echorl_jax.commands.train import finish
from echorl_jax.config import Config, ConfigError, LoraConfig, validate
from echorl_jax.core import batch_loss
from echorl_jax.data import DataError, Prompt, PromptStream, load_rows
from echorl_jax.errors import UserError
from echorl_jax.evaluation.benchmark import Benchmark, run_benchmark
from echorl_jax.evaluation.check import check
from echorl_jax.files import read_steps
from echorl_jax.models import (
    base_params,
    load_decoder,
    load_model,
    merge,
    save_model,
    split_params,
)
from echorl_jax.models.image_features import image_features
from echorl_jax.remote import Mirror
from echorl_jax.rollout import generate, score_rows
from echorl_jax.rollout.prompt_images import place_images
from echorl_jax.training import loop
from echorl_jax.training.convert import convert
from echorl_jax.training.setup import Setup, make_setup
from echorl_jax.training.sft import demonstrations
from echorl_jax.training.update import micro_gradient, tower_gradient, with_features
from echorl_jax.types import RowImages, TrainBatch
from tests.integration.conftest import small_config
from tests.integration.test_train import steady

ONE = jax.devices()[:1]
SHARED = Path(__file__).parents[3] / "shared" / "data"


def shapes_config(**sections: Any) -> Config:
    """A short run of the tiny model with a vision tower, from random weights."""
    model = {"path": "builtin:shapes", "init": "random", "dtype": "float32", "remat": "none"}
    data = {
        "train": "shapes:count=64",
        "grader": "shapes",
        "grader_workers": 0,
        "max_prompt_tokens": 64,
        "max_image_tokens": 16,
    }
    return small_config(
        model={**model, **sections.pop("model", {})},
        data={**data, **sections.pop("data", {})},
        rollout={"max_new_tokens": 16, **sections.pop("rollout", {})},
        optim={"compile_ahead": False, "learning_rate": 1e-3, **sections.pop("optim", {})},
        **sections,
    )


def prompts_of(setup: Setup, count: int) -> list[Prompt]:
    stream = PromptStream(
        load_rows(setup.config.data.train),
        setup.tokenizer,
        prompts_per_step=count,
        seed=0,
        max_prompt_tokens=64,
        processor=setup.processor,
    )
    return next(stream)


@pytest.mark.parametrize("modules", ["", "tower", "both"])
def test_the_gradient_in_two_stages_is_that_of_the_whole_loss(modules: str):
    """Features once an image, their gradient summed over rows, then the tower's: the same sums.

    The tower is trained itself or by its adapters.
    """
    lora = {"rank": 3, "modules": modules} if modules else {}
    config = shapes_config(
        model={"base_dtype": "float32"} if lora else {},
        lora=lora,
        objective={"name": "sft"},
        echo={"enabled": False},
    )
    setup, params = make_setup(config, devices=ONE)
    if lora:  # b begins as zeros
        noise = 0.02 * jax.random.normal(jax.random.key(1), (10_000,))
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: noise[: x.size].reshape(x.shape) if path[-1].key == "b" else x, params
        )
    frozen, trainable = split_params(setup.model, params)
    prompts = prompts_of(setup, 4)
    # A prompt with two rows, and rows of one batch in two micro-batches.
    prompts = [prompts[0], *prompts]
    batch = demonstrations(setup, prompts)
    images = [image for prompt in prompts for image in prompt.images]
    seen = with_features(setup, params, batch, images)

    def whole(trainable: Any) -> Any:
        params = merge(frozen, trainable)
        features = image_features(setup.model, params, images, size=setup.feature_slots)
        rows = dataclasses.replace(
            batch, images=dataclasses.replace(batch.images, features=features)
        )
        logprobs, entropy = score_rows(
            setup.model,
            params,
            *(jnp.asarray(x) for x in (rows.tokens, rows.prompt_length, rows.length)),
            max_new_tokens=rows.loss_mask.shape[1],
            images=rows.images,
        )
        return batch_loss(logprobs, entropy, rows, setup.objective, echo_coef=0.0)[0]

    expected = jax.jit(jax.grad(whole))(trainable)

    def rows_of(part: slice) -> TrainBatch:
        def cut(path: Any, leaf: Any) -> Any:
            return leaf if path[-1].name == "features" else leaf[part]

        return jax.tree_util.tree_map_with_path(cut, seen)

    parts = [
        micro_gradient(setup, trainable, rows_of(part), echo_coef=0.0, frozen=frozen)
        for part in (slice(0, 2), slice(2, 5))
    ]
    of_features = sum(part.of_features for part in parts)
    gradient = jax.tree.map(jnp.add, *(part.gradient for part in parts))
    with jax.set_mesh(setup.mesh):
        gradient = tower_gradient(
            setup.model, frozen, trainable, images, of_features, gradient, mesh=setup.mesh
        )
    assert ("layers" in expected) == (modules != "tower")
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected["vision"]))
    assert largest > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected
    )


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
def test_sampler_and_trainer_agree_on_rows_with_pictures(axes: tuple[int, int, int]):
    """Log-probabilities and entropies by both; no token for pictures has any probability."""
    sizes = dict(zip(("data", "fsdp", "tensor"), axes, strict=True))
    config = shapes_config(mesh=sizes)
    setup, params = make_setup(config, devices=jax.devices()[: int(np.prod(axes))])
    model, mesh = setup.model, setup.mesh
    prompts = prompts_of(setup, 8)
    ids, images = [prompt.ids for prompt in prompts], [prompt.images for prompt in prompts]
    rollouts = generate(
        model,
        params,
        ids,
        jax.random.key(3),
        group_size=2,
        max_new_tokens=24,
        eos_ids=setup.sampling.eos_ids,
        images=images,
        mesh=mesh,
    )
    width = rollouts.prompt_ids.shape[1] + 24
    index, positions, _ = place_images(model, ids, images, width=width)
    group = np.asarray(rollouts.group)
    every = [image for own in images for image in own]
    params = jax.device_get(params)
    features = image_features(model, params, every, size=8 * 16)
    tokens = np.zeros((len(group), width), np.int32)
    length = np.zeros(len(group), np.int32)
    for row, prompt in enumerate(group):
        written = np.asarray(rollouts.completion_ids[row, : rollouts.completion_length[row]])
        whole = [*ids[prompt], *written]
        tokens[row, : len(whole)], length[row] = whole, len(whole)
        assert not set(written.tolist()) & set(model.config.never)
    logprobs, entropy = jax.jit(score_rows, static_argnames=("model", "max_new_tokens"))(
        model,
        params,
        tokens,
        np.array([len(ids[prompt]) for prompt in group]),
        length,
        max_new_tokens=24,
        images=RowImages(features, index[group], positions[group]),
    )
    written = np.arange(24) < np.asarray(rollouts.completion_length)[:, None]
    for ours, theirs in ((logprobs, rollouts.rollout_logprobs), (entropy, rollouts.token_entropy)):
        np.testing.assert_allclose(
            np.where(written, ours, 0), np.where(written, theirs, 0), atol=2e-5
        )


@pytest.mark.parametrize("vision", ["trained", "frozen"])
def test_a_run_trains_the_tower_or_leaves_it_and_resumes_bit_for_bit(vision: str, tmp_path: Path):
    config = shapes_config(
        steps=3,
        model={"vision": vision},
        rollout={"check_every": 1, "prompts_per_step": 4, "group_size": 4},
        # Half of the rows are right, at random, so that there is something to learn.
        data={"grader": "tests.integration.graders:even_length", "grader_workers": 1},
        objective={"kl_coef": 0.01, "mini_batches": 2},
        checkpoint={"every": 1, "keep": 3},
    )
    _, params = make_setup(config, devices=ONE)
    before = jax.device_get(params)
    state = loop.train(config, tmp_path / "run", devices=ONE)
    lines = list(read_steps(tmp_path / "run" / "metrics.jsonl"))
    assert all(line["optim/skipped"] == 0 for line in lines)
    assert max(line["rollout/logprob_gap_mean"] for line in lines) < 1e-4
    if vision == "frozen":
        assert "vision" not in state.params
    else:
        moved = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max()), state.params["vision"], before["vision"]
        )
        assert min(jax.tree.leaves(moved)) > 0
    short = dataclasses.replace(config, steps=2)
    loop.train(short, tmp_path / "other", devices=ONE)
    again = loop.train(config, tmp_path / "other", devices=ONE)
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    assert steady(tmp_path / "other") == steady(tmp_path / "run")


def test_pictures_that_do_not_decode_and_too_many_tokens(tmp_path: Path):
    sides = {"a": 84, "broken": 84, "c": 84, "large": 112}
    for name, side in sides.items():
        PIL.Image.new("RGB", (side, side), "white").save(tmp_path / f"{name}.png")
    whole = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    file = tmp_path / "rows.jsonl"
    rows = [{"problem": "<image>How many?", "answer": "0", "images": [f"{n}.png"]} for n in sides]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    setup, _ = make_setup(shapes_config(data={"train": str(file)}), devices=ONE)
    options = {"prompts_per_step": 3, "seed": 0, "max_prompt_tokens": 64}
    stream = PromptStream(
        load_rows(str(file)), setup.tokenizer, **options, processor=setup.processor
    )
    with pytest.raises(DataError, match="row 1 of the training rows, column images: picture 1 can"):
        next(stream)
    stream = PromptStream(
        load_rows(str(file)),
        setup.tokenizer,
        **options,
        processor=dataclasses.replace(setup.processor, most_tokens=9),
        on_bad_row="skip",
    )
    # Of four rows one is broken and one has 16 image tokens.
    assert {prompt.index for prompt in next(stream)} <= {0, 2} and stream.too_long > 0


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps({"answer": "0", **row}) + "\n" for row in rows))
    return str(path)


def test_rows_with_and_without_pictures_in_one_file(tmp_path: Path):
    """Steps of training in which all, some and none of the rows show one, and an evaluation."""
    PIL.Image.new("RGB", (84, 84), "red").save(tmp_path / "a.png")
    shown = {"problem": "Is <image> like <image>?", "images": ["a.png", "a.png"]}
    plain: list[dict[str, Any]] = [
        {"problem": "How many are there?", "images": images} for images in (None, [], [None])
    ]
    config = shapes_config(
        steps=1,
        rollout={"prompts_per_step": 4, "check_every": 1},
        data={"grader": "tests.integration.graders:even_length", "grader_workers": 1}
        | {"max_image_tokens": 24},
    )
    for name, rows in (("mixed", [shown, *plain]), ("none", [*plain, plain[0]])):
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        own = dataclasses.replace(config, data=dataclasses.replace(config.data, train=file))
        loop.train(own, tmp_path / name, devices=ONE)
        (line,) = read_steps(tmp_path / name / "metrics.jsonl")
        assert line["optim/skipped"] == 0 and line["rollout/logprob_gap_mean"] < 1e-4
    convert(tmp_path / "mixed", tmp_path / "model")
    options = Benchmark(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "mixed.jsonl"),
        grader="math",
        max_new_tokens=4,
        dtype="float32",
    )
    (result,) = run_benchmark(options, tmp_path / "scores").values()
    assert len((tmp_path / "scores" / "generations.jsonl").read_text().splitlines()) == 4, result


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "<image><image>Which?", "images": ["a.png"]}, "1 pictures, but <image> stand"),
        ({"problem": "<image>Which?", "images": ["a.png"] * 2}, "2 pictures, but <image> stands 1"),
        ({"problem": "<image>Which?", "images": [None]}, "0 pictures, but <image> stands 1 times"),
        ({"problem": "<image>Which?"}, "0 pictures, but <image> stands 1 times"),
        ({"problem": "A <|image_pad|>?", "images": ["a.png"]}, "1 pictures, but the prompt has 2"),
        ({"problem": "A <|image_pad|>?"}, "0 pictures, but the prompt has 1 image tokens"),
    ],
)
def test_texts_and_pictures_that_do_not_fit_name_the_row(
    row: dict[str, Any], message: str, tmp_path: Path
):
    PIL.Image.new("RGB", (84, 84), "red").save(tmp_path / "a.png")
    good = {"problem": "<image>Which?", "images": ["a.png"]}
    file = write_rows(tmp_path / "rows.jsonl", [good, row])
    setup, _ = make_setup(shapes_config(data={"train": file}), devices=ONE)
    options = {"prompts_per_step": 2, "seed": 0, "max_prompt_tokens": 64}
    stream = PromptStream(load_rows(file), setup.tokenizer, **options, processor=setup.processor)
    with pytest.raises(DataError, match=re.escape(f"column images: {message}")) as error:
        next(stream)
    assert "row 1 of the training rows" in str(error.value) and "\n" not in str(error.value)


def test_an_expert_who_writes_tokens_of_pictures_is_refused(tmp_path: Path):
    """The text <image> is text in a completion; a token that stands for a picture has no logit."""
    PIL.Image.new("RGB", (84, 84), "red").save(tmp_path / "a.png")

    def batch_of(text: str) -> TrainBatch:
        row = {"problem": "<image>Which?", "images": ["a.png"], "solution": text}
        file = write_rows(tmp_path / "rows.jsonl", [row])
        sections = {"objective": {"name": "sft"}, "echo": {"enabled": False}}
        setup, _ = make_setup(shapes_config(data={"train": file}, **sections), devices=ONE)
        return demonstrations(setup, prompts_of(setup, 1))

    assert batch_of("see <image>").loss_mask.sum() > 3
    with pytest.raises(DataError, match=r"row 0 .*'<\|vision_start\|>', which stands for pictures"):
        batch_of("see <|vision_start|>")


def test_a_model_of_text_refuses_pictures_in_one_line(tmp_path: Path):
    PIL.Image.new("RGB", (84, 84), "red").save(tmp_path / "a.png")
    row = {"problem": "<image>Which?", "images": ["a.png"]}
    file = write_rows(tmp_path / "rows.jsonl", [row])
    line = "row 0.*column images: pictures, but the model has no vision tower"
    data = {"train": file, "grader": "math", "grader_workers": 0}
    for on_bad_row in ("error", "skip"):
        config = small_config(data={**data, "on_bad_row": on_bad_row})
        with pytest.raises(UserError, match=line):
            loop.train(config, tmp_path / on_bad_row, devices=ONE)
    with pytest.raises(UserError, match=line):
        run_benchmark(Benchmark(model="builtin:countdown", data=file), tmp_path / "scores")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"vision": "trained"}, "lora": {"rank": 4}},
            "config.model.vision = 'trained': must be None or frozen",
        ),
        ({"lora": {"modules": "tower"}}, "config.lora.modules = 'tower': must be text without"),
        (
            {"lora": {"rank": 4, "modules": "tower", "targets": "q_proj"}},
            "config.lora.targets = 'q_proj': must be linears of lora.modules = 'tower'",
        ),
        (
            {"lora": {"rank": 4, "targets": "q_proj,qkv"}},
            "config.lora.targets = 'q_proj,qkv': must be linears of lora.modules = 'text'",
        ),
        ({"lora": {"rank": 4, "targets": "q_proj,head"}}, "config.lora.targets = 'q_proj,head'"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(shapes_config(**sections))


def test_adapters_of_the_tower_need_a_tower():
    config = small_config(lora={"rank": 4, "modules": "both"})
    with pytest.raises(ConfigError, match="lora.modules = 'both': builtin:countdown has no vision"):
        make_setup(config, devices=ONE)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files beside the repository")
def test_geometry3k_through_check_training_evaluation_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = str(SHARED / "geometry3k_6.parquet")
    pictures = {"template": "think", "max_pixels": 50_000, "max_image_tokens": 64}
    config = shapes_config(
        steps=2,
        data={
            "train": rows,
            "grader": "math@0.9, format@0.1",
            "grader_workers": 1,
            "max_prompt_tokens": 320,
            **pictures,
        },
    )
    assert check(config, rows=6, show=1)
    shown = capsys.readouterr().out
    assert "picture 1: " in shown and " pixels, " in shown and "train: 6 rows" in shown
    run = tmp_path / "run"
    loop.train(config, run, devices=ONE)
    finish(Mirror(str(run), run), report=True)
    lines = list(read_steps(run / "metrics.jsonl"))
    assert len(lines) == 2 and all(line["optim/skipped"] == 0 for line in lines)
    page = (run / "report.html").read_text()
    assert page.count("/9j/") >= 4  # JPEG as base64
    assert max(map(len, re.findall(r'"/9j/[^"]*"', page))) < 20_000
    options = Benchmark(
        model="builtin:shapes",
        data=rows,
        grader="math",
        max_new_tokens=8,
        max_pixels=50_000,
        dtype="float32",
    )
    with pytest.raises(UserError, match="model.safetensors"):
        run_benchmark(options, tmp_path / "none")
    convert(run, tmp_path / "model")
    trained = dataclasses.replace(options, model=str(tmp_path / "model"))
    assert run_benchmark(trained, tmp_path / "scores").keys() == {"geometry3k_6"}
    assert len((tmp_path / "scores" / "generations.jsonl").read_text().splitlines()) == 6


def test_adapters_beside_a_frozen_tower(tmp_path: Path):
    """LoRA trains the text's adapters; PEFT's files name the part of the model that they are in."""
    config = shapes_config(
        steps=2,
        lora={"rank": 4},
        data={"grader": "tests.integration.graders:even_length", "grader_workers": 1},
        checkpoint={"export": True, "merge": True},
        debug={"dump_step": 1},
    )
    run = tmp_path / "run"
    state = loop.train(config, run, devices=ONE)
    assert "vision" not in state.params and not (run / "dumps").exists()
    adapter = run / "export" / "adapter"
    names = load_file(adapter / "adapter_model.safetensors")
    first = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert first in names and not any("visual" in name for name in names)
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert "language_model.layers.2.mlp.down_proj" in targets
    base = tmp_path / "base"
    _, params = make_setup(config, devices=ONE)
    model = load_decoder("builtin:shapes", dtype="float32")
    save_model(base, model, base_params(params))
    apart = load_model(base, dtype="float32", adapter=adapter)
    merged = load_model(run / "export", dtype="float32")
    tokens = np.arange(12, dtype=np.int32)[None]
    ours, theirs = (np.asarray(jax.jit(m.logits)(p, tokens)) for m, p in (merged, apart))
    np.testing.assert_allclose(ours, theirs, atol=0.06)  # merged in bfloat16
    older = {name.replace("language_model.", ""): value for name, value in names.items()}
    save_file(older, adapter / "adapter_model.safetensors")
    again = load_model(base, dtype="float32", adapter=adapter)
    jax.tree.map(np.testing.assert_array_equal, again[1], apart[1])


@pytest.mark.parametrize("targets", ["all-linear", "qkv,merger.mlp.0,o_proj"])
def test_adapters_of_the_tower_train_beside_frozen_weights(targets: str, tmp_path: Path):
    """A frozen tower's adapters are trained; a run resumes, and one goes on from the PEFT file."""
    config = shapes_config(
        steps=2,
        model={"vision": "frozen"},
        lora={"rank": 4, "modules": "both", "targets": targets},
        rollout={"check_every": 1},
        objective={"kl_coef": 0.01},
        data={"grader": "tests.integration.graders:even_length", "grader_workers": 1},
        checkpoint={"every": 1, "keep": 3, "export": True},
    )
    run = tmp_path / "run"
    state = loop.train(config, run, devices=ONE)
    lines = list(read_steps(run / "metrics.jsonl"))
    assert all(line["optim/skipped"] == 0 for line in lines)
    assert max(line["rollout/logprob_gap_mean"] for line in lines) < 1e-4
    moved = [float(jnp.abs(x).max()) for x in adapters_of(state.params["vision"], "b")]
    assert len(moved) == (7 if targets == "all-linear" else 2) and min(moved) > 0
    assert all("lora" in jax.tree_util.keystr(path) for path, _ in leaves_of(state.params))
    loop.train(dataclasses.replace(config, steps=1), tmp_path / "other", devices=ONE)
    again = loop.train(config, tmp_path / "other", devices=ONE)
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    after = dataclasses.replace(
        config, lora=dataclasses.replace(LoraConfig(), adapter=str(run / "export" / "adapter"))
    )
    setup, params = make_setup(after, devices=ONE)
    assert setup.trains_tower
    jax.tree.map(np.testing.assert_array_equal, split_params(setup.model, params)[1], state.params)


def leaves_of(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def adapters_of(tree: Any, part: str) -> list[Any]:
    return [leaf for path, leaf in leaves_of(tree) if path[-1].key == part]


@pytest.mark.parametrize("objective", ["grpo", "dapo"])
def test_nothing_is_compiled_after_the_first_step(objective: str, tmp_path: Path):
    """The warm-up runs the tower's programs and micro-batches with features."""
    config = shapes_config(
        steps=2,
        objective={"name": objective, "max_rounds": 2},
        optim={"compile_ahead": True, "compile_in_background": False},
        data={"grader": "tests.integration.graders:even_length", "grader_workers": 1},
    )
    loop.train(config, tmp_path, devices=ONE)
    first, second = read_steps(tmp_path / "metrics.jsonl")
    assert first["optim/skipped"] == second["optim/skipped"] == 0
    assert first["compile/count"] == second["compile/count"]
