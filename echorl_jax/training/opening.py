"""Opening a run: workdir, model, data and checkpoints, new or where it stopped."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from echorl_jax.config import Config, ConfigError
from echorl_jax.core import Objective
from echorl_jax.data import PromptStream, Rows, load_rows, require_embedded_rows
from echorl_jax.errors import RunStopped, writing
from echorl_jax.parallel import is_first, smallest
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout.memory import device_bytes
from echorl_jax.training.capacity import with_slots
from echorl_jax.training.checkpoints import Checkpoints, Restored
from echorl_jax.training.compiled import CompileCounter, keep_compiled
from echorl_jax.training.evaluator import Evaluator
from echorl_jax.training.faults import Faults
from echorl_jax.training.inputs import compare_inputs, read_inputs, weights_digest
from echorl_jax.training.logs import RunLog
from echorl_jax.training.optimizer import TrainState, init_state
from echorl_jax.training.overview import overview, title
from echorl_jax.training.preemption import stop_on_signal
from echorl_jax.training.run import GapCheck, Run
from echorl_jax.training.setup import Setup, configured_objective, make_setup
from echorl_jax.training.workdir import ASIDE, last_step, open_workdir, require_new, rewind


@contextmanager
def open_run(
    config: Config,
    workdir: str | Path,
    *,
    prompts_per_step: int,
    supervised: bool = False,
    devices: Sequence[Any] | None = None,
) -> Iterator[tuple[Run, TrainState]]:
    """Opens a workdir, builds what a run needs and restores the newest checkpoint, if there is one.

    A new run is evaluated before its first step.

    Raises:
      UserError: config, data, model or workdir that cannot be used, or is in use by another run.
      RunStopped: a file cannot be written, such as on a full disk.
    """
    faults = Faults.parse(config.debug.inject, Path(workdir))
    if config.checkpoint.resume == "none":
        require_new(workdir)
    objective = configured_objective(config)
    if objective.supervised != supervised:
        command = "echorl sft" if objective.supervised else "echorl train"
        raise ConfigError(f"config.objective.name = {config.objective.name!r}: use `{command}`")
    with (
        open_workdir(workdir, config) as (directory, steps_before),
        writing(directory),
        keep_compiled(directory, config.checkpoint.compiled),
    ):
        compiles = CompileCounter()
        setup, params = make_setup(config, devices=devices)
        rows = load_rows(config.data.train, on_bad_row=config.data.on_bad_row)
        require_embedded_rows(
            setup.tokenizer,
            rows,
            template=config.data.template,
            vocab_size=setup.model.config.vocab_size,
            experts=objective.supervised or objective.hints or objective.expert_rows > 0,
            source="data.train",
        )
        # A copy: the state's own buffers are given away at the first update.
        reference = jax.jit(setup.model.cast)(params) if objective.kl_coef else None
        checkpoints = Checkpoints.open(directory, config, faults)
        state = init_state(params, setup.optimizer, setup.mesh)
        weights = weights_digest(config, state.params)
        restored = checkpoints.restore(state, _warn)
        before = {} if restored is None else restored.inputs
        inputs = read_inputs(setup, rows, weights, before)
        compare_inputs(inputs, before, config, reference=reference is not None, warn=_warn)
        stream = _stream(setup, rows, prompts_per_step)
        if restored is not None:
            state = restored.state
            stream.set_state(restored.data_position)
            _tell_of_other_steps(config, objective, steps_before)
        first = int(state.step)
        _rewind(directory, restored)
        grader, log = _pool(config, faults), _log(directory, config, first)
        setup = _with_slots(setup)
        with _file_errors(directory, checkpoints), grader, log, stop_on_signal() as stop:
            run = Run(
                directory=directory,
                setup=setup,
                stream=stream,
                checkpoints=checkpoints,
                grader=grader,
                log=log,
                evaluator=Evaluator.load(setup, grader),
                compiles=compiles,
                gap_check=GapCheck(config.rollout.check_every),
                stop=stop,
                faults=faults,
                reference=reference,
                first_step=first,
                inputs=inputs,
            )
            _present(run, state)
            if rows.bad:
                log.say(f"data.train: {len(rows.bad)} bad rows left out, the first: {rows.bad[0]}")
            if restored is None:
                run.evaluate_first(state.params)
            else:
                run.evaluate_again(first, state.params)
            yield run, state


def _tell_of_other_steps(config: Config, objective: Objective, before: int) -> None:
    """Warns if ``config.steps`` changed and a schedule depends on it."""
    courses = []
    if config.optim.schedule != "constant":
        courses.append(f"optim.schedule = {config.optim.schedule}")
    if objective.hints and not config.objective.hint_steps:
        courses.append("objective.hint_steps = 0")
    if courses and before != config.steps:
        _warn(
            f"warning: config.steps = {config.steps}, not {before} as before: from here on "
            f"{' and '.join(courses)} follows the new length"
        )


def _stream(setup: Setup, rows: Rows, prompts_per_step: int) -> PromptStream:
    data = setup.config.data
    return PromptStream(
        rows,
        setup.tokenizer,
        prompts_per_step=prompts_per_step,
        max_prompt_tokens=data.max_prompt_tokens,
        template=data.template,
        seed=setup.config.seed,
    )


def _pool(config: Config, faults: Faults) -> GraderPool:
    return GraderPool(
        config.data.grader,
        workers=config.data.grader_workers,
        timeout_s=config.data.grader_timeout_s,
        faults=faults.rewards,
    )


def _log(directory: Path, config: Config, first_step: int) -> RunLog:
    return RunLog(
        directory,
        first_step=first_step,
        total_steps=config.steps,
        tensorboard=config.log.tensorboard,
        wandb_project=config.log.wandb_project,
    )


def _present(run: Run, state: TrainState) -> None:
    setup = run.setup
    lines = overview(setup, first_step=run.first_step, device_bytes=device_bytes())
    run.log.present(title(setup, state.params), lines)
    prompt, completion = setup.config.data.max_prompt_tokens, setup.config.rollout.max_new_tokens
    if warning := setup.model.config.warn_of_positions(prompt, completion):
        run.log.say(warning)


def _with_slots(setup: Setup) -> Setup:
    """The setup with slots that fit on the devices of every process."""
    if setup.objective.supervised:
        return setup
    setup = with_slots(setup, device_bytes=device_bytes())
    return dataclasses.replace(setup, slots=smallest(setup.slots))


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
