"""Compares plans with real arrays, the compiler's operations and hand-worked values."""

import dataclasses
import json
import re
from importlib.metadata import requires
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

from echorl_jax import cli
from echorl_jax.config import Config, ConfigError
from echorl_jax.config_file import load_config
from echorl_jax.core import OBJECTIVES
from echorl_jax.models import Decoder, DecoderConfig, init_params
from echorl_jax.parallel import AXES, Platform, make_mesh
from echorl_jax.tools.plan.chips import GB, TPUS, parse_topology
from echorl_jax.tools.plan.memory_table import compile_programs, lower_program
from echorl_jax.tools.plan.plan import (
    Target,
    candidates,
    find_target,
    make_plan,
    plan_setup,
    unpinned,
)
from echorl_jax.tools.plan.plan_table import as_dict
from echorl_jax.tools.plan.roofline import Exchange, Lengths, exchanges, forward_flops, step_phases
from echorl_jax.training.capacity import weight_memory
from echorl_jax.training.optimizer import init_state, make_optimizer
from echorl_jax.training.setup import Setup, static_setup
from tests.integration.conftest import small_config

ROOT = Path(__file__).parents[3]
PAPER = f"{ROOT / 'configs' / 'paper.py'}:qwen2.5-math-7b,grpo,echo"
ONE_LAYER = DecoderConfig("qwen2", 1000, 256, 512, 1, 8, 2, 32, qkv_bias=True)


def quiet(text: str) -> None:
    del text


def local_bytes(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_supervised_rows_are_counted_as_demonstrations() -> None:
    config = small_config(
        objective={"name": "sft", "mini_batches": 4},
        rollout={"prompts_per_step": 64, "group_size": 8},
        optim={"sft_rows_per_step": 16, "micro_batch_tokens": 1024},
    )
    plans = make_plan(config, "h100:1", tries=0, say=quiet, formula=True)
    found = as_dict(plans, "h100:1")
    assert found["rows_per_step"] == 16 == found["micro_batch"]["rows"]
    tokens = 16 * found["roofline"]["mean_completion_tokens"]
    seconds = plans[-1].step_seconds
    assert found["roofline"]["step_tokens_per_second"] == round(tokens / seconds)


def with_slots_for(
    config: Config, model: Decoder, mesh: Mesh | AbstractMesh, *, slots: int, platform: Platform
) -> Setup:
    setup = static_setup(config, mesh, model, OBJECTIVES["dr_grpo"], platform=platform)
    return dataclasses.replace(setup, slots=slots)


@pytest.mark.parametrize(
    "kind,moment,each",
    [("adamw", "float32", 8), ("adamw", "bfloat16", 6), ("muon", "float32", 8)],
)
def test_weight_memory_equals_that_of_real_arrays(kind: str, moment: str, each: int) -> None:
    model, mesh = Decoder(ONE_LAYER, dtype="bfloat16"), make_mesh(2, 2, 2)
    params = init_params(model, jax.random.key(0), mesh=mesh)
    optimizer = make_optimizer(
        beta1=0.9, beta2=0.99, weight_decay=0.0, max_grad_norm=1.0, moment_dtype=moment, kind=kind
    )
    state = init_state(params, optimizer, mesh)
    memory = weight_memory(
        model,
        mesh,
        moment_bytes=each,
        reference=True,
        shares_weights=False,
        saved_bytes=4 if kind == "muon" else 0,
    )
    assert memory.master == local_bytes(state.params)
    counters = 8 if kind == "adamw" else 24  # step counts; Muon has three coefficients too
    assert abs(memory.moments - local_bytes(state.opt_state)) <= counters
    copy = jax.jit(model.cast)(params)
    assert memory.reference == local_bytes(copy)
    assert memory.always == memory.master + memory.moments + memory.reference


def test_forward_operations_match_the_compiler() -> None:
    """One layer, so that no loop hides its length; within 5%: the mask leaves out half."""
    model = Decoder(ONE_LAYER, dtype="float32", remat="none")
    tokens = jax.ShapeDtypeStruct((1, 32), "int32")
    compiled = jax.jit(model.logits).lower(model.param_shapes(), tokens).compile()
    counted = (compiled.cost_analysis() or {})["flops"]
    assert forward_flops(model, length=32, targets=32) == pytest.approx(counted, rel=0.05)


def test_update_operations_match_the_compiler() -> None:
    config = small_config(
        data={"max_prompt_tokens": 4},
        rollout={"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 28},
        model={"remat": "none", "dtype": "float32"},
    )
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = Decoder(ONE_LAYER, dtype="float32", remat="none")
    setup = with_slots_for(config, model, mesh, slots=32, platform="cpu")
    assert setup.micro_batch == (32, 32)
    compiled = lower_program(setup, "accumulate").compile()
    counted = (compiled.cost_analysis() or {})["flops"]
    phases = {phase.name: phase for phase in step_phases(setup, Lengths(4, 28))}
    assert phases["accumulate"].flops == pytest.approx(counted, rel=0.1)
    decode_steps = 28  # 32 rows in 32 slots
    weights = 4 * (256 * 12 * 32 + 256 * 256 + 3 * 256 * 512 + 256 * 1000)
    assert phases["decode"].bytes > decode_steps * weights


def test_communication_matches_hand_worked_bytes() -> None:
    """On 2 x 2 x 2 chips a gather sends half of an array, an all-reduce all of it."""
    config = small_config(
        data={"max_prompt_tokens": 4},
        rollout={"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 28},
        optim={"micro_batch_tokens": 128},
    )
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    model = Decoder(ONE_LAYER, dtype="bfloat16", remat="layer")
    setup = with_slots_for(config, model, mesh, slots=16, platform="tpu")
    assert setup.micro_batch == (16, 32)  # 128 tokens on each of 4; so 2 for 32 rows
    # Half of table, head, q, k and v, o, three of the MLP and biases in bfloat16; norms in float32.
    matrices = 2 * 1000 * 256 + 2 * 256 * 8 * 32 + 2 * 256 * 2 * 32 + 3 * 256 * 512 + 12 * 32
    weights = 2 * matrices // 2 + 3 * 256 * 4
    token = 256 * 2
    found = {(e.phase, e.axis): e.bytes for e in exchanges(setup, Lengths(4, 28))}
    assert found == {
        ("weights", "fsdp"): weights / 2,
        ("prefill", "tensor"): 2 * (8 * 4 / 4) * token,
        ("decode", "tensor"): (32 * 28 / 16) * 2 * (16 / 4) * token,
        ("accumulate", "fsdp"): 2 * 3 * weights / 2,
        ("accumulate", "data"): 2 * weights / 2,
        ("accumulate", "tensor"): 6 * (32 * 32 / 4) * token,
    }
    assert Exchange("decode", "tensor", 1.2e12).seconds(TPUS["v5p"]) == 2.0
    one = dataclasses.replace(setup, mesh=AbstractMesh((1, 1, 1), AXES))
    assert exchanges(one, Lengths(4, 28)) == []
    scored = dataclasses.replace(setup, objective=OBJECTIVES["grpo"], slots=32)
    more = {(e.phase, e.axis): e.bytes for e in exchanges(scored, Lengths(4, 28))}
    assert more["score", "fsdp"] == 2 * weights / 2
    assert more["score", "tensor"] == 2 * (32 * 32 / 4) * token


def test_local_programs_compile_and_fit() -> None:
    config = small_config()
    target = Target(TPUS["v5p"], 1, jax.devices()[:1], None)
    setup = plan_setup(config, target)
    found = compile_programs(setup, names=("prefill", "decode", "apply"), say=quiet)
    assert [m.program for m in found] == ["prefill", "decode", "apply"]
    weights = 4 * 855_552
    for memory in found:
        assert abs(memory.weights - weights) < 0.02 * weights and memory.source == "compiler"
        assert memory.optimizer == 2 * memory.weights
    # 16 rows x (24 tokens) and 4 prompts x 32 in 4 layers of keys and values.
    shape = setup.model.config
    position = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    assert found[1].cache == (16 * 24 + 4 * 32) * position
    assert found[1].batch < 1e6 < found[1].total


def test_micro_batches_equal_those_of_the_run() -> None:
    """DAPO may learn from several rounds at once; supervised training has its own row count."""
    target = Target(TPUS["v5p"], 1, None, None)
    sizes = {"rollout": {"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 96}}
    sizes |= {"data": {"max_prompt_tokens": 32}, "optim": {"micro_batch_tokens": 32768}}
    grpo = plan_setup(small_config(**sizes), target)
    assert (grpo.rows, grpo.max_rows, grpo.micro_batch) == (64, 64, (64, 128))
    dapo = plan_setup(small_config(**sizes, objective={"name": "dapo", "max_rounds": 3}), target)
    assert (dapo.rows, dapo.max_rows, dapo.micro_batch) == (64, 192, (128, 128))
    sizes["optim"]["sft_rows_per_step"] = 16
    sft = plan_setup(small_config(**sizes, objective={"name": "sft"}), target)
    assert (sft.rows, sft.max_rows, sft.micro_batch) == (16, 16, (32, 128))


@pytest.mark.parametrize(
    ("text", "chip", "count", "name"),
    [
        ("v5p:2x2x2", "TPU v5p", 8, "v5p:2x2x2"),
        # Google's types and their shapes: v5e and v6e count chips, v4 and v5p cores.
        ("v5litepod-16", "TPU v5e", 16, "v5e:4x4"),
        ("v5litepod-1", "TPU v5e", 1, "v5e:1x1"),
        ("v6e-8", "TPU v6e", 8, "v6e:2x4"),
        ("v6e-256", "TPU v6e", 256, "v6e:16x16"),
        ("v5p-8", "TPU v5p", 4, "v5p:2x2x1"),
        ("v5p-64", "TPU v5p", 32, "v5p:2x4x4"),
        ("v4-32", "TPU v4", 16, "v4:2x2x4"),
        ("v4-2048", "TPU v4", 1024, "v4:8x8x16"),
        ("h100:8", "H100 80 GB", 8, "h100:8"),
        ("8xH100", "H100 80 GB", 8, "h100:8"),
        ("2xA100-40GB", "A100 40 GB", 2, "a100-40gb:2"),
        ("a100-80gb:4", "A100 80 GB", 4, "a100:4"),
        ("4090", "RTX 4090 24 GB", 1, "rtx4090:1"),
        ("L40S", "L40S 48 GB", 1, "l40s:1"),
        ("a10g:4", "A10G 24 GB", 4, "a10g:4"),
        ("b200:8", "B200 180 GB", 8, "b200:8"),
    ],
)
def test_the_names_of_clouds_and_cards_are_read(
    text: str, chip: str, count: int, name: str
) -> None:
    found = parse_topology(text)
    assert (found.chip.name, found.count, found.name) == (chip, count, name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h10:8", "no chip is called 'h10'; known: h100"),
        ("8xA100-48GB", "known: a100-80gb, a100-40gb, a10g"),
        ("v5e:4xx", "must be CHIP and a number or shape"),
        ("v5p", "must be CHIP and a number or shape"),
        ("v5p:0x2", "must be CHIP and a number or shape"),
        ("h100:", "must be CHIP and a number or shape"),
        ("v5p-7", "must be CHIP and a number or shape"),
        ("v6e-12", "must be CHIP and a number or shape"),
        ("zzz:1", "known: v4, v5e"),
    ],
)
def test_an_unknown_chip_is_refused_with_near_names(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        parse_topology(text)
    assert "\n" not in str(error.value)


def test_the_memory_of_another_card_is_given() -> None:
    config = small_config()
    plans = make_plan(config, "4090", tries=0, say=quiet, formula=True, memory_gb=48)
    assert plans[-1].target.chip.memory_bytes == 48 * GB


def test_the_hours_are_those_of_the_epochs(tmp_path: Path) -> None:
    """30 rows, 4 prompts a step, 2 passes: 15 steps."""
    row = {"prompt": "1 + 1", "answer": "2"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 30)
    config = small_config(data={"train": str(tmp_path / "rows.jsonl")})
    config = dataclasses.replace(config, epochs=2.0, steps=999)
    assert config.rollout.prompts_per_step == 4
    found = as_dict(make_plan(config, "l4", tries=0, say=quiet, formula=True), "l4")["estimate"]
    assert found["steps"] == 15
    hours = 15 * found["step_seconds"] / 3600
    assert found["run_hours"] == pytest.approx(hours, abs=1e-3)
    config = dataclasses.replace(small_config(data={"train": "not/here.jsonl"}), epochs=2.0)
    found = as_dict(make_plan(config, "l4", tries=0, say=quiet, formula=True), "l4")["estimate"]
    assert found["steps"] is None and found["run_hours"] is None and found["step_seconds"] > 0


def test_the_tower_of_images_is_part_of_the_estimate() -> None:
    """Qwen2.5-VL-7B has two phases more, ``encode`` and ``tower``."""
    config = load_config(f"{ROOT / 'configs' / 'paper.py'}:qwen2.5-vl-7b,grpo,echo")
    plans = make_plan(config, "v5p-16", tries=0, say=quiet, formula=True)
    found = as_dict(plans, "v5p-16")
    shares = found["estimate"]["shares_of_peak"]
    assert set(shares) == set(found["roofline"]["seconds"]) and "encode" in shares
    assert found["estimate"]["step_seconds"] > found["roofline"]["step_seconds"]


def test_progress_says_which_of_how_many_compiles() -> None:
    said: list[str] = []
    setup = plan_setup(small_config(), Target(TPUS["v5p"], 1, jax.devices()[:1], None))
    compile_programs(setup, names=("apply",), say=said.append)
    assert said[0] == "compiling apply (1 of 1) ..." and said[1].startswith("compiled apply in ")


def test_a_libtpu_that_jax_does_not_pin_is_told() -> None:
    (pinned,) = re.findall(r"libtpu==([\d.]+)", " ".join(requires("jax") or []))
    assert unpinned(f"libtpu {pinned}1") == unpinned("") == ""
    said = unpinned("libtpu 99.0.1")
    assert "libtpu 99.0.1" in said and f"libtpu=={pinned}" in said and "\n" not in said


def test_a_missing_libtpu_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    def missing(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'libtpu'")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match=r"pip install 'jax\[tpu\]=="):
        find_target("v5p:2x2x2")


def test_a_config_that_does_not_fit_is_changed_until_it_fits() -> None:
    """7.6B parameters in bfloat16 take 15.2 GB on each chip unless tensor splits them."""
    plans = make_plan(load_config(PAPER), "v5e:8x8", tries=6, say=quiet, formula=True)
    assert not plans[0].fits and "decode" in plans[0].too_large
    assert plans[-1].fits and plans[-1].changes["mesh.tensor"] in (2, 4)
    assert plans[-1].step_seconds < 1000  # with enough slots
    assert plans[-1].peak_bytes < 16 * GB
    assert plans[0].memory[0].weights > 15.2 * GB
    alone = make_plan(load_config(PAPER), "h100:1", tries=6, say=quiet)
    assert not alone[-1].fits and alone[-1].memory[0].source == "formula"


def test_a_large_update_recomputes_layers_or_cuts_micro_batches() -> None:
    config = load_config(PAPER, {"model.remat": "none"})
    (plan,) = make_plan(config, "v5p:2x2x2", tries=0, say=quiet, formula=True)
    assert plan.too_large == ["accumulate"]
    # A layer's activations for all 28 layers do not fit even for a row on each chip.
    first = candidates(config, plan.target, plan.lengths)[0]
    assert first["model.remat"] == "layer" and "optim.micro_batch_tokens" not in first
    chip = dataclasses.replace(TPUS["v5p"], memory_bytes=10**15)
    roomy = dataclasses.replace(plan, target=dataclasses.replace(plan.target, chip=chip))
    assert roomy.fits
    small = dataclasses.replace(TPUS["v5p"], memory_bytes=40 * GB)
    tight = dataclasses.replace(plan.target, chip=small)
    cut = candidates(load_config(PAPER), tight, plan.lengths)
    assert cut and all("optim.micro_batch_tokens" in c or "mesh.tensor" in c for c in cut)


def test_the_command_prints_json_or_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(["plan", f"--config={PAPER}", "--topology=h100:8", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert code == 0 and result["fits"] and result["chips"] == 8
    assert {p["program"] for p in result["programs"]} >= {"prefill", "decode", "accumulate"}
    assert all(p["source"] == "formula" for p in result["programs"])
    # 128 prompts x 8 rows of 8,192 tokens.
    sampled = 128 * 8 * 8192
    assert result["roofline"]["step_tokens_per_second"] == pytest.approx(
        sampled / result["roofline"]["step_seconds"], rel=0.01
    )
    sent = {(e["phase"], e["axis"]): e for e in result["roofline"]["communication_estimate"]}
    assert set(sent) == {("weights", "fsdp"), ("accumulate", "fsdp")}
    # 7.6B parameters in bfloat16, of which each of 8 sends 7/8.
    assert sent["weights", "fsdp"]["bytes_per_chip"] == pytest.approx(15.23e9 * 7 / 8, rel=0.01)
    assert sent["weights", "fsdp"]["seconds"] == pytest.approx(15.23 * 7 / 8 / 450, rel=0.01)
    likely = result["estimate"]
    shares = {name: entry["share"] for name, entry in likely["shares_of_peak"].items()}
    assert shares == {"prefill": 0.5, "decode": 0.35, "accumulate": 0.5, "apply": 0.78}
    seconds = sum(s / shares[name] for name, s in result["roofline"]["seconds"].items())
    seconds += sum(exchange["seconds"] for exchange in sent.values())
    assert likely["step_seconds"] == pytest.approx(seconds, rel=1e-3)
    assert likely["run_hours"] == pytest.approx(seconds * likely["steps"] / 3600, rel=1e-3)
    assert cli.run(["plan", f"--config={PAPER}", "--topology=h100:8"]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert (
        "communication, estimated, seconds at 450 GB/s of links a chip: weights over fsdp" in said
    )
    assert "estimate, not a bound:" in said and f"h for {likely['steps']} steps" in said
    assert cli.run(["plan", f"--config={PAPER}", "--topology=h100:1", "--estimate"]) == 1
    assert "does not fit" in capsys.readouterr().out.replace("\n", " ")
