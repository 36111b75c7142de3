"""Configs from scripts of verl and configs of TRL: values, meanings, receipts, hostile files."""

import json

import pytest

from echorl_jax.cli import run
from echorl_jax.config_file import from_dict, load_config, to_dict
from echorl_jax.errors import UserError
from echorl_jax.tools.import_config import import_file, read_settings

SCRIPT = """#!/bin/bash
set -x  # it's a comment with a quotation mark
ROWS=${ROWS:-"${FOLDER:-/data}/rows.parquet"}
prompt=$((1024 * 2)) name='a run'; echo "$prompt" | cat &
response=$((1024*8))
length=$(((1 + 2) * (3 + 4)))
MORE=(
    actor_rollout_ref.actor.clip_ratio_low=0.1
    actor_rollout_ref.actor.clip_ratio_high=0.3
    +actor_rollout_ref.rollout.engine=new
)
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo data.train_files="['$ROWS', 'b.parquet']" \\
    data.train_batch_size=64 actor_rollout_ref.actor.ppo_mini_batch_size=16 \\
    data.max_prompt_length=$prompt data.max_response_length=${response} \\
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.002 \\
    actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.rollout.n=4 \\
    actor_rollout_ref.rollout.top_k=-1 trainer.save_freq=-1 trainer.total_epochs=3 \\
    reward_model.overlong_buffer.len=4096 trainer.total_training_steps=$length \\
    custom_reward_function.path=my/rewards.py custom_reward_function.name=judge "${MORE[@]}" $@
"""
YAML = """
model_name_or_path: some/model
learning_rate: 2e-6
num_generations: 4
per_device_train_batch_size: 16
gradient_accumulation_steps: 2
max_steps: 200
warmup_ratio: 0.1
loss_type: dr_grpo
scale_rewards: false
beta: 0.04
epsilon: 0.2
epsilon_high: 0.28
reward_funcs: [accuracy_reward, my.rewards.form]
reward_weights: [1.0, 0.2]
lr_scheduler_type: cosine
report_to: [wandb]
vllm_importance_sampling_cap: 2.0
num_train_epochs: 1
mystery: 3
"""


def values(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    return import_file(file)


def test_a_script_of_verl(tmp_path):
    found = values(tmp_path, "run.sh", SCRIPT)
    config = from_dict(nested(found.values))
    assert config.data.train == "/data/rows.parquet,b.parquet"
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (2048, 8192)
    assert (config.rollout.prompts_per_step, config.objective.mini_batches) == (64, 4)
    assert (config.rollout.group_size, config.rollout.top_k, config.steps) == (4, 0, 21)
    # The default of verl is both bounds; the script's own come after it.
    assert (config.objective.epsilon_low, config.objective.epsilon_high) == (0.1, 0.3)
    assert (config.objective.kl_coef, config.objective.kl_estimator) == (0.002, "k3")
    assert config.objective.dual_clip == 3.0 and config.objective.aggregation == "token-mean"
    assert (config.objective.overlong_buffer, config.checkpoint.every) == (0.5, 0)
    assert config.data.grader == "my/rewards.py:judge"
    assert "actor_rollout_ref.rollout.engine = new: not known here" in found.missing
    assert config.epochs == 0  # the number of steps wins in verl


def test_a_config_of_trl(tmp_path):
    found = values(tmp_path, "grpo.yaml", YAML)
    config = from_dict(nested(found.values))
    # 16 x 2 rows of one device, in groups of 4.
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (8, 4)
    assert (config.steps, config.optim.warmup_ratio, config.optim.schedule) == (200, 0.1, "cosine")
    assert (config.objective.name, config.objective.kl_coef) == ("dr_grpo", 0.04)
    assert config.objective.aggregation == "seq-mean-token-sum-norm"
    assert (config.objective.epsilon_low, config.objective.epsilon_high) == (0.2, 0.28)
    assert (config.objective.tis_cap, config.objective.old_logprobs) == (2.0, "trainer")
    assert config.rollout.max_new_tokens == 256  # TRL's default, not ours
    assert "mystery = 3: not known here" in found.missing
    assert config.data.grader == "math, my.rewards:form@0.2"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"algorithm.adv_estimator": "reinforce_plus_plus"}, "reinforce_pp"),
        ({"actor_rollout_ref.actor.policy_loss.loss_mode": "clip-cov"}, "clip_cov"),
        ({"actor_rollout_ref.actor.policy_loss.loss_mode": "geo_mean"}, "gmpo"),
        ({"algorithm.norm_adv_by_std_in_grpo": False}, "dr_grpo"),
        ({"algorithm.adv_estimator": "gae"}, None),
    ],
)
def test_the_objective_by_its_name_in_verl(changes, expected, tmp_path):
    settings = {"algorithm.adv_estimator": "grpo", "data.train_batch_size": 256, **changes}
    found = values(tmp_path, "verl.json", json.dumps(settings))
    assert found.values.get("objective.name") == expected
    if expected is None:
        assert any("there is no 'gae' here" in line for line in found.missing)
    if expected == "gmpo":
        assert "objective.dual_clip = 3.0: 'gmpo' has no use for dual_clip" in found.missing


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.sh", "echo 'hello' && ls", "no settings of TRL and verl found"),
        ("a.sh", "echo 'never closed", "no settings"),
        ("a.yaml", "- a\n- b", "no settings by name"),
        ("a.yaml", "a: [1, {", "a.yaml: "),
        ("a.json", "{", "a.json: "),
        ("a.sh", "A=$((9**9**9)) B=${B:-${B:-${B:-x}}} data.n=${A}", "no settings"),
        ("a.sh", "A=xx\n" + "A=$A$A\n" * 60, "variables make a line of more than"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name, text, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        values(tmp_path, name, text)
    assert "\n" not in str(error.value)


def test_values_that_no_config_may_have_are_in_the_receipt(tmp_path):
    text = "num_generations: 0\nmax_steps: 5\nbeta: .nan\neval_steps: 100\nsave_steps: 0.1\n"
    found = values(tmp_path, "a.yaml", text + "mystery: |-\n  two\n  lines\n")
    assert found.values["steps"] == 5 and "eval.every" not in found.values
    for key in ("rollout.group_size", "objective.kl_coef", "eval.every", "checkpoint.every"):
        assert any(line.startswith(f"config.{key} = ") for line in found.missing)
    assert "mystery = two lines: not known here" in found.missing
    from_dict(nested(found.values))


@pytest.mark.parametrize(
    ("changes", "prompts", "updates"),
    [({}, 1, None), ({"steps_per_generation": 6, "gradient_accumulation_steps": 2}, 6, 3)],
)
def test_the_step_of_trl_in_prompts_and_updates(changes, prompts, updates, tmp_path):
    """By default 8 rows of one device in groups of 8; else six batches of 8, two an update."""
    found = values(tmp_path, "trl.json", json.dumps({"beta": 0.0, "epsilon": 0.2, **changes}))
    assert found.values["rollout.prompts_per_step"] == prompts
    assert found.values.get("objective.mini_batches") == updates


def test_a_variable_from_outside_stays(tmp_path):
    (tmp_path / "run.sh").write_text('x data.train_files="$FAR/rows" --lora-r 8 --use_peft\n')
    assert read_settings(tmp_path / "run.sh") == {
        "data.train_files": "$FAR/rows",
        "lora_r": "8",
        "use_peft": "true",
    }


def test_the_command_writes_a_config_that_loads_and_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "run.sh").write_text(SCRIPT)
    out = tmp_path / "mine.py"
    assert run(["import", str(tmp_path / "run.sh"), f"--out={out}"]) == 0
    assert "not taken over" in capsys.readouterr().out
    config = load_config(str(out))
    assert config.echo.enabled and config.rollout.group_size == 4
    with pytest.raises(UserError, match="mine.py exists"):
        run(["import", str(tmp_path / "run.sh"), f"--out={out}"])
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_dict(config)))
    assert load_config(str(saved), {"steps": "7"}).steps == 7


def nested(flat):
    tree = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def test_epochs_and_schedules_are_taken_over(tmp_path):
    text = "num_generations: 4\nbeta: 0.1\nlr_scheduler_type: warmup_stable_decay\n"
    config = from_dict(nested(values(tmp_path, "trl.yaml", text).values))
    assert (config.epochs, config.optim.schedule) == (3.0, "wsd")  # three epochs by default
    optim = "actor_rollout_ref.actor.optim."
    settings = {"trainer.total_epochs": 15, "data.train_batch_size": 256, f"{optim}lr": 1e-6}
    settings |= {f"{optim}lr_warmup_steps_ratio": 0.03, f"{optim}lr_warmup_steps": -1}
    settings |= {f"{optim}warmup_style": "cosine", f"{optim}min_lr_ratio": 0.1}
    found = values(tmp_path, "verl.json", json.dumps(settings))
    config = from_dict(nested(found.values))
    assert (config.epochs, config.optim.schedule, config.optim.warmup_ratio) == (15, "cosine", 0.03)
    assert (config.optim.min_lr_ratio, config.optim.warmup_steps) == (0.1, 0)


TRL_HUB = """
num_generations: 4
max_steps: 2
push_to_hub: true
hub_model_id: me/out
report_to: [mlflow, tensorboard]
chat_template_kwargs: {enable_thinking: false, depth: 2}
"""
VERL_TRACKERS = """python3 -m verl.trainer.main_ppo data.train_batch_size=8 \\
    trainer.project_name=maths trainer.logger='["console","wandb"]' \\
    +data.apply_chat_template_kwargs.enable_thinking=False
"""


def test_hub_trackers_and_arguments_of_the_template(tmp_path):
    found = values(tmp_path, "trl.yaml", TRL_HUB).values
    assert found["checkpoint.push"] == "me/out" and found["log.tensorboard"]
    assert found["log.mlflow_experiment"] == "echorl" and "log.wandb_project" not in found
    assert json.loads(found["data.template_kwargs"]) == {"enable_thinking": False, "depth": 2}
    found = values(tmp_path, "verl.sh", VERL_TRACKERS).values
    assert found["log.wandb_project"] == "maths" and not found["log.tensorboard"]
    assert json.loads(found["data.template_kwargs"]) == {"enable_thinking": False}
    from_dict(nested(found))


@pytest.mark.parametrize(
    "push", ["push_to_hub: true", "hub_model_id: me/out", "push_to_hub: false"]
)
def test_nothing_is_pushed_without_a_name_or_a_wish(push, tmp_path):
    found = values(tmp_path, "trl.yaml", f"num_generations: 4\nmax_steps: 2\n{push}\n")
    assert "checkpoint.push" not in found.values
    assert any("checkpoint.push" in line for line in found.missing) == (push == "push_to_hub: true")
