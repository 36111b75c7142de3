"""Samples completions and grades them: the one act of training and of evaluation."""

import bisect
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from echorl_jax.config import ConfigError
from echorl_jax.data import Prompt, encode_target
from echorl_jax.environment.engines import Engine
from echorl_jax.errors import RunStopped, one_line
from echorl_jax.models import Decoder
from echorl_jax.parallel import from_shares, own_share, texts_from_shares
from echorl_jax.rewards import GraderPool, PoolError, Verdict
from echorl_jax.rewards.loading import MAX_METRICS, MAX_REASON
from echorl_jax.rollout import Progress, Sampling, pad_lists
from echorl_jax.types import Array, HostArray, PyTree, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# The longest reason in UTF-8, of a verdict and of grading that failed as a whole.
REASON_BYTES = 4 * MAX_REASON
# The longest metrics of a verdict as JSON: a number has at most 24 characters, a name 40.
METRICS_BYTES = 72 * (MAX_METRICS + 1)
# The longest answer as JSON: a character takes up to 12.
ANSWER_BYTES = 12 * MAX_REASON + 16
FAILURE_BYTES = 600
# Tokens that end a row on the device because they hold a stop string.
MOST_HOLDERS = 512


@dataclasses.dataclass(frozen=True)
class GradedTexts:
    """The completions as text with their verdicts, row by row."""

    responses: tuple[str, ...]  # "" for a row that another process has decoded
    verdicts: tuple[Verdict, ...]


class Grading:
    """Verdicts on completions that are handed in as they are written, in any order and any pieces.

    Each is decoded without special tokens and judged against its row while the caller goes on; with
    a grader of groups, each group once it is whole. Each of several processes does this for its
    share of them; all get all verdicts, in the order of ``rows``: the same, whenever what was
    handed in.

    Args:
      rows: what each completion is judged against, N.
      tokenizer: decodes.
      grader: judges; a bad item costs only itself.
      all_texts: decode other processes' completions too.
      prefixes: tokens before each completion that belong to what is judged, such as a hint.
      group_size: so many rows after each other are those of one prompt.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        tokenizer: "PreTrainedTokenizerBase",
        grader: GraderPool,
        all_texts: bool = False,
        prefixes: Sequence[Sequence[int]] | None = None,
        group_size: int = 1,
    ) -> None:
        self._rows = rows
        self._unit = group_size if grader.grouped else 1  # rows that are judged together
        self._tokens: dict[int, list[int]] = {}  # of rows whose unit is not whole yet
        self._prefixes = prefixes or [()] * len(rows)
        self._tokenizer = tokenizer
        self._grader = grader
        share = own_share(len(rows) // self._unit)
        self._own = range(len(rows))[share.start * self._unit : share.stop * self._unit]
        self._decoded = range(len(rows)) if all_texts else self._own
        self._texts = [""] * len(rows)
        self._parts: list[tuple[Sequence[int], Future[list[Verdict]]]] = []

    def take(self, places: Sequence[int], completions: Sequence[HostArray]) -> None:
        """Starts on some of the completions; places from N on are padding and are ignored.

        Args:
          places: their numbers among the rows.
          completions: their tokens.
        """
        wanted = {i: ids for i, ids in zip(places, completions, strict=True) if i in self._decoded}
        if not wanted:  # a tokenizer may decode no rows as one empty text
            return
        own = [i for i in wanted if i in self._own]
        try:
            ids = [[*self._prefixes[i], *tokens.tolist()] for i, tokens in wanted.items()]
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            for place, text, tokens in zip(wanted, texts, ids, strict=True):
                self._texts[place] = text
                self._tokens[place] = tokens
            own = self._whole_units(own)
            verdicts = self._grader.submit(
                [self._texts[i] for i in own],
                [dict(self._rows[i]) for i in own],
                [self._tokens.pop(i) for i in own],
                group_size=self._unit,
            )
            self._parts.append((own, verdicts))
        except Exception as error:  # the other processes learn of it where they look for verdicts
            failed: Future[list[Verdict]] = Future()
            failed.set_exception(error)
            self._parts.append((own, failed))

    def _whole_units(self, rows: Sequence[int]) -> list[int]:
        """All rows of the units that are whole with these rows."""
        units = dict.fromkeys(row // self._unit for row in rows)
        found = [range(unit * self._unit, (unit + 1) * self._unit) for unit in units]
        return [row for unit in found if all(i in self._tokens for i in unit) for row in unit]

    def result(self) -> GradedTexts:
        """Waits for the verdicts; all processes call this in the same order.

        Raises:
          PoolError: the grading processes cannot be started. What fails on one of several processes
            is raised on all, so that none waits for another's verdicts.
        """
        own = _if_all_have(self._own_verdicts)
        verdicts = _from_all_processes(own, len(self._rows), unit=self._unit)
        return GradedTexts(tuple(self._texts), tuple(verdicts))

    def _own_verdicts(self) -> list[Verdict]:
        found: dict[int, Verdict] = {}
        for places, verdicts in self._parts:
            found.update(zip(places, verdicts.result(), strict=True))
        return [found[i] for i in self._own]


def _if_all_have(work: Callable[[], list[Verdict]]) -> list[Verdict]:
    """The verdicts of this process, once it is known that every process has its own."""
    try:
        verdicts, failure = work(), None
    except Exception as error:
        verdicts, failure = [], error
    if failure is not None and jax.process_count() == 1:
        raise failure
    reason = "" if failure is None else one_line(failure)
    told = texts_from_shares([reason], jax.process_count(), most_bytes=FAILURE_BYTES)
    for process, reason in enumerate(told):
        if reason:
            raise PoolError(f"process {process}: {reason}") from failure
    return verdicts


def _from_all_processes(own: Sequence[Verdict], rows: int, *, unit: int = 1) -> list[Verdict]:
    """The verdicts on all rows, of which this process has given its share of whole units."""
    # Shares of rows are those of units where every process has the same number of units.
    processes = jax.process_count()
    count = processes * -(-(rows // unit) // processes) * unit
    # A score is finite, so NaN can stand for None.
    scores = np.array([verdict.score for verdict in own], np.float64)
    correct = np.array([verdict.correct for verdict in own], bool)
    # As whole numbers: JAX would round a 64-bit score on its way.
    words = from_shares(scores.view(np.uint32).reshape(-1, 2), count)
    reasons = texts_from_shares([verdict.reason for verdict in own], count, most_bytes=REASON_BYTES)
    texts = [json.dumps([dict(verdict.metrics), verdict.answer]) for verdict in own]
    others = texts_from_shares(texts, count, most_bytes=METRICS_BYTES + ANSWER_BYTES)
    return [
        Verdict(None, None, reason, *json.loads(text))
        if np.isnan(score)
        else Verdict(float(score), bool(right), reason, *json.loads(text))
        for score, right, reason, text in zip(
            np.ascontiguousarray(words).view(np.float64)[:rows, 0],
            from_shares(correct, count)[:rows],
            reasons[:rows],
            others[:rows],
            strict=True,
        )
    ]


def target_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """The tokens of a prompt's expert trajectory, EOS included.

    Raises:
      ConfigError: the row has none; the line names it.
    """
    try:
        return encode_target(tokenizer, prompt.row)
    except ValueError as error:
        raise ConfigError(f"row {prompt.index} of data.train: {error}") from error


@dataclasses.dataclass(frozen=True)
class Experts:
    """One expert trajectory for each prompt, cut to what a completion may have."""

    completions: tuple[HostArray, ...]  # i32
    whole: HostArray  # bool [P], not cut


def expert_completions(
    prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase", *, longest: int
) -> Experts:
    """The prompts' expert trajectories, EOS included; a longer one than ``longest`` is cut there.

    Raises:
      ConfigError: a row has none; the line names it.
    """
    targets = [target_ids(tokenizer, prompt) for prompt in prompts]
    return Experts(
        tuple(np.array(target[:longest], np.int32) for target in targets),
        np.array([len(target) <= longest for target in targets], bool),
    )


def append_experts(
    rollouts: Rollouts, experts: Experts, *, count: int
) -> tuple[Rollouts, np.ndarray]:
    """Adds the row's expert trajectory, ``count`` times, at the end of each group.

    Args:
      rollouts: NumPy arrays, group-major with equal group sizes.
      experts: of the groups' prompts.
      count: rows that each group gets.

    Returns:
      The rollouts and ``on_policy``, bool ``[N]``, False for the expert rows. These have no
      log-probabilities and no entropies: zeros.
    """
    groups, (rows, width) = len(experts.completions), rollouts.completion_ids.shape
    ids, length = pad_lists([ids.tolist() for ids in experts.completions], width)

    def add(own: HostArray, expert: HostArray) -> HostArray:
        own = own.reshape(groups, rows // groups, *own.shape[1:])
        expert = np.repeat(expert[:, None], count, axis=1)
        joined = np.concatenate([own, expert.astype(own.dtype)], axis=1)
        return joined.reshape(-1, *own.shape[2:])

    joined = dataclasses.replace(
        rollouts,
        group=add(rollouts.group, np.arange(groups)),
        completion_ids=add(rollouts.completion_ids, ids),
        completion_length=add(rollouts.completion_length, length),
        rollout_logprobs=add(rollouts.rollout_logprobs, np.zeros((groups, width))),
        token_entropy=add(rollouts.token_entropy, np.zeros((groups, width))),
        truncated=add(rollouts.truncated, ~experts.whole),
    )
    return joined, add(np.ones(rows, bool), np.zeros(groups, bool))


@dataclasses.dataclass(frozen=True)
class Attempts:
    """Completions; verdicts follow while the caller goes on."""

    rollouts: Rollouts  # NumPy, rows in groups
    on_policy: HostArray  # bool [N], False for experts' rows
    slot_occupancy: float  # useful tokens / decoded tokens
    restarted_rows: int  # rows that began again because the sampler's pages ran out
    grading: Grading

    def verdicts(self) -> GradedTexts:
        """Waits for the verdicts; all processes call it in the same order."""
        return self.grading.result()


def end_tokens(tokenizer: "PreTrainedTokenizerBase", model: Decoder) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's and the model's."""
    eos: Any = tokenizer.eos_token_id
    return tuple(sorted({eos, *model.config.eos_ids}))


@functools.lru_cache(maxsize=4)
def end_settings(
    tokenizer: "PreTrainedTokenizerBase",
    model: Decoder,
    stop_ids: tuple[int, ...] = (),
    stop_strings: tuple[str, ...] = (),
) -> Mapping[str, Any]:
    """The fields of ``Sampling`` that say where completions end.

    The device ends a row at a token that holds a stop string, or at the string's own tokens: most
    rows. Another spelling in tokens is found after the call (:func:`cut_rows`), so that the rule is
    the text alone.

    Raises:
      ConfigError: a stop id is outside the model's vocabulary.
    """
    size = model.config.vocab_size
    if not all(0 <= token < size for token in stop_ids):
        raise ConfigError(f"stop_ids = {stop_ids}: the vocabulary has ids from 0 to {size - 1}")
    holders: list[int] = []
    if stop_strings:
        texts = tokenizer.batch_decode([[i] for i in range(min(len(tokenizer), size))])
        holders = [i for i, text in enumerate(texts) if any(stop in text for stop in stop_strings)]
    spelled = (tokenizer.encode(stop, add_special_tokens=False) for stop in stop_strings)
    # Not every tokenizer gives the text back.
    sequences = {tuple(ids) for ids in spelled if _holds(tokenizer, ids, stop_strings)}
    ends = {*end_tokens(tokenizer, model), *stop_ids, *holders[:MOST_HOLDERS]}
    return {
        "eos_ids": tuple(sorted(ends)),
        "stop_sequences": tuple(sorted(sequences)),
        "stop_strings": stop_strings,
    }


def _holds(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], stop_strings: Sequence[str]
) -> bool:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return any(stop in text for stop in stop_strings)


def length_to_stop(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], stop_strings: Sequence[str]
) -> int | None:
    """Tokens up to the one whose text completes a stop string; None if there is none.

    >>> from echorl_jax.data import load_tokenizer
    >>> tokenizer = load_tokenizer("builtin:countdown")
    >>> ids = tokenizer.encode("1+2=3 4", add_special_tokens=False)
    >>> tokenizer.decode(ids[: length_to_stop(tokenizer, ids, ["2="])])
    '1+2='
    """
    if not stop_strings or not _holds(tokenizer, ids, stop_strings):
        return None
    lengths = range(len(ids) + 1)
    return bisect.bisect_left(
        lengths, True, key=lambda length: _holds(tokenizer, ids[:length], stop_strings)
    )


def cut_rows(rollouts: Rollouts, lengths: Mapping[int, int]) -> Rollouts:
    """The rollouts (NumPy) without what rows hold after a stop string.

    Args:
      lengths: row -> tokens that are kept.
    """
    if not lengths:
        return rollouts
    length, truncated = rollouts.completion_length.copy(), rollouts.truncated.copy()
    for row, kept in lengths.items():
        length[row], truncated[row] = kept, False
    inside = np.arange(rollouts.completion_ids.shape[1]) < length[:, None]

    def kept_part(values: HostArray) -> HostArray:
        return np.where(inside, values, np.zeros((), values.dtype))

    return dataclasses.replace(
        rollouts,
        completion_length=length,
        truncated=truncated,
        completion_ids=kept_part(rollouts.completion_ids),
        rollout_logprobs=kept_part(rollouts.rollout_logprobs),
        token_entropy=kept_part(rollouts.token_entropy),
    )


def sample_and_grade(
    engine: Engine,
    params: PyTree,
    prompts: Sequence[Prompt],
    key: Array,
    *,
    sampling: Sampling,
    tokenizer: "PreTrainedTokenizerBase",
    grader: GraderPool,
    graded_prompts: int | None = None,
    expert_rows: int = 0,
    all_texts: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Attempts:
    """Samples a group for each prompt, and starts to grade each row when it ends.

    Args:
      engine: samples.
      params: the policy's parameters.
      prompts: P prompts; hints at their ends are graded with the completions.
      key: PRNG key of this call.
      sampling: ``group_size`` counts sampled rows.
      tokenizer: decodes completions.
      grader: judges them.
      graded_prompts: prompts from here on only fill up the call's shape; all are graded if None.
      expert_rows: copies of the expert trajectory at the end of each group, G in all with those.
      all_texts: decode the completions that other processes grade too.
      progress: called by the engine now and then; an error ends the call.

    Raises:
      ConfigError: a row has no expert trajectory.
      RunStopped: the engine returned another number of rows.
    """
    group = sampling.group_size + expert_rows
    graded = [prompt for prompt in prompts[:graded_prompts] for _ in range(group)]
    grading = Grading(
        [prompt.row for prompt in graded],
        tokenizer=tokenizer,
        grader=grader,
        prefixes=[prompt.ids[len(prompt.ids) - prompt.hint_tokens :] for prompt in graded],
        all_texts=all_texts,
        group_size=group,
    )
    occupancy, restarted = 1.0, 0

    def watch(now: Progress) -> None:
        nonlocal occupancy, restarted
        occupancy, restarted = now.occupancy, now.restarted
        if progress is not None:
            progress(now)

    reported: set[int] = set()
    cut: dict[int, int] = {}

    def finished(rows: Sequence[int], completions: Sequence[HostArray]) -> None:
        reported.update(rows)
        if sampling.stop_strings:
            stops = sampling.stop_strings
            found = [length_to_stop(tokenizer, ids.tolist(), stops) for ids in completions]
            cut.update((row, end) for row, end in zip(rows, found, strict=True) if end)
            completions = [ids[:end] for ids, end in zip(completions, found, strict=True)]
        rows = [row // sampling.group_size * group + row % sampling.group_size for row in rows]
        grading.take(rows, completions)

    experts = None
    if expert_rows:
        experts = expert_completions(prompts, tokenizer, longest=sampling.max_new_tokens)
        rows = [row for row in range(len(graded)) if row % group >= sampling.group_size]
        grading.take(rows, [experts.completions[row // group] for row in rows])
    rollouts = engine.sample(
        params, prompts, key, sampling=sampling, finished=finished, progress=watch
    )
    sampled = len(prompts) * sampling.group_size
    if len(rollouts.group) != sampled:
        raise RunStopped(f"the engine returned {len(rollouts.group)} rows, expected {sampled}")
    # An engine may report rows late or not at all: they are graded now.
    rest = [row for row in range(sampled) if row not in reported]
    ids, length = rollouts.completion_ids, rollouts.completion_length
    finished(rest, [ids[row, : length[row]] for row in rest])
    rollouts = cut_rows(rollouts, cut)
    on_policy = np.ones(sampled, bool)
    if experts is not None:
        rollouts, on_policy = append_experts(rollouts, experts, count=expert_rows)
    return Attempts(rollouts, on_policy, occupancy, restarted, grading)
