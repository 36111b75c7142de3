"""EchoRL in Tunix's GRPO learner: rollouts, rewards and the trainer are Tunix's.

    pip install google-tunix
    python examples/tunix_plugin.py --steps=20

``EchoLearner`` takes what ``GRPOLearner`` takes, and the tokens that end a reasoning step. Its loss
is Tunix's GRPO loss plus lambda times the echo loss, from one forward pass. Clips are mined there,
from the logits of that pass, so nothing is scored twice. With several micro-batches in a mini-batch
the echo loss is the mean over the prompts with a clip of each of them. Packed sequences are not
supported.
"""

import argparse
import dataclasses
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.rl import common, rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner, TrainExample
from tunix.rl.rollout.base_rollout import RolloutConfig

import echorl_jax as echo
from echorl_jax.data import encode_prompt, load_rows
from echorl_jax.files import model_path


@dataclasses.dataclass(kw_only=True)
class EchoConfig(GRPOConfig):
    """Tunix's settings of GRPO, and those of the echo."""

    echo_coef: float = 1e-3  # lambda
    success: float = 1.0  # the reward from which on a completion is a verified success
    num_steps: int = 64  # static bound on reasoning steps; later ones join the last


@flax.struct.dataclass(frozen=True)
class EchoExample(TrainExample):
    """A batch of Tunix with the verdicts, bool [B]; the rows of a group follow each other."""

    correct: jax.Array | None = None


class EchoLearner(GRPOLearner):
    """Tunix's GRPO learner with the echo loss.

    Args:
      is_delimiter: bool [V], tokens that end a reasoning step.
      **settings: of ``GRPOLearner``; ``algo_config`` is an ``EchoConfig``.
    """

    def __init__(self, *, is_delimiter, **settings):
        super().__init__(**settings)
        rollout, config = self.rl_cluster.rollout, self.algo_config

        def loss(model, train_example, algo_config):
            ids = {"pad_id": rollout.pad_id(), "eos_id": rollout.eos_id()}
            return echo_grpo_loss(model, train_example, config, is_delimiter, **ids)

        trainer = self.rl_cluster.actor_trainer
        trainer.with_loss_fn(loss, has_aux=True)
        names = ("kl", "pg_clipfrac", "echo_loss", "echo_clips")
        trainer.with_rl_metrics_to_log(dict.fromkeys(names, np.mean))

    def _compute_rewards(self, *args, **kwargs):
        self._rewards = super()._compute_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_compute_advantage(self, *args, **kwargs):
        example = super()._generate_and_compute_advantage(*args, **kwargs)
        correct = jnp.asarray(self._rewards >= self.algo_config.success)
        return EchoExample(**vars(example), correct=correct)


def echo_grpo_loss(model, example, config, is_delimiter, *, pad_id, eos_id):
    """-> (loss, metrics): the clipped loss, beta times the KL term, lambda times the echo loss."""
    logprobs, logits = common.compute_per_token_logps(
        *nnx.split(model),
        prompt_tokens=example.prompt_ids,
        completion_tokens=example.completion_ids,
        pad_id=pad_id,
        eos_id=eos_id,
        stop_gradient=False,
        return_logits=True,
        temperature=config.temperature,
    )
    mask, old = example.completion_mask, example.old_per_token_logps
    log_ratio = logprobs - (jax.lax.stop_gradient(logprobs) if old is None else old)
    advantages = example.advantages.astype(jnp.float32)
    clip = {"epsilon_low": config.epsilon, "epsilon_high": config.epsilon}
    per_token = echo.policy_loss(log_ratio, advantages, **clip)
    policy = common.aggregate_loss(per_token, mask, config.loss_agg_mode)
    kl = jnp.float32(0.0)
    if example.ref_per_token_logps is not None:
        per_token = common.compute_kl_divergence(
            logprobs,
            example.ref_per_token_logps,
            config.kl_loss_mode,
            clamp_value=config.kl_clamp_value,
        )
        kl = common.aggregate_loss(per_token, mask, config.loss_agg_mode)

    rows, length = mask.shape
    groups = rows // config.num_generations
    clips = echo.mine_echo_clips(
        echo.token_entropy(logits),
        echo.step_ids(example.completion_ids, mask, jnp.asarray(is_delimiter)),
        example.correct,
        jnp.repeat(jnp.arange(groups), config.num_generations),
        num_groups=groups,
        num_steps=min(config.num_steps, length),
    )
    clipped = echo.clipped_tokens(log_ratio, advantages, **clip)
    echoed = echo.echo_loss(logprobs, clips).mean()
    metrics = {
        "kl": kl,
        "pg_clipfrac": jnp.sum(clipped & (mask > 0)) / jnp.maximum(jnp.sum(mask), 1),
        "echo_loss": echoed,
        "echo_clips": jnp.sum(clips.valid),
    }
    return policy + config.beta * kl + config.echo_coef * echoed, metrics


def load_qwen2(directory):
    """-> (model, mesh): a Qwen2 directory as Tunix's model, on one device."""
    ours, _ = echo.load_model(directory, dtype="float32")
    c = ours.config
    config = qwen2.ModelConfig(
        num_layers=c.num_layers,
        vocab_size=c.vocab_size,
        embed_dim=c.hidden_size,
        hidden_dim=c.intermediate_size,
        num_heads=c.num_heads,
        head_dim=c.head_dim,
        num_kv_heads=c.num_kv_heads,
        rope_theta=c.rope.theta,
        norm_eps=c.norm_eps,
        use_tied_embedding=c.tied_embeddings,
    )
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto, devices=jax.devices()[:1])
    path = model_path(directory)
    return qwen2_params.create_model_from_safe_tensors(path, config, mesh=mesh), mesh


def countdown(tokenizer, steps, prompts_per_step):
    """Yields Tunix's batches, arrays of text: prompts, and what the grader reads as JSON."""
    rows = load_rows(f"countdown:split=train&count={steps * prompts_per_step}")
    for start in range(0, len(rows), prompts_per_step):
        batch = [rows[index] for index in range(start, start + prompts_per_step)]
        yield {
            "prompts": np.array([tokenizer.decode(encode_prompt(tokenizer, r)) for r in batch]),
            "truth": np.array([json.dumps(r["reward_model"]) for r in batch]),
        }


def solved(prompts, completions, truth, **_):
    """Tunix's form of a reward: 1.0 for each completion that our grader accepts."""
    grade = echo.load_grader("countdown")
    rows = [{"reward_model": json.loads(each)} for each in truth]
    return [grade(text, row).score for text, row in zip(completions, rows, strict=True)]


def train(steps, *, coef, prompts_per_step=8, group_size=8, learning_rate=1e-5):
    """Trains the Countdown model; returns the learner."""
    name = "builtin:countdown"
    model, mesh = load_qwen2(name)
    tokenizer = echo.load_tokenizer(name)
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=model,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(learning_rate),
                eval_every_n_steps=steps + 1,
                max_steps=steps,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=32,
                max_prompt_length=32,
                kv_cache_size=64,
                temperature=1.0,
            ),
        ),
    )
    learner = EchoLearner(
        rl_cluster=cluster,
        reward_fns=solved,
        algo_config=EchoConfig(num_generations=group_size, beta=0.0, echo_coef=coef),
        is_delimiter=echo.newline_delimiters(tokenizer, model.config.vocab_size),
    )
    with mesh:
        learner.train(list(countdown(tokenizer, steps, prompts_per_step)))
    return learner


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--coef", type=float, default=1e-3, help="lambda; 0 is plain GRPO")
    options = parser.parse_args()
    learner = train(options.steps, coef=options.coef)
    print(f"{options.steps} steps of GRPO in Tunix, lambda {options.coef:g}")
