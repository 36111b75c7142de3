"""The paper's configs: every combination loads, and says what the authors' recipe says."""

import json
from pathlib import Path

import jax
import pytest

import echorl_jax
from echorl_jax.config import ConfigError
from echorl_jax.config_file import load_config
from echorl_jax.core import OBJECTIVES
from echorl_jax.models import Decoder
from echorl_jax.models.published import architecture
from echorl_jax.rewards.loading import parse_graders
from echorl_jax.training.setup import configured_objective

FILE = str(Path(__file__).parent.parent / "configs" / "paper.py")
KINDS = {
    "qwen2.5-math-1.5b": "qwen2",
    "qwen2.5-math-7b": "qwen2",
    "qwen2.5-7b-instruct": "qwen2",
    "llama-3.1-8b-instruct": "llama",
    "qwen2.5-vl-3b": "qwen2_5_vl",
    "qwen2.5-vl-7b": "qwen2_5_vl",
}
KNOWN = Path(echorl_jax.__file__).parent / "assets" / "architectures"
PUBLISHED = {file.stem.replace("--", "/") for file in KNOWN.glob("*.json")}
METHODS = ("grpo", *sorted(set(OBJECTIVES) - {"grpo"}))


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_loads(model: str, method: str) -> None:
    plain = load_config(f"{FILE}:{model},{method}")
    assert not plain.echo.enabled and plain.model.path in PUBLISHED
    assert architecture(plain.model.path).model_type == KINDS[model]
    objective = configured_objective(plain)
    assert objective.expert_rows == (1 if method == "luffy" else 0)
    assert objective.hints == (method == "uft")
    assert objective.dynamic_sampling == (method == "dapo")
    if method != "sft":
        assert load_config(f"{FILE}:{model},{method},echo").echo.enabled


def test_the_recipe_with_pictures() -> None:
    config = load_config(f"{FILE}:qwen2.5-vl-7b,grpo,echo")
    rollout, objective = config.rollout, configured_objective(config)
    assert (rollout.prompts_per_step, rollout.group_size, rollout.max_new_tokens) == (512, 5, 2048)
    assert rollout.prompts_per_step // config.objective.mini_batches == 128
    assert (objective.kl_coef, objective.kl_estimator, config.optim.weight_decay) == (
        0.01,
        "k3",
        0.01,
    )
    assert objective.aggregation == "token-mean" and config.model.vision == "trained"
    assert [(each.name, each.weight) for each in parse_graders(config.data.grader)] == [
        ("math", 0.9),
        ("format", 0.1),
    ]


def test_the_recipe_of_the_authors() -> None:
    config = load_config(f"{FILE}:qwen2.5-math-7b,grpo,echo")
    rollout, objective = config.rollout, configured_objective(config)
    assert (rollout.prompts_per_step, rollout.group_size, rollout.max_new_tokens) == (128, 8, 8192)
    assert rollout.prompts_per_step // config.objective.mini_batches == 64
    assert (config.data.max_prompt_tokens, rollout.temperature) == (1024, 1.0)
    assert (config.optim.learning_rate, config.optim.max_grad_norm) == (1e-6, 1.0)
    assert (objective.kl_coef, objective.entropy_coef, objective.epsilon_low) == (0, 0.001, 0.2)
    assert objective.advantages is OBJECTIVES["dr_grpo"].advantages
    assert objective.aggregation == "seq-mean-token-sum-norm"
    assert config.optim.micro_batch_tokens == 32768 and config.eval.temperature == 0.6
    assert (config.checkpoint.every, config.eval.every) == (5, 5)
    assert config.echo.coef == 0.001 and config.echo.delimiter_ids == (198, 271)
    assert load_config(f"{FILE}:llama-3.1-8b-instruct,grpo,echo").echo.delimiter == "newline"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (":gpt,grpo", "MODEL is 'gpt', must be one of qwen2.5-math-1.5b"),
        ("", "MODEL is ''"),
        (":qwen2.5-math-7b", "METHOD is '', must be one of grpo, dapo, luffy, uft"),
        (":qwen2.5-math-7b,ppo", "METHOD is 'ppo'"),
        (":qwen2.5-math-7b,grpo,eco", "third word is 'eco'"),
        (":qwen2.5-math-7b,sft,echo", "leave out echo"),
    ],
)
def test_a_wrong_word_is_named(argument: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(FILE + argument)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_parameter_counts_are_those_of_the_model_cards() -> None:
    """1.54B, 7.61B, 7.61B and 8.03B, by the arithmetic of the published fields.

    The texts of the vision models are those of Qwen2.5; with their towers, 3.75B and 8.29B.
    """
    counts = {}
    for name in PUBLISHED:
        a = architecture(name)
        attention = a.hidden_size * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
        bias = a.head_dim * (a.num_heads + 2 * a.num_kv_heads) if a.qkv_bias else 0
        layer = attention + bias + 3 * a.hidden_size * a.intermediate_size + 2 * a.hidden_size
        tables = a.vocab_size * a.hidden_size * (1 if a.tied_embeddings else 2)
        counts[name] = a.num_layers * layer + tables + a.hidden_size
    assert {name: round(n / 1e9, 2) for name, n in counts.items()} == {
        "Qwen/Qwen2.5-7B-Instruct": 7.62,
        "Qwen/Qwen2.5-VL-3B-Instruct": 3.09,
        "Qwen/Qwen2.5-VL-7B-Instruct": 7.62,
        "Qwen/Qwen2.5-Math-1.5B": 1.54,
        "Qwen/Qwen2.5-Math-7B": 7.62,
        "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    }
    for name, total in (("3B", 3.75), ("7B", 8.29)):
        model = Decoder(architecture(f"Qwen/Qwen2.5-VL-{name}-Instruct"))
        leaves = jax.tree.leaves(model.param_shapes())
        assert round(sum(leaf.size for leaf in leaves) / 1e9, 2) == total


def test_a_directory_goes_before_what_is_known(tmp_path: Path, monkeypatch) -> None:
    known = architecture("Qwen/Qwen2.5-Math-1.5B")
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "Qwen" / "Qwen2.5-Math-1.5B"
    directory.mkdir(parents=True)
    raw = {"model_type": "qwen2", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    raw |= {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}
    (directory / "config.json").write_text(json.dumps(raw))
    assert architecture("Qwen/Qwen2.5-Math-1.5B").vocab_size == 10 != known.vocab_size
