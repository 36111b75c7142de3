"""Verdicts, and graders by name or written for other libraries, alone or as a weighted list."""

import collections
import dataclasses
import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from echorl_jax.config import ConfigError
from echorl_jax.custom import accepted, load_custom
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
    and enter no loss. ``answer`` is what the response answers, in one spelling, for majority votes;
    None where it answers nothing, or nothing that several responses could have in common.
    """

    score: float | None
    correct: bool | None
    reason: str
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    answer: str | None = dataclasses.field(default=None, repr=False, compare=False)

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
        """The fields for a line of JSON; ``metrics`` and the answer only where there are some."""
        fields = {"score": self.score, "correct": self.correct, "reason": self.reason}
        if self.metrics:
            fields["metrics"] = dict(self.metrics)
        # "answer" is the right answer in files to be graded.
        return fields if self.answer is None else {**fields, "final_answer": self.answer}


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
    correctness, ``metrics`` and ``answer``. None, as the result or as its score, leaves the
    response without a verdict.

    Raises:
      TypeError: anything else.
      ValueError: a score that is not finite.

    >>> as_verdict({"score": -1.0, "acc": False})
    Verdict(score=-1.0, correct=False, reason='scored -1', metrics={})
    """
    if isinstance(result, Verdict):
        given, correct, reason = result.score, result.correct, clean_reason(result.reason)
        metrics, answer = clean_metrics(result.metrics), result.answer
    else:
        known: Any = result if isinstance(result, Mapping) else {}
        given, correct, reason = known.get("score", result), known.get("acc"), None
        metrics, answer = clean_metrics(known.get("metrics", {})), known.get("answer")
    answer = None if answer is None else clean_reason(str(answer))
    if given is None:
        return Verdict(None, None, "not judged" if reason is None else reason, metrics, answer)
    score = _number(given)
    if not math.isfinite(score):
        raise ValueError(f"the grader's score is {score}")
    right = score >= CORRECT_SCORE if correct is None else bool(correct)
    return Verdict(score, right, f"scored {score:g}" if reason is None else reason, metrics, answer)


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


def metric_values(verdicts: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """The values of each metric in the verdicts that have it, by name, in the names' order.

    >>> metric_values([{"steps": 3.0}, {"steps": 5.0, "share": 0.5}, {}])
    {'share': [0.5], 'steps': [3.0, 5.0]}
    """
    values: dict[str, list[float]] = {}
    for name, value in itertools.chain.from_iterable(each.items() for each in verdicts):
        values.setdefault(name, []).append(value)
    return dict(sorted(values.items()))


def mean_metrics(verdicts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the verdicts that have it, by name.

    >>> mean_metrics([{"steps": 3.0}, {"steps": 5.0, "share": 0.5}, {}])
    {'share': 0.5, 'steps': 4.0}
    """
    return {name: math.fsum(each) / len(each) for name, each in metric_values(verdicts).items()}


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
    "format": "echorl_jax.rewards.format:grade",
    "math": "echorl_jax.rewards.mathematics:grade",
    "reduce": "echorl_jax.rewards.reduce:grade",
    "shapes": "echorl_jax.rewards.shapes:grade",
}
# Graders whose costs are linear in the length of a response, as tests show: they may run in the
# training process. math-verify may not, and neither may a user's grader.
BOUNDED = ("choice", "countdown", "format", "reduce", "shapes")
# Arguments of verl's reward functions.
VERL_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


# The verdicts on responses to one row, whose tokens may be given.
Tokens = Sequence[Sequence[int]]
Judges = Callable[[Sequence[str], Mapping[str, Any], Tokens | None], list[Verdict]]


class Entry(NamedTuple):
    """One grader of a list."""

    path: str  # a name in GRADERS, package.module:function, or FILE.py:function
    name: str  # in metrics
    weight: float
    decides: bool  # its verdict says whether a response is a success


def parse_graders(spec: str) -> tuple[Entry, ...]:
    """Reads a list of graders: ``[*]GRADER[@WEIGHT], ...``.

    The weight is 1 unless given. A star marks the entry whose verdict counts as success, else it is
    the first; of several marked ones it is the first that judges the response.

    Raises:
      ConfigError: an entry that is empty or there twice, or a weight that is no finite number.

    >>> for entry in parse_graders("rules.py:format@0.2, *math"):
    ...     print(entry.name, entry.weight, entry.decides)
    format 0.2 False
    math 1.0 True
    """
    texts = [text.strip() for text in spec.split(",")]
    starred = any(text.startswith("*") for text in texts)
    entries = []
    for text in texts:
        path, at, weight = text.removeprefix("*").strip().partition("@")
        number = _finite_text(weight) if at else 1.0
        if not path or number is None:
            raise ConfigError(
                f"grader {spec!r}: {text!r} is not GRADER or GRADER@WEIGHT, with a finite weight"
            )
        path = path.strip()
        decides = text.startswith("*") if starred else not entries
        entries.append(Entry(path, path.rpartition(":")[2], number, decides))
    names = collections.Counter(entry.name for entry in entries)
    entries = [
        entry._replace(name=_metric_name(entry.path if names[entry.name] > 1 else entry.name))
        for entry in entries
    ]
    if len({entry.name for entry in entries}) < len(entries):
        raise ConfigError(f"grader {spec!r}: two entries are the same")
    if len(entries) > MAX_METRICS:
        raise ConfigError(f"grader {spec!r}: at most {MAX_METRICS} entries")
    return tuple(entries)


def _finite_text(text: str) -> float | None:
    try:
        return _finite(float(text))
    except ValueError:
        return None


def _metric_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", ".", text.replace(".py:", "."))[-40:].lstrip(".")


class LoadedGrader:
    """A list of graders as one: the score is the weighted sum of the scores.

    An entry that returns None adds nothing. A response that no deciding entry judges has no
    verdict, and one on which an entry fails is wrong. Of several entries each score is a metric.

    Args:
      entries: the list.
      judges: the function of each entry.
      success_threshold: scores of deciding entries from here on are successes; None takes their
        verdicts.
      grouped: whether an entry takes the responses of a whole group.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        judges: Sequence[Judges],
        success_threshold: float | None = None,
        *,
        grouped: bool = False,
    ) -> None:
        self.entries = entries
        self.grouped = grouped
        self._judges = judges
        self._success_threshold = success_threshold

    def __call__(self, response: str, row: Mapping[str, Any]) -> Verdict:
        """The verdict on one response."""
        return self.judge_all([response], row)[0]

    def judge_all(
        self, responses: Sequence[str], row: Mapping[str, Any], tokens: Tokens | None = None
    ) -> list[Verdict]:
        """The verdicts on several responses to one row, such as a whole group.

        Args:
          tokens: of each response, for functions that take ``completion_ids``.
        """
        found = [judges(responses, row, tokens) for judges in self._judges]
        return [self._sum(verdicts) for verdicts in zip(*found, strict=True)]

    def _sum(self, verdicts: Sequence[Verdict]) -> Verdict:
        failed = next((v for v in verdicts if grading_failed(v.reason)), None)
        if failed is not None:
            return failed
        pairs = list(zip(self.entries, verdicts, strict=True))
        scores = {
            entry.name: verdict.score for entry, verdict in pairs if verdict.score is not None
        }
        # The scores come first: the last of too many metrics are dropped.
        metrics: dict[str, float] = dict(scores) if len(pairs) > 1 else {}
        for name, value in itertools.chain(*(verdict.metrics.items() for verdict in verdicts)):
            metrics.setdefault(name, value)
        texts = [f"{entry.name}: {verdict.reason}" for entry, verdict in pairs]
        reason = "; ".join(texts) if len(pairs) > 1 else verdicts[0].reason
        deciding = [(e.name, v) for e, v in pairs if e.decides and e.name in scores]
        if not deciding:
            return as_verdict(Verdict(None, None, reason, metrics))
        (name, verdict), least = deciding[0], self._success_threshold
        right = verdict.correct if least is None else scores[name] >= least
        terms = [entry.weight * scores.get(entry.name, 0.0) for entry in self.entries]
        return _guarded(lambda: Verdict(sum(terms), right, reason, metrics, verdict.answer))


def load_grader(
    spec: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    success_threshold: float | None = None,
) -> LoadedGrader:
    """Loads a grader, or a list of them with weights (:func:`parse_graders`).

    Each is a name in :data:`GRADERS`, ``package.module:function`` or ``FILE.py:function``. Three
    kinds of function are taken, told apart by the names of their parameters: ``(response, row)``,
    verl's ``(data_source, solution_str, ground_truth, extra_info)`` and TRL's ``(prompts,
    completions, completion_ids, **columns)``, with lists over a whole group. They may be async.
    Besides a :class:`Verdict` they may return a number, a mapping with ``score``, or None for a
    response that they do not judge; TRL's return a list of these.

    Args:
      kwargs: arguments by keyword; each function gets those that it has parameters for.
      success_threshold: see :class:`LoadedGrader`.

    Raises:
      ConfigError: an unknown name, a module that cannot be imported, something that is not such a
        function, or an argument that no function takes.

    >>> row = {"reward_model": {"ground_truth": {"numbers": [2, 3], "target": 6}}}
    >>> load_grader("countdown@2")("2*3=6", row).score
    2.0
    """
    entries, offered = parse_graders(spec), dict(kwargs or {})
    functions = [_function(entry.path) for entry in entries]
    taken = [accepted(inspect.signature(each).parameters, offered) for each in functions]
    if unused := offered.keys() - set(itertools.chain(*taken)):
        raise ConfigError(f"grader {spec}: no function takes the argument {min(unused)!r}")
    judges = [
        _judges(entry.path, function, given)
        for entry, function, given in zip(entries, functions, taken, strict=True)
    ]
    grouped = any("completions" in inspect.signature(each).parameters for each in functions)
    return LoadedGrader(entries, judges, success_threshold, grouped=grouped)


def _function(path: str) -> Callable[..., Any]:
    """The function at a path; an async one is run to its end."""
    if ":" not in path and path not in GRADERS:
        close = nearest(path, GRADERS)
        hint = f"; did you mean {close}?" if close else ""
        known = ", ".join(GRADERS)
        raise ConfigError(
            f"grader {path!r}: one of {known}, package.module:function or FILE.py:function{hint}"
        )
    function = load_custom(GRADERS.get(path, path), "grader")
    try:
        inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"grader {path}: not a function") from error
    if not inspect.iscoroutinefunction(function):
        return function

    @functools.wraps(function)
    def wait(*args: Any, **kwargs: Any) -> Any:
        return _event_loop().run(function(*args, **kwargs))

    return wait


@functools.cache
def _event_loop() -> Any:
    """One loop for all calls, since clients of servers stay bound to a loop."""
    import asyncio  # few graders need it

    return asyncio.Runner()


def _judges(path: str, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Judges:
    parameters = inspect.signature(function).parameters
    if "completions" in parameters:
        return _from_trl(function, kwargs)
    if "solution_str" in parameters:
        one = _from_verl(functools.partial(function, **kwargs))
    else:
        one = functools.partial(function, **kwargs)
        try:
            inspect.signature(one).bind("response", {})
        except TypeError:
            raise ConfigError(f"grader {path}: expected a function of (response, row)") from None
    return lambda responses, row, _: [judge(one, response, row) for response in responses]


def _from_verl(function: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters

    def grade(response: str, row: Mapping[str, Any]) -> Any:
        truth = row["reward_model"]["ground_truth"]
        values = (row["data_source"], response, truth, row.get("extra_info", {}))
        return function(**accepted(parameters, dict(zip(VERL_ARGUMENTS, values, strict=True))))

    return grade


def _from_trl(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Judges:
    """A group is a batch: columns are lists of the row's value, once for each response."""
    parameters = inspect.signature(function).parameters

    def scores(responses: Sequence[str], row: Mapping[str, Any], tokens: Tokens | None) -> list:
        count = len(responses)
        columns = {name: [value] * count for name, value in row.items() if name != "prompt"}
        columns.setdefault("ground_truth", [row["reward_model"]["ground_truth"]] * count)
        if tokens is not None:
            columns["completion_ids"] = [list(ids) for ids in tokens]
        # A prompt that was plain text has a plain completion; chat messages have a message.
        if row.get("extra_info", {}).get("prompt_format") == "text":
            columns["prompts"] = [row["prompt"][0]["content"]] * count
            columns["completions"] = list(responses)
        else:
            columns["prompts"] = [row["prompt"]] * count
            columns["completions"] = [[{"role": "assistant", "content": r}] for r in responses]
        found = list(function(**{**accepted(parameters, columns), **kwargs}))
        if len(found) != count:
            raise ValueError(f"the grader returned {len(found)} scores for {count} response(s)")
        return found

    def grade(
        responses: Sequence[str], row: Mapping[str, Any], tokens: Tokens | None
    ) -> list[Verdict]:
        try:
            found = scores(responses, row, tokens)
        except (Exception, SystemExit) as error:
            return [_failure(error)] * len(responses)
        return [_guarded(lambda score=score: score) for score in found]

    return grade


def judge(grader: Callable[..., Any], response: str, row: Mapping[str, Any]) -> Verdict:
    """Applies a grader to one response; whatever it raises becomes a verdict that says so."""
    return _guarded(lambda: grader(response, row))


def _guarded(work: Callable[[], Any]) -> Verdict:
    try:
        return as_verdict(work())
    except (Exception, SystemExit) as error:
        return _failure(error)


def _failure(error: BaseException) -> Verdict:
    return Verdict.wrong(f"{RAISED} {type(error).__name__}: {error}")
