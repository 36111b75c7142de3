"""What every kind of training shares: opening and resuming, updates, the end of a step."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from echorl_jax.config import Config, ConfigError
from echorl_jax.core import Objective, active_coef, load_objective
from echorl_jax.data import PromptStream, load_rows
from echorl_jax.errors import RunStopped
from echorl_jax.parallel import any_process, is_first, place_whole, smallest
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout.memory import device_bytes
from echorl_jax.training.checkpoints import Checkpoints, Restored
from echorl_jax.training.dumps import begin_dump, finish_dump, room_for_dump
from echorl_jax.training.evaluator import Evaluator
from echorl_jax.training.export import export_model
from echorl_jax.training.faults import Faults
from echorl_jax.training.logs import RunLog
from echorl_jax.training.metrics import CompileCounter, peak_memory_bytes
from echorl_jax.training.micro_batches import trainable_rows
from echorl_jax.training.optimizer import TrainState, init_state
from echorl_jax.training.overview import overview, title
from echorl_jax.training.preemption import StopRequest, stop_on_signal
from echorl_jax.training.programs import Job, job_held
from echorl_jax.training.session import Session, start_session
from echorl_jax.training.slots import fitting_slots
from echorl_jax.training.step import (
    Update,
    UpdateStats,
    add_stats,
    require_healthy,
    score_batch,
)
from echorl_jax.training.workdir import open_workdir, require_new, rewind
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
    faults: Faults
    reference: PyTree | None  # weights that a KL term holds on to
    first_step: int  # steps that were done when the run was opened
    slots: int  # rows decoded at once

    @property
    def objective(self) -> Objective:
        """What the run maximises."""
        return self.update.objective

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 1; those of ``log.profile_steps`` are traced."""
        config = self.session.config
        for step in range(self.first_step + 1, config.steps + 1):
            if step in config.log.profile_steps:
                with jax.profiler.trace(str(self.directory / "profile" / f"step_{step}")):
                    yield step
            else:
                yield step

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
        batches = [self.faults.spoil(batches[0], step), *batches[1:]]
        ready = [self._ready(state.params, batch, echo_active=coef != 0) for batch in batches]
        done: list[UpdateStats] = []
        for epoch in range(config.objective.epochs):
            for number, (batch, rows) in enumerate(ready):
                state, stats = self._apply(state, batch, rows, coef, step=step, number=len(done))
                done.append(stats)
                first = epoch == 0 and number == 0
                self._require_healthy(state, done[-1], step, check_gap=first)
        self.faults.reach("update", step)
        done_steps = place_whole(np.int32(step), self.session.mesh)
        state = dataclasses.replace(state, step=done_steps)
        return state, add_stats(done), np.concatenate([rows for _, rows in ready])

    def _apply(
        self,
        state: TrainState,
        batch: TrainBatch,
        rows: np.ndarray,
        coef: float,
        *,
        step: int,
        number: int,
    ) -> tuple[TrainState, UpdateStats]:
        """One update; dumped if asked for or not finite, when the parameters stay as they were."""
        debug = self.session.config.debug

        def pieces() -> Iterator[TrainBatch]:
            return (micro for _, micro in self.session.micro_batches(batch, rows))

        dump = None
        if number == 0 and step == debug.dump_step:
            dump = begin_dump(self.directory, step, number, state.params)
        state, stats = self.update(state, pieces(), echo_coef=coef)
        done: UpdateStats = jax.device_get(stats)
        if dump is None and not done.finite and room_for_dump(self.directory, debug.max_dumps):
            dump = begin_dump(self.directory, step, number, state.params)
        if dump is not None:
            path = finish_dump(dump, self.session, pieces(), done, echo_coef=coef)
            self.log.say(f"step {step}: update written to {path} for `echorl replay`")
        return state, done

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
            "data/prompts_too_long": self.stream.too_long,
            "optim/learning_rate": np.asarray(self.update.schedule(step - 1)).item(),
            "memory/peak_bytes": peak_memory_bytes(),
            "compile/count": self.compiles.count,
        }
        if self.evaluator.due(step):
            metrics |= self.evaluate(step, state.params)
        self.log.write(metrics)
        self.checkpoints.raise_errors()
        if config.optim.compile_ahead and self.compiles.surprised():
            self.log.say(
                f"warning: step {step}: a program was compiled after the warm-up; compile/count "
                "counts them (log.profile_steps shows which)"
            )
        every, stop = config.checkpoint.every, any_process(self.stop.requested)
        if stop or step == config.steps or (every and step % every == 0):
            self.checkpoints.save(
                step,
                state,
                data_position=self.stream.get_state(),
                metrics_lines=self.log.secure(),
                score=self._score(metrics),
            )
        if stop:
            self.log.say(f"stopped after step {step}; the same command goes on from there")
        return not stop

    def evaluate(self, step: int, params: PyTree) -> dict[str, float]:
        """The scores; of an evaluation that fails only ``eval/failed``, and training goes on.

        Among several processes a failure ends the run: the others may wait for this one.
        """
        try:
            if self.faults.hits("eval_fail", step):
                raise RuntimeError("injected")
            with self.compiles.expected():
                return {**self.evaluator.scores(params), "eval/failed": 0.0}
        except Exception as error:  # graders and benchmarks are the user's
            if jax.process_count() > 1:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.log.say(f"warning: step {step}: the evaluation failed ({reason})")
            return {"eval/failed": 1.0}

    def _score(self, metrics: dict[str, float]) -> float | None:
        """By which checkpoints are compared."""
        if not self.evaluator.rows:
            return metrics.get("reward/mean")
        found = [v for k, v in metrics.items() if k.startswith("eval/") and k.endswith("/pass@1")]
        return float(np.mean(found)) if found else None

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
      RunStopped: a file cannot be written, such as on a full disk.
    """
    faults = Faults.parse(config.debug.inject, Path(workdir))
    if config.checkpoint.resume == "none":
        require_new(workdir)
    directory = open_workdir(workdir, config)
    compiles = CompileCounter()
    session, params = start_session(config, devices=devices)
    rows = load_rows(config.data.train, on_bad_row=config.data.on_bad_row)
    stream = PromptStream(
        rows,
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
    checkpoints = Checkpoints.open(directory, config, faults)
    state = init_state(params, session.optimizer, session.mesh)
    restored = checkpoints.restore(state, _warn)
    if restored is not None:
        state = restored.state
        stream.set_state(restored.data_position)
    first = int(state.step)
    _rewind(directory, restored)
    grader = GraderPool(
        config.data.grader,
        workers=config.data.grader_workers,
        timeout_s=config.data.grader_timeout_s,
        faults=faults.rewards,
    )
    log = RunLog(
        directory,
        first_step=first,
        total_steps=config.steps,
        tensorboard=config.log.tensorboard,
        wandb_project=config.log.wandb_project,
    )
    job = _job(session, objective)
    with _file_errors(directory, checkpoints), grader, log, stop_on_signal() as stop:
        evaluator = Evaluator.load(session, grader)
        log.present(
            title(job, state.params),
            overview(
                job,
                rows_per_step=rows_per_step(config, objective),
                first_step=first,
                device_bytes=device_bytes(),
            ),
        )
        if rows.bad:
            log.say(f"data.train: {len(rows.bad)} bad rows left out, the first: {rows.bad[0]}")
        run = Run(
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
            faults,
            reference,
            first,
            job.slots,
        )
        if restored is None and evaluator.due(0):
            log.write({"step": 0, **run.evaluate(0, state.params)})
        yield run, state


def _job(session: Session, objective: Objective) -> Job:
    """The run as a plan sees it, with slots that fit on every process's devices."""
    config, mesh = session.config, session.mesh
    job = Job(config, session.model, objective, mesh, slots=session.data_devices)
    if objective.supervised:
        return job
    slots = fitting_slots(
        config, session.model, objective, mesh, job_held(job), device_bytes=device_bytes()
    )
    return dataclasses.replace(job, slots=smallest(slots))


def rows_per_step(config: Config, objective: Objective) -> int:
    """Rows that a step learns from, at most."""
    if objective.supervised:
        return config.optim.sft_rows_per_step
    rounds = config.objective.max_rounds if objective.dynamic_sampling else 1
    return config.rollout.prompts_per_step * config.rollout.group_size * rounds


@contextmanager
def _file_errors(directory: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Turns a file that cannot be written into one line; a checkpoint on its way is finished."""
    try:
        yield
    except (RunStopped, OSError) as error:
        with suppress(RunStopped):  # the first error is the one to tell
            checkpoints.close()
        if isinstance(error, RunStopped):
            raise
        raise RunStopped(
            f"{error.filename or directory}: {error.strerror or error}; the last checkpoint stays"
        ) from error


def _rewind(directory: Path, restored: Restored | None) -> None:
    """Forgets what came after the checkpoint; tells if what came before is not all there."""
    lines = rewind(directory, -1 if restored is None else int(restored.state.step))
    if restored is not None and is_first() and lines < restored.metrics_lines:
        _warn(
            f"warning: {directory / 'metrics.jsonl'} has {lines} of the {restored.metrics_lines} "
            "lines that were there at the checkpoint"
        )


def _warn(line: str) -> None:
    print(f"echorl: {line}", file=sys.stderr)


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
