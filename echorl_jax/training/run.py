"""A run: opened new or where it stopped, its steps, and the end of each step."""

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from echorl_jax.cluster.supervisor import StopRequest, stop_on_signal
from echorl_jax.config import LARGEST, Config, ConfigError
from echorl_jax.core import Objective
from echorl_jax.data import PromptStream, Rows, Template, load_rows, require_embedded_rows
from echorl_jax.environment import Engine, make_engine
from echorl_jax.errors import RunStopped, UserError, writing
from echorl_jax.models import base_params, claim_repository, merge, push, split_params
from echorl_jax.parallel import any_process, from_first, is_first, smallest
from echorl_jax.remote import Mirror
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import Progress
from echorl_jax.rollout.memory import device_bytes
from echorl_jax.training.capacity import overview, title, with_slots
from echorl_jax.training.checkpoints import Checkpoints, Restored
from echorl_jax.training.diagnose import Dumps
from echorl_jax.training.evaluator import Evaluator, attempt
from echorl_jax.training.faults import Faults
from echorl_jax.training.health import Health
from echorl_jax.training.history import History
from echorl_jax.training.inputs import compare_inputs, read_inputs, weights_digest
from echorl_jax.training.logs import RunLog
from echorl_jax.training.optimizer import TrainState, init_state
from echorl_jax.training.setup import Setup, configured_objective, make_setup
from echorl_jax.training.trackers import Sender, require_trackers, trackers
from echorl_jax.training.warmup import CompileJob, Compiles, keep_compiled
from echorl_jax.training.workdir import ASIDE, COURSE, last_step, open_workdir, require_new, rewind
from echorl_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run; the training state passes through its methods and is not part of it."""

    directory: Path
    setup: Setup
    stream: PromptStream
    history: History
    checkpoints: Checkpoints
    grader: GraderPool
    log: RunLog
    evaluator: Evaluator
    engine: Engine
    health: Health
    dumps: Dumps
    compiles: Compiles
    stop: StopRequest
    faults: Faults
    frozen: PyTree  # parameters beside those of the state; None trains all
    reference: PyTree | None  # weights of a KL term
    first_step: int  # steps that were done when the run was opened
    inputs: Mapping[str, str]  # digests of rows, prompts and weights, and the first start
    mirror: Mirror  # uploads the directory, if the run's place is remote

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 1; those of ``log.profile_steps`` are traced."""
        config = self.setup.config
        if self.stopping():
            self.log.say("stopped by a signal before the first step of this process")
            return
        for step in range(self.first_step + 1, config.steps + 1):
            if step in config.log.profile_steps:
                directory = self.directory / "profile" / f"step_{step}"
                with jax.profiler.trace(str(directory), profiler_options=_profile_options()):
                    yield step
            else:
                yield step

    @contextmanager
    def compiling(self) -> Iterator[Callable[[CompileJob], None] | None]:
        """Tells how many programs were compiled inside, and how long it took.

        Yields:
          A function that takes compilations for later; None where all must be done here.
        """
        start = time.monotonic()
        # Several processes compile their programs in the same order.
        behind = self.setup.config.optim.compile_in_background and jax.process_count() == 1
        yield self.compiles.later if behind else None
        seconds = time.monotonic() - start
        said = f"compiled {self.compiles.count} programs in {seconds:.0f} s"
        left = self.compiles.left
        self.log.say(f"{said}; {left} more while the first steps run" if left else said)

    def key(self, step: int) -> Array:
        """The PRNG key of a step."""
        return jax.random.fold_in(jax.random.key(self.setup.config.seed), step)

    def end_step(self, step: int, state: TrainState, metrics: dict[str, float]) -> bool:
        """Writes the metrics, saves when due, then evaluates when due.

        What is saved is always logged. A kill or a signal during the evaluation costs only the
        evaluation, which the next process makes up for (:meth:`evaluate_again`).

        Returns:
          Whether to go on; False once a signal has asked to stop, with everything saved.
        """
        config = self.setup.config
        self.log.write(
            {
                "step": step,
                **metrics,
                "data/prompts_too_long": self.stream.too_long,
                "optim/learning_rate": np.asarray(self.setup.schedule(step - 1)).item(),
                "memory/peak_bytes": peak_memory_bytes(),
                "compile/count": self.compiles.count,
            }
        )
        self.checkpoints.raise_errors()
        self.mirror.raise_errors()
        if config.optim.compile_ahead and self.compiles.surprised():
            self.log.say(
                f"warning: step {step}: a program was compiled after the warm-up; compile/count "
                "counts them (log.profile_steps shows which)"
            )
        every = config.checkpoint.every
        if step == config.steps or (every and step % every == 0):
            self._save(step, state)
        if self.evaluator.due(step) and (scores := self.evaluate(step, self.policy(state))):
            self.log.amend(scores)
        exports = config.checkpoint.export_every
        if exports and step % exports == 0 and step < config.steps:
            self._export(step, state)
        if self.stopping():
            self._save(step, state)
            self.log.say(f"stopped after step {step}; the same command goes on from there")
            return False
        if self.history.retired_fraction == 1 and step < config.steps:
            self._save(step, state)
            raise RunStopped(
                f"step {step}: every prompt has reached data.retire_above = "
                f"{config.data.retire_above}, and none is left to train on; `echorl convert` "
                "exports the checkpoint of this step"
            )
        return True

    def _save(self, step: int, state: TrainState) -> None:
        self.mirror.wait()  # the next save deletes checkpoints
        self.checkpoints.save(
            step,
            state,
            data_position=self.stream.get_state(),
            metrics_lines=self.log.secure(),
            inputs=self.inputs,
            history=self.history.get_state(),
        )
        self.mirror.start_upload(self.checkpoints.manager.is_saving_in_progress)

    def policy(self, state: TrainState) -> PyTree:
        """All parameters of the policy in training."""
        return merge(self.frozen, state.params)

    def stopping(self) -> bool:
        """True if a signal has asked any process to stop; the same answer on all."""
        return any_process(self.stop.requested)

    def evaluate_first(self, params: PyTree) -> None:
        """Evaluates a new run before its first step, if that is due and no signal ends it."""
        if self.evaluator.due(0) and (scores := self.evaluate(0, params)):
            self.log.write({"step": 0, **scores})

    def evaluate_again(self, step: int, params: PyTree) -> None:
        """Evaluates after a resume at a step whose evaluation a kill or a signal had ended."""
        owed = self.evaluator.due(step) and from_first(int(self.log.lacks("eval/failed")))
        if owed and (scores := self.evaluate(step, params)):
            self.log.amend(scores)

    def evaluate(self, step: int, params: PyTree) -> dict[str, float] | None:
        """The scores; only ``eval/failed`` if the evaluation fails, and training goes on.

        Returns:
          The metrics; None if a signal has asked to stop, which ends the evaluation at once.
        """
        if self.stopping():
            return None

        def look(_: Progress) -> None:
            self.faults.reach("evaluation", step)
            if self.stopping():
                raise RunStopped("a signal has ended the evaluation")

        grader = self.faults.grader(self.grader, step)
        evaluator = dataclasses.replace(self.evaluator, grader=grader)
        with self.compiles.expected():
            scores, failure = attempt(
                lambda: evaluator.scores(params, look),
                name=f"evaluation {step}",
                within_s=self.setup.config.mesh.start_timeout_s,
            )
        if scores is None and self.stopping():
            self.log.say("the evaluation is left to the next start")
            return None
        if scores is None:
            self.log.say(f"warning: step {step}: the evaluation failed ({failure})")
            return {"eval/failed": 1.0}
        return {**scores, "eval/failed": 0.0}

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint and writes ``export/``, also after a stop by a signal.

        Raises:
          RunStopped: the export could not be pushed.
        """
        self.checkpoints.close()
        step = int(state.step)
        if self.setup.config.checkpoint.export and step > 0:
            self._export(step, state)

    def _export(self, step: int, state: TrainState) -> None:
        """Writes ``export/`` and pushes it, unless a signal wants the run to end.

        Before the last step a failed push costs a warning alone.
        """
        from echorl_jax.training.convert import export_model

        exported = export_model(self.directory, self.setup, self.policy(state), step)
        config = self.setup.config
        last, repository = step == config.steps, config.checkpoint.push
        if not repository or not is_first() or (self.stop.requested and not last):
            return
        try:
            self.log.say(f"pushed {push(exported, repository, message=f'step {step}')}")
        except UserError as error:
            if last:
                raise RunStopped(f"{error}; `echorl convert --push` tries again") from error
            self.log.say(f"warning: step {step}: {error}")


def with_steps(config: Config, prompts_per_step: int) -> Config:
    """The config with the steps that ``config.epochs`` makes of the rows; as it is for 0 epochs.

    Raises:
      ConfigError: they are more steps than a run may have.
    """
    if not config.epochs:
        return config
    rows = len(load_rows(config.data.train, on_bad_row=config.data.on_bad_row))
    steps = math.ceil(round(config.epochs * rows / prompts_per_step, 6))
    if steps > LARGEST:
        raise ConfigError(f"config.epochs = {config.epochs}: {steps} steps, at most {LARGEST}")
    return dataclasses.replace(config, steps=steps)


@contextmanager
def open_run(
    config: Config,
    workdir: str | Path,
    *,
    prompts_per_step: int,
    supervised: bool = False,
    devices: Sequence[Any] | None = None,
    mirror: Mirror | None = None,
) -> Iterator[tuple[Run, TrainState]]:
    """Opens a workdir, builds what a run needs and restores the newest checkpoint, if there is one.

    A new run is evaluated before its first step.

    Raises:
      UserError: config, data, model or workdir that cannot be used, or is in use by another run.
      RunStopped: a file cannot be written, such as on a full disk.
    """
    config = with_steps(config, prompts_per_step)
    require_trackers(config)
    faults = Faults.parse(config.debug.inject, Path(workdir))
    if config.checkpoint.resume == "none":
        require_new(workdir)
    objective = configured_objective(config)
    if objective.supervised != supervised:
        command = "echorl sft" if objective.supervised else "echorl train"
        raise ConfigError(f"config.objective.name = {config.objective.name!r}: use `{command}`")
    with (
        open_workdir(workdir, config) as (directory, config_before),
        writing(directory),
        keep_compiled(directory, config.checkpoint.compiled),
        closing(Compiles()) as compiles,
        trackers(directory, config) as senders,
    ):
        if config.checkpoint.push and is_first():
            claim_repository(config.checkpoint.push)
        setup, params = make_setup(config, devices=devices)
        rows = _training_rows(setup)
        frozen, trainable = split_params(setup.model, params)
        reference = _reference(setup, params)
        checkpoints = Checkpoints.open(directory, config, faults)
        state = init_state(trainable, setup.optimizer, setup.mesh)
        weights = weights_digest(config, trainable if frozen is None else frozen)
        del params, trainable
        restored = checkpoints.restore(state, _warn)
        before = {} if restored is None else restored.inputs
        inputs = read_inputs(setup, rows, weights, before)
        in_use = frozen is not None or reference is not None
        compare_inputs(inputs, before, config, weights_in_use=in_use, warn=_warn)
        history = _history(setup, len(rows))
        stream = _prompt_stream(setup, rows, prompts_per_step, history)
        if restored is not None:
            state = restored.state
            stream.set_state(restored.data_position)
            history.set_state(restored.history)
            _warn_of_other_course(config, objective, config_before)
        _rewind(directory, restored)
        setup = _with_slots(setup)
        grader = GraderPool.of(config, faults=faults.rewards)
        log = _log(directory, config, int(state.step), senders)
        with (
            _file_errors(directory, checkpoints),
            grader,
            log,
            stop_on_signal() as stop,
            closing(_engine(setup)) as engine,
        ):
            run = Run(
                directory=directory,
                setup=setup,
                stream=stream,
                history=history,
                engine=engine,
                checkpoints=checkpoints,
                grader=grader,
                log=log,
                evaluator=Evaluator.load(setup, engine, grader),
                health=Health(setup, int(state.bad_updates), log.say),
                dumps=Dumps(directory, setup, log.say, weights),
                compiles=compiles,
                stop=stop,
                faults=faults,
                frozen=frozen,
                reference=reference,
                first_step=int(state.step),
                inputs=inputs,
                mirror=mirror or Mirror(str(directory), directory),
            )
            _present(run, state)
            if rows.bad:
                log.say(f"data.train: {len(rows.bad)} bad rows left out, the first: {rows.bad[0]}")
            if restored is None:
                run.evaluate_first(run.policy(state))
            else:
                run.evaluate_again(run.first_step, run.policy(state))
            yield run, state


def _training_rows(setup: Setup) -> Rows:
    data, objective = setup.config.data, setup.objective
    rows = load_rows(data.train, on_bad_row=data.on_bad_row)
    require_embedded_rows(
        setup.tokenizer,
        rows,
        template=Template.of(data),
        vocab_size=setup.model.config.vocab_size,
        experts=objective.supervised or objective.hints or objective.expert_rows > 0,
        source="data.train",
        processor=setup.processor,
    )
    return rows


def _history(setup: Setup, rows: int) -> History:
    config = setup.config
    return History(
        rows,
        retire_above=config.data.retire_above,
        threshold=config.echo.threshold,
        min_step_tokens=config.echo.min_step_tokens,
        rate_steps=setup.objective.rate_steps,
        groups=setup.max_rows // config.rollout.group_size,
    )


def _prompt_stream(
    setup: Setup, rows: Rows, prompts_per_step: int, history: History
) -> PromptStream:
    return PromptStream(
        rows,
        setup.tokenizer,
        prompts_per_step=prompts_per_step,
        max_prompt_tokens=setup.config.data.max_prompt_tokens,
        template=Template.of(setup.config.data),
        processor=setup.processor,
        on_bad_row=setup.config.data.on_bad_row,
        seed=setup.config.seed,
        retired=history.retired,
    )


def _log(directory: Path, config: Config, first_step: int, senders: Sequence[Sender]) -> RunLog:
    return RunLog(
        directory,
        first_step=first_step,
        total_steps=config.steps,
        tensorboard=config.log.tensorboard,
        senders=senders,
    )


def _reference(setup: Setup, params: PyTree) -> PyTree | None:
    """The weights of a KL term, if there is one: with adapters the frozen ones themselves, else a
    copy, since the state's buffers are given away at the first update.
    """
    if not setup.objective.kl_coef:
        return None
    return base_params(params) if setup.model.lora else jax.jit(setup.model.cast)(params)


def _warn_of_other_course(config: Config, objective: Objective, before: dict[str, Any]) -> None:
    """Warns of a learning rate that changed, and of schedules that follow changed steps."""
    for key in COURSE:
        value = attrgetter(key)(config)
        if key.startswith("optim.") and before.get(key, value) != value:
            _warn(f"warning: from here on config.{key} = {value}, not {before[key]} as before")
    courses, steps = [], before.get("steps", config.steps)
    if config.optim.schedule != "constant":
        courses.append(f"optim.schedule = {config.optim.schedule}")
    if objective.hints and not config.objective.hint_steps:
        courses.append("objective.hint_steps = 0")
    if courses and steps != config.steps:
        _warn(
            f"warning: config.steps = {config.steps}, not {steps} as before: from here on "
            f"{' and '.join(courses)} follows the new length"
        )


def _engine(setup: Setup) -> Engine:
    return make_engine(
        setup.config,
        model=setup.model,
        tokenizer=setup.tokenizer,
        mesh=setup.mesh,
        slots=setup.slots,
        page_tokens=setup.page_tokens,
        image_tokens=setup.image_tokens,
    )


def _present(run: Run, state: TrainState) -> None:
    setup = run.setup
    lines = overview(setup, first_step=run.first_step, device_bytes=device_bytes())
    run.log.present(title(setup, run.policy(state)), lines)
    prompt, completion = setup.config.data.max_prompt_tokens, setup.config.rollout.max_new_tokens
    if warning := setup.model.config.warn_of_positions(prompt, completion):
        run.log.say(warning)


def _with_slots(setup: Setup) -> Setup:
    """The setup with slots that fit on the devices of every process."""
    if setup.objective.supervised:
        return setup
    setup = with_slots(setup, device_bytes=device_bytes())
    fewest, least = smallest(setup.slots), smallest(setup.page_tokens)
    return dataclasses.replace(setup, slots=fewest, page_tokens=least)


@contextmanager
def _file_errors(directory: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Reports a file that cannot be written in one line; the checkpoint in progress is finished."""
    try:
        yield
    except (RunStopped, OSError) as error:
        with suppress(RunStopped):  # the first error is the one to report
            checkpoints.close()
        if isinstance(error, RunStopped):
            raise
        raise RunStopped(
            f"{error.filename or directory}: {error.strerror or error}; the last checkpoint stays"
        ) from error


def _rewind(directory: Path, restored: Restored | None) -> None:
    """Forgets what came after the checkpoint; tells if what came before is not all there."""
    metrics = directory / "metrics.jsonl"
    last = last_step(metrics) if is_first() else -1
    lines = rewind(directory, -1 if restored is None else int(restored.state.step))
    if restored is None and last > 0:
        _warn(
            f"warning: {directory} has no checkpoint, while metrics.jsonl goes to step {last}: the "
            f"run starts again from its first step; the old metrics are in {directory / ASIDE}"
        )
    if restored is not None and is_first() and lines < restored.metrics_lines:
        _warn(
            f"warning: {metrics} has {lines} of the {restored.metrics_lines} lines that were there "
            "at the checkpoint"
        )


def _warn(line: str) -> None:
    print(f"echorl: {line}", file=sys.stderr)


def peak_memory_bytes() -> int:
    """The device's peak where it tells, else this process's largest resident size."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _profile_options() -> jax.profiler.ProfileOptions:
    """A trace without Python's calls: taking those crashes the process when threads begin or end
    meanwhile, as Orbax's do in a save.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options
