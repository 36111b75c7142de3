"""The model that ``echorl analyze`` studies: answers to prompts, and entropies of given tokens."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax.core import step_ids
from echorl_jax.data import (
    Prompt,
    encode_rows,
    load_tokenizer,
    newline_delimiters,
    require_embedded,
    require_vocabulary,
)
from echorl_jax.environment import JaxEngine, end_tokens
from echorl_jax.errors import UserError
from echorl_jax.evaluation.evaluate import attempt_prompts
from echorl_jax.evaluation.progress import Bar
from echorl_jax.models import Decoder, load_model
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import Progress, Resources, Sampling, pad_lists
from echorl_jax.rollout import score as score_completions
from echorl_jax.types import HostArray, PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
LINE_EVERY_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The options of ``echorl analyze``, which documents them."""

    workdir: Path
    studies: tuple[str, ...] = ()  # empty: all that the other options allow
    compare: tuple[Path, ...] = ()
    model: str | None = None
    data: str | None = None
    rollouts: Path | None = None
    limit: int = 0
    solutions: Literal["policy", "expert"] = "policy"
    deletions: tuple[int, ...] = (0, 1, 2)
    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 1024
    max_prompt_tokens: int = 2048
    delimiter_ids: tuple[int, ...] = ()
    template: str = "chat"
    grader: str = "auto"
    dtype: str = "bfloat16"
    batch: int = 64
    workers: int = 2
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Token ids with the policy's entropy at each (nats) and the step each belongs to."""

    ids: tuple[int, ...]
    entropy: tuple[float, ...]
    step_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A graded completion of the policy."""

    trajectory: Trajectory
    text: str
    correct: bool | None  # None: not judged


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with its tokenizer, the grader of its answers, and the options of the study."""

    model: Decoder
    params: PyTree
    tokenizer: "PreTrainedTokenizerBase"
    is_delimiter: np.ndarray  # bool [V], tokens that end a step
    grader: GraderPool
    options: Analysis

    @classmethod
    @contextmanager
    def load(cls, options: Analysis) -> Iterator["Policy"]:
        """Loads ``options.model`` and starts the grader, which ends with the context.

        Raises:
          UserError: there is no such model, or an option is out of its range.
        """
        if options.temperature <= 0 or options.batch < 1:
            raise UserError("--temperature must be above 0 and --batch at least 1")
        path, ids = str(options.model), options.delimiter_ids
        tokenizer = load_tokenizer(path)
        model, params = load_model(path, dtype=options.dtype, remat="none")
        size = model.config.vocab_size
        require_vocabulary(tokenizer, size)
        if max(ids, default=0) >= size:
            raise UserError(f"--delimiter_ids: {max(ids)} is not in the vocabulary of {size}")
        ends_step = np.isin(np.arange(size), ids) if ids else newline_delimiters(tokenizer, size)
        with GraderPool(options.grader, workers=options.workers) as grader:
            yield cls(model, params, tokenizer, ends_step, grader, options)

    def prompt(self, row: Mapping[str, Any]) -> list[int]:
        """The token ids that ask for an answer to ``row``."""
        return encode_rows(self.tokenizer, [row], self.options.template, source="--data")[0]

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], what: str
    ) -> list[Trajectory]:
        """The policy's entropy at each token of given completions.

        ``what`` names the completions on the progress bar and in errors.
        """
        self._require_embedded([*prompts, *completions], what)
        # Completions of similar length share a call, which pads them to the longest.
        order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
        entropies: dict[int, HostArray] = {}
        with Bar(what, len(order), every_s=LINE_EVERY_SECONDS) as bar:
            for places in _chunks(order, self.options.batch):
                _, entropy = score_completions(
                    self.model,
                    self.params,
                    [prompts[i] for i in places],
                    [completions[i] for i in places],
                    temperature=self.options.temperature,
                )
                entropies.update(zip(places, jax.device_get(entropy), strict=True))
                _show(bar, what, len(entropies), len(order))
        return self._trajectories(completions, [entropies[i] for i in range(len(entropies))])

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Mapping[str, Any]],
        what: str,
        *,
        samples: int = 1,
        prefixes: Sequence[Sequence[int]] | None = None,
        draw: int = 0,
    ) -> list[Sequence[Answer]]:
        """Samples and grades ``samples`` answers to each prompt; one list per prompt.

        Args:
          prompts, rows: token ids and the rows they were made from.
          what: names the answers on the progress bar and in errors.
          samples: answers to a prompt.
          prefixes: tokens that the answers to each prompt begin with.
          draw: added to the seed, so that two calls draw different answers.
        """
        self._require_embedded(prompts, what)
        columns = zip(prompts, rows, prefixes or [()] * len(rows), strict=True)
        sampling = Sampling(
            group_size=samples,
            max_new_tokens=self.options.max_new_tokens,
            temperature=self.options.temperature,
            eos_ids=end_tokens(self.tokenizer, self.model),
        )
        attempts = []
        with Bar(what, len(prompts), every_s=LINE_EVERY_SECONDS) as bar:

            def show(_: Progress | None = None) -> None:
                _show(bar, what, len(attempts) // samples, len(prompts))

            for attempt in attempt_prompts(
                JaxEngine(self.model, Resources(), prompt_tokens=max(map(len, prompts), default=0)),
                self.params,
                [
                    Prompt(ids, row, i, prefix=prefix, number=i)
                    for i, (ids, row, prefix) in enumerate(columns)
                ],
                jax.random.key(self.options.seed + draw),
                sampling=sampling,
                tokenizer=self.tokenizer,
                grader=self.grader,
                rows_at_once=self.options.batch,
                progress=show,
            ):
                attempts.append(attempt)
                show()
        trajectories = self._trajectories([a.ids for a in attempts], [a.entropy for a in attempts])
        graded = zip(trajectories, attempts, strict=True)
        answers = [Answer(t, a.response, a.verdict.correct) for t, a in graded]
        return list(_chunks(answers, samples))  # attempts come prompt by prompt

    def _require_embedded(self, texts: Sequence[Sequence[int]], what: str) -> None:
        size = self.model.config.vocab_size
        for number, ids in enumerate(texts):
            require_embedded(self.tokenizer, ids, size, f"{what}, text {number}")

    def _trajectories(
        self, completions: Sequence[Sequence[int]], entropy: Sequence[HostArray]
    ) -> list[Trajectory]:
        """Adds the step of each token, for ``batch`` completions at a time; drops padding."""
        longest = max(map(len, completions), default=1)
        trajectories = []
        for places in _chunks(range(len(completions)), self.options.batch):
            ids, length = pad_lists([completions[i] for i in places], longest)
            mask = np.arange(longest) < length[:, None]
            steps = jax.device_get(step_ids(*map(jnp.asarray, (ids, mask, self.is_delimiter))))
            for row, i in enumerate(places):
                padded = (ids[row], entropy[i], steps[row])
                fields = [tuple(values[: length[row]].tolist()) for values in padded]
                trajectories.append(Trajectory(*fields))
        return trajectories


def _show(bar: Bar, what: str, done: int, total: int) -> None:
    bar.show(done, f"{what}: {done} of {total}", now=done == total)


def _chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[i : i + size] for i in range(0, len(values), size))
