"""A program that needs Tunix: examples/tunix_plugin.py against Tunix's own loss. Prints JSON."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import algo_core

sys.path.insert(0, "examples")
import tunix_plugin as plugin  # noqa: E402

PAD, EOS, ROWS, LENGTH = 1, 0, 8, 12
DELIMITER = np.arange(512) < 60  # some tokens, as good as newlines


def example(model, config, *, correct):
    """Two groups of four rows with random tokens, and old log-probabilities beside the model's."""
    rng = np.random.default_rng(0)
    length = rng.integers(4, LENGTH + 1, ROWS)
    mask = np.arange(LENGTH)[None, :] < length[:, None]
    ids = np.where(mask, rng.integers(2, 512, (ROWS, LENGTH)), PAD)
    prompts = jnp.asarray(rng.integers(2, 512, (ROWS, 6)))
    batch = plugin.EchoExample(
        prompt_ids=prompts,
        prompt_mask=jnp.ones((ROWS, 6), bool),
        completion_ids=jnp.asarray(ids),
        completion_mask=jnp.asarray(mask),
        advantages=jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=None,
        correct=jnp.asarray(correct),
    )
    logprobs, logits = scored(model, batch)
    near = logprobs + jnp.asarray(rng.normal(scale=0.3, size=logprobs.shape), jnp.float32)
    return dataclasses.replace(batch, old_per_token_logps=near, ref_per_token_logps=near), logits


def scored(model, batch):
    return plugin.common.compute_per_token_logps(
        *nnx.split(model), batch.prompt_ids, batch.completion_ids, PAD, EOS, return_logits=True
    )


def apart(a, b):
    """The norm of the difference of two gradients, as a share of the second's norm."""
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def against_tunix(model, config):
    """Loss and gradient without an echo, and Tunix's own."""
    plain = dataclasses.replace(config, echo_coef=0.0)
    plain.temperature = 1.0
    batch, _ = example(model, plain, correct=np.zeros(ROWS, bool))
    ids = {"pad_id": PAD, "eos_id": EOS}
    ours = nnx.value_and_grad(
        lambda model: plugin.echo_grpo_loss(model, batch, plain, DELIMITER, **ids), has_aux=True
    )(model)
    theirs = nnx.value_and_grad(
        lambda model: algo_core.grpo_loss_fn(model, batch, plain, **ids), has_aux=True
    )(model)
    (loss, metrics), gradient = ours
    (expected, told), expected_gradient = theirs
    return {
        "loss": [float(loss), float(expected)],
        "kl": [float(metrics["kl"]), float(told["kl_loss"])],
        "clipped": [float(metrics["pg_clipfrac"]), float(told["pg_clipfrac"])],
        "gradients_apart": apart(gradient, expected_gradient),
    }


def solved_group(model, config):
    """The loss where all rows of the first group are right: its clip, found with plain loops."""
    correct = np.arange(ROWS) < 4
    batch, logits = example(model, config, correct=correct)
    batch = dataclasses.replace(
        batch,
        advantages=jnp.zeros(ROWS),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
    entropy = np.asarray(algo_core.compute_entropy_from_logits(logits))
    best = (-1.0, 0, 0)
    for row in range(4):
        ids = np.asarray(batch.completion_ids[row])[np.asarray(batch.completion_mask[row])]
        start, content = 0, False
        for place, token in enumerate(ids):
            content |= not DELIMITER[token]
            last = place + 1 == len(ids)
            # A step ends at a delimiter before content, or at the end; leading ones join it.
            if last or (content and DELIMITER[token] and not DELIMITER[ids[place + 1]]):
                mean = entropy[row, start : place + 1].mean()
                best = max(best, (mean, row, place + 1))
                start = place + 1
    _, row, length = best
    logprobs = np.asarray(scored(model, batch)[0])
    loss, metrics = plugin.echo_grpo_loss(model, batch, config, DELIMITER, pad_id=PAD, eos_id=EOS)
    expected = -logprobs[row, :length].mean()
    return {
        "loss": [float(loss), config.echo_coef * float(expected)],
        "echo": [float(metrics["echo_loss"]), float(expected)],
        "clips": float(metrics["echo_clips"]),
    }


def weights(coef):
    """All weights after two steps of training in Tunix, as one vector."""
    actor = plugin.train(2, coef=coef, learning_rate=1e-4).rl_cluster.actor_trainer.model
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(actor))])


if __name__ == "__main__":
    model, _ = plugin.load_qwen2("builtin:countdown")
    config = plugin.EchoConfig(num_generations=4, beta=0.1, echo_coef=0.5)
    config.temperature = 1.0  # Tunix's learner sets it
    before = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(model))])
    plain, echoed = weights(0.0), weights(0.1)
    found = {
        "plain": against_tunix(model, config),
        "solved": solved_group(model, config),
        "moved": float(np.linalg.norm(plain - before)),
        "moved_by_echo": float(np.linalg.norm(echoed - plain)),
        "finite": bool(np.isfinite(echoed).all()),
    }
    print(json.dumps(found))
