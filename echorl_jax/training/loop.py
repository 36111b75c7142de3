"""The algorithm on one page.

Each step samples G completions for each of P prompts and grades them. Rewards become advantages:
each against the others of its group, 0 where all are equal. From every solved prompt comes an
EchoClip: the prefix of one of its successes that ends at the reasoning step of highest entropy. The
loss is the policy loss by the advantages, plus lambda times the negative log-likelihood of the
clips. Left out of the textbook algorithm, because it changes nothing: rows without an advantage or
a clip are not computed, and the old policy's log-probabilities are those of the sampler.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from echorl_jax.config import Config
from echorl_jax.remote import Mirror
from echorl_jax.training.batch import join_assembled, make_batches
from echorl_jax.training.experience import collect
from echorl_jax.training.logs import timed
from echorl_jax.training.metrics import (
    custom_metrics,
    record_samples,
    step_metrics,
    throughput_metrics,
)
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.run import open_run
from echorl_jax.training.setup import metric_paths
from echorl_jax.training.update import token_entropies, update, update_metrics
from echorl_jax.training.warmup import warm_up


def train(
    config: Config,
    workdir: str | Path,
    *,
    devices: Sequence[Any] | None = None,
    mirror: Mirror | None = None,
) -> TrainState:
    """Trains for ``config.steps`` steps, from the newest checkpoint in ``workdir`` if there is one.

    Args:
      devices: those to use; all unless given.
      mirror: uploads ``workdir`` after each checkpoint; see :func:`echorl_jax.remote.mirrored`.

    Returns:
      The final state.

    Raises:
      UserError: config, data, model or workdir that cannot be used.
      RunStopped: sampler and trainer disagree, or gradients stay non-finite.
    """
    prompts = config.rollout.prompts_per_step
    with open_run(config, workdir, prompts_per_step=prompts, devices=devices, mirror=mirror) as (
        run,
        state,
    ):
        setup = run.setup
        if config.optim.compile_ahead and not run.stopping():
            with run.compiling() as later:
                warm_up(
                    setup,
                    state.params,
                    run.stream.peek(),
                    engine=run.engine,
                    frozen=run.frozen,
                    reference=run.reference,
                    say=run.log.say,
                    later=later,
                )
        for step in run.steps():
            sample_key, clip_key = jax.random.split(run.key(step))

            # Completions and their rewards.
            policy = run.policy(state)
            experience = collect(
                setup,
                policy,
                sample_key,
                step=step,
                stream=run.stream,
                engine=run.engine,
                grader=run.grader,
                warn=run.log.say,
                reached=run.faults.reach,
            )
            seconds = experience.seconds
            with timed(seconds, "update"):
                if not run.engine.entropies:
                    entropies = token_entropies(setup, policy, experience.rollouts)
                    experience = experience.with_entropies(entropies)

                del policy  # the state's buffers are given to the update

                # Advantages, clips and the final weights of every token, by mini-batches.
                parts, echo_coef = make_batches(
                    setup,
                    experience,
                    clip_key,
                    step=step,
                    min_entropy=run.history.min_entropy,
                    past_rates=run.history.past_rates,
                )
                batches = run.faults.spoil([part.batch for part in parts], step)

                # Gradients of policy loss and echo loss in one backward pass; optimizer steps.
                state, updates, used = update(
                    setup,
                    state,
                    batches,
                    # Different from the keys of samples and clips.
                    jax.random.fold_in(run.key(step), 2),
                    step=step,
                    echo_coef=echo_coef,
                    frozen=run.frozen,
                    reference=run.reference,
                    images=experience.images(len(parts)),
                    dumps=run.dumps,
                )
            run.faults.reach("update", step)
            state = run.health.check(step, state, updates, experience.rollouts)

            batch = join_assembled(parts)
            record_samples(run.directory, step, experience, batch, setup=setup)
            metrics = {
                **step_metrics(experience, batch, hints=setup.objective.hints, echo_coef=echo_coef),
                **run.history.update(experience, batch),
                **update_metrics(updates),
                **throughput_metrics(setup, experience, used),
                **custom_metrics(metric_paths(config), experience, batch),
            }
            if not run.end_step(step, state, metrics):
                break
        run.finish(state)
    return state
