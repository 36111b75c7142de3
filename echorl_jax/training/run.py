"""An open run, as every kind of training has it: its parts, its steps, and the end of a step."""

import dataclasses
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from echorl_jax.core import Objective
from echorl_jax.data import PromptStream
from echorl_jax.errors import RunStopped
from echorl_jax.parallel import any_process, from_first
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import Progress
from echorl_jax.training.checkpoints import Checkpoints
from echorl_jax.training.compiled import CompileCounter
from echorl_jax.training.evaluator import Evaluator, attempt
from echorl_jax.training.export import export_model
from echorl_jax.training.faults import Faults
from echorl_jax.training.logs import RunLog
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.preemption import StopRequest
from echorl_jax.training.setup import Setup
from echorl_jax.types import Array, PyTree


class GapCheck:
    """When sampler and trainer must agree: at the first step of a process, every n steps after the
    run's first, and from then on until a step had something to compare.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._due = bool(every)

    def due(self, step: int) -> bool:
        """Whether this step's gap is to be judged."""
        self._due |= bool(self._every) and (step - 1) % self._every == 0
        return self._due

    def passed(self) -> None:
        """The gap was measured and accepted."""
        self._due = False


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run; the training state passes through its methods and is not part of it."""

    directory: Path
    setup: Setup
    stream: PromptStream
    checkpoints: Checkpoints
    grader: GraderPool
    log: RunLog
    evaluator: Evaluator
    compiles: CompileCounter
    gap_check: GapCheck
    stop: StopRequest
    faults: Faults
    reference: PyTree | None  # weights that a KL term holds on to
    first_step: int  # steps that were done when the run was opened
    inputs: Mapping[str, str]  # digests of rows, prompts and weights, and the first start

    @property
    def objective(self) -> Objective:
        """The objective whose loss the run minimises."""
        return self.setup.objective

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
        if config.optim.compile_ahead and self.compiles.surprised():
            self.log.say(
                f"warning: step {step}: a program was compiled after the warm-up; compile/count "
                "counts them (log.profile_steps shows which)"
            )
        every = config.checkpoint.every
        if step == config.steps or (every and step % every == 0):
            self._save(step, state)
        if self.evaluator.due(step) and (scores := self.evaluate(step, state.params)):
            self.log.amend(scores)
        if self.stopping():
            self._save(step, state)
            self.log.say(f"stopped after step {step}; the same command goes on from there")
            return False
        return True

    def _save(self, step: int, state: TrainState) -> None:
        self.checkpoints.save(
            step,
            state,
            data_position=self.stream.get_state(),
            metrics_lines=self.log.secure(),
            inputs=self.inputs,
        )

    def stopping(self) -> bool:
        """Whether a signal has asked any process to stop; the same answer on all."""
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
        """Waits for the last checkpoint; after the last step writes ``export/``."""
        self.checkpoints.close()
        config = self.setup.config
        if config.checkpoint.export and int(state.step) == config.steps:
            export_model(self.directory, self.setup, state.params)


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
