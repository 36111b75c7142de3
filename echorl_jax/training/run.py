"""What every kind of training shares: opening and resuming, updates, the end of a step."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax.config import Config, ConfigError
from echorl_jax.core import Objective, active_coef, load_objective
from echorl_jax.data import PromptStream, load_rows
from echorl_jax.rewards import GraderPool
from echorl_jax.training.checkpoints import Checkpoints
from echorl_jax.training.evaluator import Evaluator
from echorl_jax.training.export import export_model
from echorl_jax.training.logs import RunLog
from echorl_jax.training.metrics import CompileCounter, peak_memory_bytes
from echorl_jax.training.micro_batches import trainable_rows
from echorl_jax.training.optimizer import TrainState, init_state
from echorl_jax.training.preemption import StopRequest, stop_on_signal
from echorl_jax.training.session import Session, start_session
from echorl_jax.training.step import (
    Update,
    UpdateStats,
    add_stats,
    require_healthy,
    score_batch,
)
from echorl_jax.training.workdir import open_workdir, rewind
from echorl_jax.types import Array, PyTree, TrainBatch

# Largest accepted gap between sampler and trainer log-probabilities, by compute type (nats).
LOGPROB_GAP = {"float32": 1e-2, "bfloat16": 0.5}


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run; the training state passes through its methods and is not part of it."""

    directory: Path
    session: Session
    update: Update
    stream: PromptStream
    checkpoints: Checkpoints
    grader: GraderPool
    log: RunLog
    evaluator: Evaluator
    compiles: CompileCounter
    stop: StopRequest
    reference: PyTree | None  # weights that a KL term holds on to
    first_step: int  # steps that were done when the run was opened

    @property
    def objective(self) -> Objective:
        """What the run maximises."""
        return self.update.objective

    def steps(self) -> range:
        """The steps that are left, counted from 1."""
        return range(self.first_step + 1, self.session.config.steps + 1)

    def key(self, step: int) -> Array:
        """The PRNG key of a step."""
        return jax.random.fold_in(jax.random.key(self.session.config.seed), step)

    def improve(
        self, state: TrainState, batches: Sequence[TrainBatch], step: int
    ) -> tuple[TrainState, UpdateStats, np.ndarray]:
        """One update for each batch (NumPy), ``objective.epochs`` times over; donates ``state``.

        Returns:
          The new state, what was done (NumPy, added up over updates), and which rows had a
          gradient, bool ``[N]`` over all batches.

        Raises:
          RunStopped: the run cannot be trusted any more.
        """
        config = self.session.config
        window = {"start_step": config.echo.start_step, "end_step": config.echo.end_step}
        coef = float(active_coef(step - 1, config.echo.coef, **window)) * config.echo.enabled
        ready = [self._ready(state.params, batch, echo_active=coef != 0) for batch in batches]
        done: list[UpdateStats] = []
        for epoch in range(config.objective.epochs):
            for number, (batch, rows) in enumerate(ready):
                pieces = (micro for _, micro in self.session.micro_batches(batch, rows))
                state, stats = self.update(state, pieces, echo_coef=coef)
                done.append(jax.device_get(stats))
                first = epoch == 0 and number == 0
                self._require_healthy(state, done[-1], step, check_gap=first)
        state = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))
        return state, add_stats(done), np.concatenate([rows for _, rows in ready])

    def _ready(
        self, params: PyTree, batch: TrainBatch, *, echo_active: bool
    ) -> tuple[TrainBatch, np.ndarray]:
        """Leaves out rows without a gradient and fills in what other forward passes compute."""
        objective = self.objective
        if not echo_active:
            batch = dataclasses.replace(batch, echo_weights=np.zeros_like(batch.echo_weights))
        every_row = (
            objective.kl_coef != 0
            or objective.entropy_coef != 0
            or not objective.zero_without_advantage
        )
        batch, rows = trainable_rows(batch, every_row=every_row)

        def score(weights: PyTree) -> np.ndarray:
            return score_batch(
                self.session.model,
                weights,
                self.session.micro_batches(batch, rows),
                shape=batch.loss_mask.shape,
                temperature=self.update.temperature,
                mesh=self.session.mesh,
            )

        if self.session.config.objective.old_logprobs == "trainer" and not objective.supervised:
            batch = dataclasses.replace(batch, old_logprobs=score(params))
        if self.reference is not None:
            batch = dataclasses.replace(batch, ref_logprobs=score(self.reference))
        return batch, rows

    def _require_healthy(
        self, state: TrainState, done: UpdateStats, step: int, *, check_gap: bool
    ) -> None:
        config = self.session.config
        every = config.rollout.check_every
        check_gap &= bool(every) and (step - 1) % max(every, 1) == 0
        check_gap &= not self.objective.supervised
        bound = config.rollout.max_logprob_gap or LOGPROB_GAP[config.model.dtype]
        require_healthy(
            state,
            done,
            step=step,
            max_gap=bound if check_gap else float("inf"),
            max_bad_updates=config.optim.max_bad_updates,
        )

    def end_step(self, step: int, state: TrainState, metrics: dict[str, float]) -> bool:
        """Evaluates when due, writes the metrics, then saves: what is saved is always logged.

        Returns:
          Whether to go on; False once a signal has asked to stop, with everything saved.
        """
        config = self.session.config
        metrics = {
            "step": step,
            **metrics,
            "optim/learning_rate": np.asarray(self.update.schedule(step - 1)).item(),
            "memory/peak_bytes": peak_memory_bytes(),
            "compile/count": self.compiles.count,
        }
        if self.evaluator.due(step):
            metrics |= self.evaluator.scores(state.params)
        self.log.write(metrics)
        every, stop = config.checkpoint.every, self.stop.requested
        if stop or step == config.steps or (every and step % every == 0):
            self.checkpoints.save(step, state, self.stream.get_state())
        if stop:
            self.log.say(f"stopped after step {step}; the same command goes on from there")
        return not stop

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint; after the last step writes ``export/``."""
        self.checkpoints.close()
        config = self.session.config
        if config.checkpoint.export and int(state.step) == config.steps:
            export_model(self.directory, self.session, state.params)


@contextmanager
def open_run(
    config: Config,
    workdir: str | Path,
    *,
    prompts_per_step: int,
    devices: Sequence[Any] | None = None,
) -> Iterator[tuple[Run, TrainState]]:
    """Opens a workdir, builds what a run needs and restores the newest checkpoint, if there is one.

    A new run is evaluated before its first step.

    Raises:
      UserError: config, data, model or workdir that cannot be used.
    """
    directory = open_workdir(workdir, config)
    compiles = CompileCounter()
    session, params = start_session(config, devices=devices)
    stream = PromptStream(
        load_rows(config.data.train, on_bad_row=config.data.on_bad_row),
        session.tokenizer,
        prompts_per_step=prompts_per_step,
        max_prompt_tokens=config.data.max_prompt_tokens,
        template=config.data.template,
        seed=config.seed,
    )
    objective = configured_objective(config)
    update = Update(
        session.model,
        objective,
        session.optimizer,
        session.schedule,
        session.mesh,
        config.rollout.temperature,
    )
    # A copy: the state's own buffers are given away at the first update.
    reference = jax.jit(session.model.cast)(params) if objective.kl_coef else None
    checkpoints = Checkpoints.open(directory, keep=config.checkpoint.keep)
    state = init_state(params, session.optimizer)
    if (newest := checkpoints.latest()) is not None:
        state, position = checkpoints.restore(newest, state)
        stream.set_state(position)
    first = int(state.step)
    rewind(directory, first)
    grader = GraderPool(
        config.data.grader,
        workers=config.data.grader_workers,
        timeout_s=config.data.grader_timeout_s,
    )
    log = RunLog(
        directory, first_step=first, total_steps=config.steps, tensorboard=config.log.tensorboard
    )
    with grader, log, stop_on_signal() as stop:
        evaluator = Evaluator.load(session, grader)
        log.say(session.summary(state.params, first_step=first))
        if first == 0 and evaluator.due(0):
            log.write({"step": 0, **evaluator.scores(state.params)})
        yield (
            Run(
                directory,
                session,
                update,
                stream,
                checkpoints,
                grader,
                log,
                evaluator,
                compiles,
                stop,
                reference,
                first,
            ),
            state,
        )


def configured_objective(config: Config) -> Objective:
    """The objective that ``config.objective`` names, with the settings it changes."""
    settings = {
        name: value
        for name, value in vars(config.objective).items()
        if name in {field.name for field in dataclasses.fields(Objective)}
    }
    try:
        return load_objective(config.objective.name, **settings)
    except ValueError as error:
        raise ConfigError(f"config.objective.name: {error}") from error
