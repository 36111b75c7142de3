"""EchoRL inside a training step of one's own: only `echorl_jax.core`, optax and a tiny model.

The model sees one token and writes the next. Ending with token 3 is success; token 0 ends a step.
"""

import jax
import jax.numpy as jnp
import optax

from echorl_jax import core
from echorl_jax.types import TrainBatch

VOCABULARY, WIDTH, PROMPTS, GROUP, LENGTH, STEPS = 8, 16, 16, 8, 12, 60
NEWLINE, GOAL, ECHO_COEF, ROWS = 0, 3, 1e-2, PROMPTS * GROUP
OBJECTIVE = core.load_objective("dr_grpo", aggregation="token-mean", entropy_coef=1e-3)
OPTIMIZER = optax.adam(0.03)


def sample(params, key):
    """Tokens [N, T + 1]; the first is the prompt."""
    prompts = jnp.repeat(jnp.arange(PROMPTS) % VOCABULARY, GROUP)

    def write(token, key):
        token = jax.random.categorical(key, params["embed"][token] @ params["head"])
        return token, token

    _, written = jax.lax.scan(write, prompts, jax.random.split(key, LENGTH))
    return jnp.concatenate([prompts[:, None], written.T], axis=1)


def read(params, tokens):
    """Log-probabilities and entropies [N, T] of what was written."""
    return core.logprobs_and_entropy(params["embed"][tokens[:, :-1]], params["head"], tokens[:, 1:])


def make_batch(params, tokens):
    """Rewards, and everything about the rows that the coming update does not change."""
    group, mask = jnp.repeat(jnp.arange(PROMPTS), GROUP), jnp.ones((ROWS, LENGTH))
    rewards = (tokens[:, -1] == GOAL).astype(jnp.float32)
    logprobs, entropy = read(params, tokens)
    steps = core.step_ids(tokens[:, 1:], mask, jnp.arange(VOCABULARY) == NEWLINE)
    grouped = dict(num_groups=PROMPTS)
    clips = core.mine_echo_clips(entropy, steps, rewards > 0, group, num_steps=LENGTH, **grouped)
    return rewards, TrainBatch(
        tokens=tokens,
        prompt_length=jnp.ones(ROWS, jnp.int32),
        length=jnp.full(ROWS, LENGTH + 1),
        loss_mask=mask,
        advantages=core.group_advantages(rewards, group, divide_by_std=False, **grouped),
        old_logprobs=logprobs,
        rollout_logprobs=logprobs,
        token_weights=core.aggregation_weights(mask, mode=OBJECTIVE.aggregation, max_tokens=LENGTH),
        echo_weights=core.clip_weights(clips, (ROWS, LENGTH)),
        on_policy=jnp.ones(ROWS, jnp.bool_),
    )


@jax.jit
def train_step(params, state, key):
    tokens = sample(params, key)
    rewards, batch = make_batch(params, tokens)

    def loss(params):
        return core.batch_loss(*read(params, tokens), batch, OBJECTIVE, echo_coef=ECHO_COEF)

    slopes, terms = jax.grad(loss, has_aux=True)(params)
    updates, state = OPTIMIZER.update(slopes, state)
    return optax.apply_updates(params, updates), state, rewards.mean(), terms["loss/echo"].mean()


if __name__ == "__main__":
    first, second, *keys = jax.random.split(jax.random.key(0), STEPS + 2)
    embed = 0.1 * jax.random.normal(first, (VOCABULARY, WIDTH))
    params = {"embed": embed, "head": 0.1 * jax.random.normal(second, (WIDTH, VOCABULARY))}
    state = OPTIMIZER.init(params)
    for step, key in enumerate(keys):
        params, state, success, echo = train_step(params, state, key)
        if step % 10 == 9:
            print(f"step {step + 1:2d}  success {success:.2f}  echo loss {echo:.2f}")
