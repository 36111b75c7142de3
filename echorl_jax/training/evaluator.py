"""The periodic evaluation of a run on held-out rows."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from orbax.checkpoint import multihost

from echorl_jax.data import (
    Prompt,
    Template,
    encode_rows,
    load_rows,
    number_prompts,
    require_embedded_rows,
)
from echorl_jax.environment import Engine, JaxEngine
from echorl_jax.errors import one_line
from echorl_jax.evaluation.evaluate import attempt_prompts, majority_by_source, score_by_source
from echorl_jax.parallel import texts_from_shares
from echorl_jax.rewards import GraderPool, mean_metrics
from echorl_jax.rollout import Progress, Resources, Sampling
from echorl_jax.training.setup import Setup
from echorl_jax.types import PyTree

_T = TypeVar("_T")
# Limit on a reason that is sent to the other processes.
REASON_BYTES = 600


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Held-out prompts and how they are tried."""

    setup: Setup
    engine: Engine
    grader: GraderPool
    prompts: Sequence[Prompt]

    @classmethod
    def load(cls, setup: Setup, engine: Engine, grader: GraderPool) -> "Evaluator":
        """Reads and encodes ``config.data.eval``; no prompts when nothing is to be evaluated.

        Our engine evaluates with its cache in the model's type and as many slots as fit.
        """
        config = setup.config
        if not config.eval.every:
            return cls(setup, engine, grader, ())
        rows = load_rows(config.data.eval, on_bad_row=config.data.on_bad_row)
        rows = list(itertools.islice(rows, config.eval.rows or None))
        require_embedded_rows(
            setup.tokenizer,
            rows,
            template=Template.of(config.data),
            vocab_size=setup.model.config.vocab_size,
            experts=False,
            source="data.eval",
            processor=setup.processor,
        )
        processor, longest = setup.processor, config.data.max_prompt_tokens
        ids = encode_rows(
            setup.tokenizer, rows, Template.of(config.data), processor, source="data.eval"
        )
        # Draws are numbered by the rows that fit.
        prompts = number_prompts(rows, ids, processor, longest=longest)
        if isinstance(engine, JaxEngine):
            engine = JaxEngine(
                setup.model,
                Resources(mesh=setup.mesh),
                prompt_tokens=max((len(prompt.ids) for prompt in prompts), default=0),
                image_tokens=setup.image_tokens,
            )
        return cls(setup, engine, grader, prompts)

    def due(self, step: int) -> bool:
        """True if to evaluate: before the first step, at the last, every ``eval.every`` steps."""
        every, last = self.setup.config.eval.every, self.setup.config.steps
        return bool(self.prompts) and (step % every == 0 or step == last)

    def scores(self, params: PyTree, poll: Callable[[Progress], None]) -> dict[str, float]:
        """``eval/<source>/pass@k``, ``maj@k``, and ``<name>/mean`` of the grader's metrics.

        The draws are the same every time.

        Args:
          params: the policy's parameters.
          poll: called now and then by the engine, on all processes alike; an error ends the work.
        """
        config = self.setup.config
        attempts = attempt_prompts(
            self.engine,
            params,
            self.prompts,
            jax.random.key(config.seed + 1),
            sampling=Sampling(
                group_size=config.eval.samples,
                max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
                temperature=config.eval.temperature,
                top_p=config.eval.top_p if config.eval.temperature else 1.0,
                **self.setup.ends,
            ),
            tokenizer=self.setup.tokenizer,
            grader=self.grader,
            progress=poll,
        )
        outcomes, metrics = [], defaultdict(list)
        for each in attempts:
            verdict = each.verdict
            outcomes.append((each.data_source, each.problem, verdict.correct, verdict.answer))
            metrics[each.data_source].append(each.verdict.metrics)
        scores = {
            f"eval/{source}/pass@{k}": value
            for source, result in score_by_source(outcome[:3] for outcome in outcomes).items()
            for k, value in result.pass_at.items()
        }
        for source, votes in majority_by_source(outcomes).items():
            scores |= {f"eval/{source}/maj@{k}": value for k, value in votes.items()}
        for source, found in metrics.items():
            for name, mean in mean_metrics(found).items():
                scores[f"eval/{source}/{name}/mean"] = mean
        return scores


def attempt(work: Callable[[], _T], *, name: str, within_s: float) -> tuple[_T | None, str]:
    """Runs ``work``; if it fails on any process, all get None and the reason.

    The processes meet where no device takes part: one that has failed cannot disturb others that
    are still in a computation in common. They wait for it there for good, so then the run ends.

    Args:
      work: the same on every process.
      name: no other work has it.
      within_s: limit for a process that has failed to see the others (seconds).

    Returns:
      The result and ""; None and the first reason if any process has failed.

    Raises:
      Exception: what this process failed of, while others were still at work.
      RuntimeError: another process has failed, and is gone.
    """
    done, failure = None, None
    try:
        done = work()
    except Exception as error:  # graders and benchmarks are the user's
        failure = error
    if jax.process_count() > 1:
        try:
            multihost.get_barrier_sync_fn()(key=name, timeout_ms=round(1000 * within_s))
        except jax.errors.JaxRuntimeError as error:
            if failure is not None:
                raise failure from None
            raise RuntimeError(f"{name}: the other processes did not come to its end") from error
    own = "" if failure is None else one_line(failure)
    reasons = texts_from_shares([own], jax.process_count(), most_bytes=REASON_BYTES)
    reason = next(filter(None, reasons), "")
    return (None if reason else done), reason
