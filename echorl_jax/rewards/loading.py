"""Verdicts, and graders by name or written for other libraries."""

import dataclasses
import importlib
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from echorl_jax.config import ConfigError
from echorl_jax.errors import nearest

# Reasons are for people and travel between processes: one line, cut to this many characters.
MAX_REASON = 200
# First words of a reason where grading failed: the process hung or died, or the grader raised.
HUNG, DIED, RAISED = "no verdict within", "the grading process died", "the grader raised"
# A plain score from here on counts as correct.
CORRECT_SCORE = 1.0
# A verdict has at most this many metrics; names become parts of keys such as reward/NAME/mean.
MAX_METRICS = 16
METRIC_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
# The metric that counts a verdict's other metrics which were not finite numbers under such names.
DROPPED = "dropped_metrics"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The reward, whether the response is right, and why, in one line.

    Score and correctness are None where the grader does not judge the response: such a row is left
    out of the loss and of all statistics. ``metrics`` holds further named numbers, which are logged
    and enter no loss.
    """

    score: float | None
    correct: bool | None
    reason: str
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def right(cls, reason: str) -> "Verdict":
        """A correct response: score 1."""
        return cls(1.0, True, reason)

    @classmethod
    def wrong(cls, reason: str) -> "Verdict":
        """A response that is wrong, or on which the grader failed: score 0."""
        return cls(0.0, False, clean_reason(reason))

    @property
    def judged(self) -> bool:
        """True if there is a score."""
        return self.score is not None

    def as_json(self) -> dict[str, Any]:
        """The fields for a line of JSON; ``metrics`` only where there are some."""
        fields = {"score": self.score, "correct": self.correct, "reason": self.reason}
        return {**fields, "metrics": dict(self.metrics)} if self.metrics else fields


def grading_failed(reason: str) -> bool:
    """True if no grader gave this verdict: it hung, died, or raised something."""
    return reason.startswith((HUNG, DIED, RAISED))


def clean_reason(text: str) -> str:
    """Text without line ends and control characters, cut to :data:`MAX_REASON`."""
    start = text[: 2 * MAX_REASON]
    clean = "".join(sign if sign.isprintable() else " " for sign in start)
    return clean if len(clean) <= MAX_REASON else clean[: MAX_REASON - 3] + "..."


def as_verdict(result: Any) -> Verdict:
    """Accepts what graders return: a number, a truth value, a mapping, None, or a verdict.

    A number is the score and is correct from 1 on. A mapping has ``score`` and may have ``acc`` for
    correctness and ``metrics``. None, as the result or as its score, leaves the response without a
    verdict.

    Raises:
      TypeError: anything else.
      ValueError: a score that is not finite.

    >>> as_verdict({"score": -1.0, "acc": False})
    Verdict(score=-1.0, correct=False, reason='scored -1', metrics={})
    """
    if isinstance(result, Verdict):
        given, correct, reason = result.score, result.correct, clean_reason(result.reason)
        metrics = clean_metrics(result.metrics)
    else:
        known: Any = result if isinstance(result, Mapping) else {}
        given, correct, reason = known.get("score", result), known.get("acc"), None
        metrics = clean_metrics(known.get("metrics", {}))
    if given is None:
        return Verdict(None, None, "not judged" if reason is None else reason, metrics)
    score = _number(given)
    if not math.isfinite(score):
        raise ValueError(f"the grader's score is {score}")
    right = score >= CORRECT_SCORE if correct is None else bool(correct)
    return Verdict(score, right, f"scored {score:g}" if reason is None else reason, metrics)


def clean_metrics(given: Any) -> dict[str, float]:
    """The first :data:`MAX_METRICS` metrics that are finite numbers, and how many others there are.

    A metric that is of no use is dropped and counted, for it must not change the reward.

    >>> clean_metrics({"steps": 3, "share": float("nan"), "a name": 1})
    {'steps': 3.0, 'dropped_metrics': 2.0}
    """
    if not isinstance(given, Mapping):
        return {DROPPED: 1.0}
    before = _finite(given.get(DROPPED)) or 0.0
    first = itertools.islice(given.items(), MAX_METRICS + 1)
    others = [(name, value) for name, value in first if name != DROPPED]
    named = {
        name: _finite(value)
        for name, value in others[:MAX_METRICS]
        if isinstance(name, str) and METRIC_NAME.fullmatch(name)
    }
    kept = {name: value for name, value in named.items() if value is not None}
    dropped = before + len(given) - (DROPPED in given) - len(kept)
    return {**kept, DROPPED: dropped} if dropped else kept


def _finite(value: Any) -> float | None:
    """The value as a number; None if it is no finite one."""
    try:
        number = _number(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def mean_metrics(verdicts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the verdicts that have it, by name.

    >>> mean_metrics([{"steps": 3.0}, {"steps": 5.0, "share": 0.5}, {}])
    {'share': 0.5, 'steps': 4.0}
    """
    values: dict[str, list[float]] = {}
    for name, value in itertools.chain.from_iterable(each.items() for each in verdicts):
        values.setdefault(name, []).append(value)
    return {name: math.fsum(values[name]) / len(values[name]) for name in sorted(values)}


def _number(value: Any) -> float:
    # NumPy scalars have item(); text that looks like a number is a mistake.
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, int | float):
        raise TypeError(f"the grader returned {type(value).__name__}, not a score")
    return float(plain)


Grader = Callable[[str, Mapping[str, Any]], Verdict]

GRADERS = {
    "auto": "echorl_jax.rewards.auto:grade",
    "choice": "echorl_jax.rewards.choice:grade",
    "countdown": "echorl_jax.rewards.countdown:grade",
    "math": "echorl_jax.rewards.mathematics:grade",
    "reduce": "echorl_jax.rewards.reduce:grade",
}
# Graders whose costs are linear in the length of a response, as tests show: they may run in the
# training process. math-verify may not, and neither may a user's grader.
BOUNDED = ("choice", "countdown", "reduce")
# Arguments of verl's reward functions.
VERL_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


def load_grader(name: str) -> Grader:
    """Finds a grader by its name in :data:`GRADERS` or as ``package.module:function``.

    Three kinds of function are taken, told apart by the names of their parameters: ``(response,
    row)``, verl's ``(data_source, solution_str, ground_truth, extra_info)`` and TRL's ``(prompts,
    completions, **columns)``. Besides a :class:`Verdict` they may return a number, a mapping with
    ``score``, or None for a response that they do not judge; TRL's return a list of one.

    Raises:
      ConfigError: an unknown name, a module that cannot be imported, or something that is not such
        a function.

    >>> load_grader("countdown").__name__
    'grade'
    """
    function = _import(GRADERS.get(name, name))
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"grader {name}: not a function") from error
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"grader {name}: async functions are not supported")
    if "solution_str" in parameters:
        return _from_verl(function, parameters)
    if "completions" in parameters:
        return _from_trl(function, parameters)
    if name in GRADERS:
        return function
    try:
        inspect.signature(function).bind("response", {})
    except TypeError:
        raise ConfigError(f"grader {name}: expected a function of (response, row)") from None
    return lambda response, row: as_verdict(function(response, row))


def _import(path: str) -> Callable[..., Any]:
    module_name, colon, attribute = path.partition(":")
    if not colon or not attribute:
        close = nearest(path, GRADERS)
        hint = f"; did you mean {close}?" if close else ""
        known = ", ".join(GRADERS)
        raise ConfigError(f"grader {path!r}: one of {known}, or package.module:function{hint}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"grader {path}: cannot import {module_name}: {error!r}") from error
    if attribute not in vars(module):
        raise ConfigError(f"grader {path}: {module_name} has no {attribute}")
    return vars(module)[attribute]


def _accepted(
    parameters: Mapping[str, inspect.Parameter], offered: Mapping[str, Any]
) -> dict[str, Any]:
    """The offered arguments that a function takes."""
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in parameters}


def _from_verl(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> Grader:
    def grade(response: str, row: Mapping[str, Any]) -> Verdict:
        truth = row["reward_model"]["ground_truth"]
        values = (row["data_source"], response, truth, row.get("extra_info", {}))
        offered: dict[str, Any] = dict(zip(VERL_ARGUMENTS, values, strict=True))
        return as_verdict(function(**_accepted(parameters, offered)))

    return grade


def _from_trl(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> Grader:
    """Each row is a batch of one: columns are lists of one value."""

    def grade(response: str, row: Mapping[str, Any]) -> Verdict:
        columns = {name: [value] for name, value in row.items() if name != "prompt"}
        columns.setdefault("ground_truth", [row["reward_model"]["ground_truth"]])
        # A prompt that was plain text has a plain completion; chat messages have a message.
        if row.get("extra_info", {}).get("prompt_format") == "text":
            pair = {"prompts": [row["prompt"][0]["content"]], "completions": [response]}
        else:
            message = {"role": "assistant", "content": response}
            pair = {"prompts": [row["prompt"]], "completions": [[message]]}
        scores = function(**_accepted(parameters, {**columns, **pair}))
        if len(scores) != 1:
            raise ValueError(f"the grader returned {len(scores)} scores for one response")
        return as_verdict(scores[0])

    return grade


def judge(grader: Grader, response: str, row: Mapping[str, Any]) -> Verdict:
    """Applies a grader to one response; whatever it raises becomes a verdict that says so."""
    try:
        return as_verdict(grader(response, row))
    except (Exception, SystemExit) as error:
        return Verdict.wrong(f"{RAISED} {type(error).__name__}: {error}")
