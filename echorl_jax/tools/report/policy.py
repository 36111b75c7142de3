"""A model that a study asks: what it writes, and how uncertain it is at each token of a text."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax.core import step_ids
from echorl_jax.data import (
    encode_prompt,
    load_tokenizer,
    newline_delimiters,
    require_embedded,
    require_vocabulary,
)
from echorl_jax.data.tokens import model_path
from echorl_jax.errors import UserError
from echorl_jax.evaluation.bar import Bar
from echorl_jax.evaluation.evaluate import Attempt, attempt_rows
from echorl_jax.models import Decoder, load_model
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import Progress, pad_lists, score
from echorl_jax.types import HostArray, PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
LINE_EVERY_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Token ids with the policy's entropy at each (nats) and the step each belongs to."""

    ids: tuple[int, ...]
    entropy: tuple[float, ...]
    step_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the policy wrote, and the verdict on it."""

    trajectory: Trajectory
    text: str
    correct: bool


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with its tokenizer, how it is asked, and who judges its answers."""

    model: Decoder
    params: PyTree
    tokenizer: "PreTrainedTokenizerBase"
    is_delimiter: np.ndarray  # bool [V]
    grader: GraderPool
    template: str
    temperature: float
    max_prompt_tokens: int
    max_new_tokens: int
    rows_at_once: int
    seed: int

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str,
        delimiter_ids: Sequence[int],
        grader: GraderPool,
        template: str,
        temperature: float,
        max_prompt_tokens: int,
        max_new_tokens: int,
        rows_at_once: int,
        seed: int,
    ) -> "Policy":
        """Reads a Hugging Face directory, a repository id or ``builtin:countdown``.

        Args:
          path: the model.
          dtype: of activations.
          delimiter_ids: tokens that end a step; those with a newline if there is none.
          grader: judges its answers.
          template: how a row becomes a prompt.
          temperature: divides the logits in sampling and in entropies; above 0.
          max_prompt_tokens: rows with longer prompts are left out.
          max_new_tokens: longest answer.
          rows_at_once: completions in one call.
          seed: of the sampling.

        Raises:
          UserError: there is no such model, or an option is out of its range.
        """
        if temperature <= 0 or rows_at_once < 1:
            raise UserError("--temperature must be above 0 and --batch at least 1")
        tokenizer = load_tokenizer(path)
        model, params = load_model(model_path(path), dtype=dtype, remat="none")
        require_vocabulary(tokenizer, model.config.vocab_size)
        marks = np.zeros(model.config.vocab_size, bool)
        if delimiter_ids and max(delimiter_ids) >= len(marks):
            raise UserError(
                f"--delimiter_ids: {max(delimiter_ids)} is not in the vocabulary of {len(marks)}"
            )
        marks[list(delimiter_ids)] = True
        if not delimiter_ids:
            marks = newline_delimiters(tokenizer, len(marks))
        return cls(
            model=model,
            params=params,
            tokenizer=tokenizer,
            is_delimiter=marks,
            grader=grader,
            template=template,
            temperature=temperature,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            rows_at_once=rows_at_once,
            seed=seed,
        )

    def prompt(self, row: Mapping[str, Any]) -> list[int]:
        """The token ids that ask for an answer to ``row``."""
        return encode_prompt(self.tokenizer, row, self.template)

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], what: str
    ) -> list[Trajectory]:
        """The policy's entropy at each token of given completions."""
        self._require_embedded([*prompts, *completions], what)
        order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
        found: dict[int, HostArray] = {}
        with Bar(what, len(order), every_s=LINE_EVERY_SECONDS) as bar:
            # Rows of like length together: the others' padding costs as much as their tokens.
            for places in _cut(order, self.rows_at_once):
                _, entropy = score(
                    self.model,
                    self.params,
                    [prompts[i] for i in places],
                    [completions[i] for i in places],
                    temperature=self.temperature,
                )
                found.update(zip(places, jax.device_get(entropy), strict=True))
                _count(bar, what, len(found), len(order))
        return self._trajectories(completions, [found[i] for i in range(len(found))])

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
          prompts, rows: token ids and the rows that they were made of.
          what: is counted on the screen.
          samples: answers to a prompt.
          prefixes: how each prompt's answers have to begin.
          draw: added to the seed, for answers that do not repeat another call's draws.
        """
        self._require_embedded(prompts, what)
        attempts: list[Attempt] = []

        def count(_: Progress | None = None) -> None:
            _count(bar, what, len(attempts) // samples, len(prompts))

        with Bar(what, len(prompts), every_s=LINE_EVERY_SECONDS) as bar:
            for attempt in attempt_rows(
                self.model,
                self.params,
                rows,
                prompts,
                jax.random.key(self.seed + draw),
                tokenizer=self.tokenizer,
                grader=self.grader,
                samples=samples,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                prefixes=prefixes,
                rows_at_once=self.rows_at_once,
                progress=count,
            ):
                attempts.append(attempt)
                count()
        trajectories = self._trajectories([a.ids for a in attempts], [a.entropy for a in attempts])
        answers = [
            Answer(trajectory, attempt.response, attempt.verdict.correct)
            for trajectory, attempt in zip(trajectories, attempts, strict=True)
        ]
        return list(_cut(answers, samples))

    def _require_embedded(self, texts: Sequence[Sequence[int]], what: str) -> None:
        for number, ids in enumerate(texts):
            size = self.model.config.vocab_size
            require_embedded(self.tokenizer, ids, size, f"{what}, text {number}")

    def _trajectories(
        self, completions: Sequence[Sequence[int]], entropy: Sequence[HostArray]
    ) -> list[Trajectory]:
        """Cuts completions into steps, some at a time; an entropy may be padded."""
        longest = max(map(len, completions), default=1)
        found: list[Trajectory] = []
        for places in _cut(range(len(completions)), self.rows_at_once):
            ids, length = pad_lists([completions[i] for i in places], longest)
            mask = np.arange(longest) < length[:, None]
            steps = jax.device_get(step_ids(*map(jnp.asarray, (ids, mask, self.is_delimiter))))
            parts = zip(length, ids, [entropy[i] for i in places], steps, strict=True)
            found += [
                Trajectory(*(tuple(values[:end].tolist()) for values in of_tokens))
                for end, *of_tokens in parts
            ]
        return found


def _count(bar: Bar, what: str, done: int, total: int) -> None:
    bar.show(done, f"{what}: {done} of {total}", now=done == total)


def _cut(values: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (values[i : i + size] for i in range(0, len(values), size))
