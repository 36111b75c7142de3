"""A model that a study asks: what it writes, and how uncertain it is at each token of a text."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from echorl_jax.analysis.progress import Counter
from echorl_jax.core import step_ids
from echorl_jax.data import load_tokenizer, newline_delimiters
from echorl_jax.data.tokens import model_path
from echorl_jax.errors import UserError
from echorl_jax.evaluation.evaluate import end_tokens
from echorl_jax.evaluation.grading import GradedTexts, grade_rollouts
from echorl_jax.models import Decoder, load_model
from echorl_jax.rewards import GraderPool
from echorl_jax.rollout import generate, score_rollouts
from echorl_jax.rollout.scoring import given_rollouts
from echorl_jax.types import PyTree, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """A model with its tokenizer, and how it is asked."""

    model: Decoder
    params: PyTree
    tokenizer: "PreTrainedTokenizerBase"
    is_delimiter: np.ndarray  # bool [V]
    temperature: float
    rows_at_once: int

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str,
        delimiter_ids: Sequence[int] = (),
        temperature: float = 1.0,
        rows_at_once: int = 64,
    ) -> "Policy":
        """Reads a Hugging Face directory, a repository id or ``builtin:countdown``.

        Args:
          path: the model.
          dtype: of activations.
          delimiter_ids: tokens that end a step; those with a newline unless given.
          temperature: divides the logits in sampling and in entropies; above 0.
          rows_at_once: completions in one call.

        Raises:
          UserError: there is no such model, or an option is out of its range.
        """
        if temperature <= 0 or rows_at_once < 1:
            raise UserError("--temperature must be above 0 and --batch at least 1")
        tokenizer = load_tokenizer(path)
        model, params = load_model(model_path(path), dtype=dtype, remat="none")
        marks = np.zeros(model.config.vocab_size, bool)
        if delimiter_ids and max(delimiter_ids) >= len(marks):
            raise UserError(
                f"--delimiter_ids: {max(delimiter_ids)} is not in the vocabulary of {len(marks)}"
            )
        marks[list(delimiter_ids)] = True
        if not delimiter_ids:
            marks = newline_delimiters(tokenizer, len(marks))
        return cls(model, params, tokenizer, marks, temperature, rows_at_once)

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], what: str
    ) -> Iterator[Trajectory]:
        """The policy's entropy at each token of given completions, in their order."""
        order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
        found: dict[int, Trajectory] = {}
        with Counter(what, len(order)) as counter:
            # Rows of like length together: the others' padding costs as much as their tokens.
            for places in _cut(order, self.rows_at_once):
                given = given_rollouts(
                    [prompts[i] for i in places], [completions[i] for i in places]
                )
                _, entropy = score_rollouts(
                    self.model, self.params, given, temperature=self.temperature
                )
                steps = self._step_ids(given)
                given, entropy, steps = jax.device_get((given, entropy, steps))
                for row, place in enumerate(places):
                    found[place] = _trajectory(given, entropy, steps, row)
                counter.add(len(places))
        for place in range(len(completions)):
            yield found[place]

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Any],
        *,
        grader: GraderPool,
        max_new_tokens: int,
        seed: int,
        what: str,
        samples: int = 1,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[list[Answer]]:
        """Samples and grades ``samples`` answers to each prompt; yields one list per prompt.

        Args:
          prompts, rows: token ids and the rows that they were made of.
          grader: judges.
          max_new_tokens: longest answer, a prefix included.
          seed: of the sampling.
          what: is counted on the screen.
          samples: answers to a prompt.
          prefixes: how each prompt's answers have to begin.
        """
        per_call = max(1, min(len(prompts), self.rows_at_once // samples))
        longest = max(map(len, prompts))
        with Counter(what, len(prompts)) as counter:
            for places in _cut(range(len(prompts)), per_call):
                # Repeats fill up the last call, so that all share a compiled program.
                filled = [*places, *[places[-1]] * (per_call - len(places))]
                rollouts = generate(
                    self.model,
                    self.params,
                    [prompts[i] for i in filled],
                    jax.random.key(seed),
                    group_size=samples,
                    max_new_tokens=max_new_tokens,
                    temperature=self.temperature,
                    eos_ids=end_tokens(self.tokenizer, self.model),
                    row_ids=[i * samples + s for i in filled for s in range(samples)],
                    prefixes=None
                    if prefixes is None
                    else [prefixes[i] for i in filled for _ in range(samples)],
                    prompt_tokens=longest,
                )
                rollouts, steps = jax.device_get((rollouts, self._step_ids(rollouts)))
                texts = grade_rollouts(
                    rollouts, [rows[i] for i in filled], tokenizer=self.tokenizer, grader=grader
                )
                for number in range(len(places)):
                    own = range(number * samples, (number + 1) * samples)
                    yield [_answer(rollouts, steps, texts, row) for row in own]
                counter.add(len(places))

    def _step_ids(self, rollouts: Rollouts) -> jax.Array:
        width = rollouts.completion_ids.shape[1]
        mask = jnp.arange(width)[None, :] < rollouts.completion_length[:, None]
        return step_ids(rollouts.completion_ids, mask, jnp.asarray(self.is_delimiter))


def _answer(rollouts: Rollouts, steps: np.ndarray, texts: GradedTexts, row: int) -> Answer:
    trajectory = _trajectory(rollouts, rollouts.token_entropy, steps, row)
    return Answer(trajectory, texts.responses[row], texts.verdicts[row].correct)


def _trajectory(rollouts: Rollouts, entropy: Any, steps: Any, row: int) -> Trajectory:
    length = int(rollouts.completion_length[row])
    return Trajectory(
        ids=tuple(rollouts.completion_ids[row, :length].tolist()),
        entropy=tuple(entropy[row, :length].tolist()),
        step_ids=tuple(steps[row, :length].tolist()),
    )


def _cut(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (places[i : i + size] for i in range(0, len(places), size))
