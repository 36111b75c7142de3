"""Compiled programs: counted, kept in the workdir, and compiled ahead of the steps that need them.

The warm-up runs the sampler and the largest micro-batch with zero loss weights, where out-of-memory
shows. The smaller ones are compiled in a thread while the first steps run, or before step 1.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from echorl_jax.config import ConfigError
from echorl_jax.data import Prompt
from echorl_jax.environment import Engine, append_experts, expert_completions
from echorl_jax.models import merge
from echorl_jax.models.image_features import tower_gradient
from echorl_jax.rewards import Verdict
from echorl_jax.training.batch import make_batches, select_tokens
from echorl_jax.training.experience import join_rounds, with_verdicts
from echorl_jax.training.micro_batches import micro_batch_shapes, take_rows
from echorl_jax.training.setup import Setup
from echorl_jax.training.update import (
    Quantity,
    lower_accumulate,
    lower_score,
    micro_gradient,
    placed,
    score_batch,
    token_entropies,
    with_features,
)
from echorl_jax.types import Image, PyTree, TrainBatch


@contextmanager
def keep_compiled(directory: Path, choice: Literal["auto", "on", "off"]) -> Iterator[None]:
    """Inside, keeps programs that took a second or more to compile in ``directory / "compiled"``.

    Args:
      choice: auto keeps programs for accelerators, unless ``JAX_COMPILATION_CACHE_DIR`` or JAX's
        config already names a place; on keeps them whatever they are for. The programs of a CPU
        may not run on another, and compile fast.
    """
    before = jax.config.values["jax_compilation_cache_dir"]
    wanted = choice == "on" or (
        choice == "auto" and before is None and jax.default_backend() != "cpu"
    )
    if not wanted:
        yield
        return
    _use(str(directory / "compiled"))
    try:
        yield
    finally:
        _use(before)


def _use(place: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", place)
    # The first compilation of a process decides whether JAX uses a cache, unless it is reset.
    compilation_cache.reset_cache()


# Compiles one program.
CompileJob = Callable[[], object]
# Lowers a program from a setup, the shapes of parameters, and a micro-batch.
Lower = Callable[[Setup, PyTree, TrainBatch], jax.stages.Lowered]


class Compiles:
    """The XLA compilations of this process: counted from here on, some of them in a thread."""

    def __init__(self) -> None:
        self.count = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._later: list[Future[object]] = []
        self._expected: int | None = None  # compilations up to this count are expected
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def later(self, job: CompileJob) -> None:
        """Runs the job in the thread, after those before it."""
        self._later.append(self._thread.submit(job))

    @property
    def left(self) -> int:
        """Jobs of the thread that are not done."""
        return sum(not job.done() for job in self._later)

    def close(self) -> None:
        """Ends the thread with the program that it compiles."""
        self._thread.shutdown(cancel_futures=True)

    def surprised(self) -> bool:
        """True once, if anything was compiled since the first call after the warm-up's last job.

        Raises:
          Exception: of a job that failed.
        """
        for job in self._later:
            if job.done():
                job.result()
        if self.left:
            return False
        if self._expected is None:
            self._expected = self.count
        found = self.count > self._expected
        if found:
            self._expected = sys.maxsize
        return found

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Compilations inside do not count as surprises, such as those of the first evaluation."""
        before = self.count
        yield
        if self._expected is not None:
            self._expected += self.count - before


def warm_up(
    setup: Setup,
    params: PyTree,
    prompts: Sequence[Prompt],
    *,
    engine: Engine,
    frozen: PyTree = None,
    reference: PyTree | None = None,
    say: Callable[[str], None],
    later: Callable[[CompileJob], None] | None = None,
) -> None:
    """Runs sampling, assembly and the gradient of the largest micro-batch; compiles the others.

    Args:
      params: the trainable parameters; not changed.
      prompts: of an ordinary step.
      frozen: the other parameters; None trains all.
      reference: parameters of the reference policy, with a KL term.
      say: prints a line of progress.
      later: takes the compilations of smaller micro-batches; None runs all of them here.

    Raises:
      ConfigError: a program needs more memory than there is.
    """
    say("compiling ahead: sampler")
    objective, key = setup.objective, jax.random.key(0)
    policy = merge(frozen, params)
    rollouts = engine.warm_up(policy, prompts, key, sampling=setup.sampling)
    on_policy = np.ones(len(rollouts.group), bool)
    if objective.expert_rows:
        longest = setup.config.rollout.max_new_tokens
        experts = expert_completions(prompts, setup.tokenizer, longest=longest)
        rollouts, on_policy = append_experts(rollouts, experts, count=objective.expert_rows)
    if not engine.entropies:
        token_entropies(setup, policy, rollouts)
    wrong = [Verdict(0.0, False, "")] * len(on_policy)
    one = with_verdicts(setup, prompts, rollouts, on_policy, wrong)
    most = setup.config.objective.max_rounds if objective.dynamic_sampling else 1
    batches: list[TrainBatch] = []
    images: list[Sequence[Image]] = []
    for rounds in range(1, most + 1):
        joined = join_rounds([one] * rounds)
        images.append(joined.images(setup.mini_batches)[0])
        parts, _ = make_batches(setup, joined, key, step=1)
        for part in parts:
            batch = select_tokens(part.batch, part.batch.old_logprobs, key, objective=objective)
            if reference is not None:
                zeros = np.zeros(batch.loss_mask.shape, np.float32)
                batch = dataclasses.replace(batch, ref_logprobs=zeros)
            batches.append(batch)
    warm_up_updates(
        setup,
        params,
        batches[0],
        rows=max(len(batch.length) for batch in batches),
        frozen=frozen,
        reference=reference,
        entropies=not engine.entropies,
        images=images,
        say=say,
        later=later,
    )


def warm_up_updates(
    setup: Setup,
    params: PyTree,
    batch: TrainBatch,
    *,
    rows: int,
    frozen: PyTree = None,
    reference: PyTree | None = None,
    entropies: bool = False,
    images: Sequence[Sequence[Image]] = ((),),
    say: Callable[[str], None],
    later: Callable[[CompileJob], None] | None = None,
) -> None:
    """Runs the gradient, and the scores that updates need, of the largest micro-batch.

    Args:
      setup, params, frozen, reference, say, later: see :func:`warm_up`.
      batch: rows (NumPy) as wide as any of the run.
      rows: of a batch, at most.
      entropies: whether the trainer computes the entropies of sampled tokens.
      images: those of the rows' prompts, for a model with a vision tower, and of larger updates.

    Raises:
      ConfigError: a program needs more memory than there is.
    """
    policy = merge(frozen, params)
    for shown in reversed(images):
        batch = with_features(setup, policy, batch, shown)
    scores: list[tuple[Setup, PyTree, Quantity]] = []
    if reference is not None:
        scores.append((setup.of_reference, reference, "logprobs"))
    if setup.scores_policy:
        scores.append((setup, policy, "logprobs"))
    if entropies:
        scores.append((setup, policy, "entropy"))
    shapes = micro_batch_shapes(rows, setup.bounds)
    for number, (count, width) in enumerate(shapes, 1):
        micro = _of_shape(batch, count, width)
        plain = dataclasses.replace(micro, ref_logprobs=None, selected=None)
        if number > 1 and later is not None:
            later(_compile_job(setup, micro, lower_accumulate, policy))
            for scored, weights, quantity in scores:
                lower = functools.partial(lower_score, quantity=quantity)
                later(_compile_job(scored, plain, lower, weights))
            continue
        say(f"compiling ahead: micro-batch {number}/{len(shapes)}, {count} x {width} tokens")
        with _memory_errors(setup, micro):
            total = micro_gradient(setup, params, micro, echo_coef=0.0, frozen=frozen)
            if total.of_features is not None and number == 1:
                gradient = total.gradient
                with jax.set_mesh(setup.mesh):
                    ones = total.of_features * 0 + 1  # where those of the run lie
                    for shown in images:
                        arguments = frozen, params, shown, ones, gradient
                        gradient = tower_gradient(setup.model, *arguments, mesh=setup.mesh)
                total = dataclasses.replace(total, gradient=gradient)
            jax.block_until_ready(total)
            del total
            chosen, shape = np.arange(min(count, len(batch.length))), batch.loss_mask.shape
            for scored, weights, quantity in scores:
                score_batch(scored, weights, [(chosen, plain)], shape=shape, quantity=quantity)


@contextmanager
def _memory_errors(setup: Setup, micro: TrainBatch) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        count, width = micro.tokens.shape
        budget = setup.config.optim.micro_batch_tokens
        raise ConfigError(
            f"config.optim.micro_batch_tokens = {budget}: the gradient of {count} rows x "
            f"{width} tokens does not fit in memory; `echorl plan` says what to change"
        ) from error


def _compile_job(setup: Setup, micro: TrainBatch, lower: Lower, policy: PyTree) -> CompileJob:
    shapes = _shapes(policy)

    def job() -> None:
        with _memory_errors(setup, micro):
            lower(setup, shapes, placed(micro, setup.mesh)).compile()

    return job


def _shapes(params: PyTree) -> PyTree:
    """The shapes with shardings: an update gives the arrays themselves away."""

    def shape(array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)

    return jax.tree.map(shape, params)


def _of_shape(batch: TrainBatch, rows: int, width: int) -> TrainBatch:
    """A micro-batch of the batch's first rows; longer ones are cut, padding keeps a token."""
    micro = take_rows(batch, np.arange(min(rows, len(batch.length))), count=rows, width=width)
    return dataclasses.replace(
        micro,
        length=np.minimum(micro.length, width).astype(np.int32),
        prompt_length=np.minimum(micro.prompt_length, width).astype(np.int32),
    )
