"""``echorl grade``: verdicts for the lines of a JSONL file."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from echorl_jax.errors import UserError, writing
from echorl_jax.files import parse_object, replacing
from echorl_jax.rewards import GraderPool, Verdict, grading_failed

# Lines graded together: progress is shown, and written, this often.
CHUNK = 512
# Fields that may hold the right answer; `evaluate` writes the second.
ANSWERS = ("answer", "ground_truth")
# Differences from another judge's verdicts that are printed.
SHOWN = 20


@dataclasses.dataclass
class _Tally:
    """Counts over the lines so far; with another judge's verdicts, how the two agree."""

    count: int = 0  # judged lines
    right: int = 0
    unjudged: int = 0  # lines for which the grader returned None
    ungraded: int = 0  # the grader failed on them; they count as wrong
    failure: str = ""  # the first such line and its reason
    accepted: int = 0  # of those the other judge calls right
    expected: int = 0  # what it calls right
    differing: list[str] = dataclasses.field(default_factory=list)

    def add(self, number: int, verdict: Verdict, expected: bool | None) -> None:
        if verdict.correct is None:
            self.unjudged += 1
            return
        self.count += 1
        self.right += verdict.correct
        if grading_failed(verdict.reason):
            self.ungraded += 1
            self.failure = self.failure or f"line {number}: {verdict.reason}"
        if expected is None:
            return
        self.expected += expected
        self.accepted += verdict.correct and expected
        if verdict.correct != expected:
            said = "right" if expected else "wrong"
            self.differing.append(f"line {number}: judged {said} before, now: {verdict.reason}")

    def summary(self, *, compared: bool) -> str:
        share = f" ({self.right / self.count:.1%})" if self.count else ""
        text = f"{self.right} of {self.count} correct{share}"
        if self.ungraded:
            text += (
                f"; {self.ungraded} could not be graded and count as wrong, "
                f"the first: {self.failure}"
            )
        if self.unjudged:
            text += f"; {self.unjudged} more not judged: the grader returned None"
        if not compared or not self.count:
            return text
        wrong = self.count - self.expected
        rejected = wrong - (self.right - self.accepted)
        more = len(self.differing) - SHOWN
        return "\n".join(
            [
                text,
                f"right ones accepted: {_share(self.accepted, self.expected)}; "
                f"wrong ones rejected: {_share(rejected, wrong)}",
                f"agreement: {_share(self.accepted + rejected, self.count)}; accepting everything "
                f"would get {_share(self.expected, self.count)}",
                *self.differing[:SHOWN],
                *([f"and {more} more"] if more > 0 else []),
            ]
        )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "0 of 0"


def grade_file(
    path: Path,
    *,
    out: Path | None,
    response_key: str,
    answer_key: str | None,
    grader: str,
    workers: int,
    timeout_s: float,
    verdict_key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    success_threshold: float | None = None,
) -> str:
    """Writes each object again with the fields of its verdict; returns the summary.

    A line that the grader does not judge has null for the first two and is in no count but its own.

    Args:
      path: JSON lines.
      out: where to; None is standard output.
      response_key, answer_key: fields with the generation and the right answer; without a key,
        the first of ``ANSWERS`` that a line has. A line with a ``reward_model`` keeps that.
      verdict_key: field with another judge's verdict, true or false; it is written as ``expected``
        and compared.
      grader, kwargs, success_threshold, workers, timeout_s: see ``GraderPool``.

    Raises:
      UserError: the file, or the first line that is not such an object.
    """
    for name, value, least in (("workers", workers, 0), ("timeout_s", timeout_s, 1e-3)):
        if value < least:
            raise UserError(f"--{name}={value}: must be at least {least}")
    if out is not None and out.exists() and path.exists() and out.samefile(path):
        raise UserError(f"--out={out} is the file that is graded")
    tally = _Tally()
    with (
        writing(out or Path("standard output")),
        GraderPool(
            grader,
            kwargs=kwargs,
            success_threshold=success_threshold,
            workers=workers,
            timeout_s=timeout_s,
        ) as pool,
        _opened(out) as target,
    ):
        for numbered in _chunks(path, response_key, answer_key, verdict_key):
            lines = [line for _, line in numbered]
            rows = [_row(line, answer_key) for line in lines]
            verdicts = pool.grade([line[response_key] for line in lines], rows)
            for (number, line), verdict in zip(numbered, verdicts, strict=True):
                expected = line[verdict_key] if verdict_key else None
                tally.add(number, verdict, expected)
                kept = {"expected": expected} if verdict_key else {}
                target.write(json.dumps({**line, **kept, **verdict.as_json()}) + "\n")
            if out is not None:
                print(f"\r{tally.count + tally.unjudged} graded", end="", file=sys.stderr)
    if out is not None:
        print(file=sys.stderr)
    return tally.summary(compared=verdict_key is not None)


def _opened(out: Path | None) -> contextlib.AbstractContextManager[TextIO]:
    """The output. A file that stands at ``out`` stays until all is graded.

    A pipe or a device is written to, and so is a link, such as /dev/stdout is.
    """
    if out is None:
        return contextlib.nullcontext(sys.stdout)
    plain = not out.is_symlink() and (out.is_file() or not out.exists())
    return replacing(out) if plain else out.open("w")


def _chunks(
    path: Path, response_key: str, answer_key: str | None, verdict_key: str | None
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Runs of lines, each with its number from 1 on."""
    chunk: list[tuple[int, dict[str, Any]]] = []
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark is no text
            for number, text in enumerate(file, start=1):
                if text.strip():
                    place = f"{path}, line {number}"
                    line = _parse(text, place, response_key, answer_key)
                    if verdict_key and not isinstance(line.get(verdict_key), bool):
                        raise UserError(f"{place}: {verdict_key!r} is neither true nor false")
                    chunk.append((number, line))
                if len(chunk) == CHUNK:
                    yield chunk
                    chunk = []
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error
    if chunk:
        yield chunk


def _parse(text: str, place: str, response_key: str, answer_key: str | None) -> dict[str, Any]:
    try:
        line = parse_object(text)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    if not isinstance(line.get(response_key), str):
        raise UserError(f"{place}: no text in {response_key!r}; it has {', '.join(line)}")
    keys = [answer_key] if answer_key else ANSWERS
    if not any(key in line for key in (*keys, "reward_model")):
        wanted = " or ".join(map(repr, keys))
        raise UserError(f"{place}: no {wanted}; it has {', '.join(line)}")
    return line


def _row(line: dict[str, Any], answer_key: str | None) -> dict[str, Any]:
    """The line as a row in verl's columns; a prompt that is a text becomes the user's message."""
    defaults: dict[str, Any] = {"data_source": "", "prompt": [], "extra_info": {}}
    if isinstance(text := line.get("prompt"), str):
        line = {**line, "prompt": [{"role": "user", "content": text}]}
        # TRL's reward functions then get the text again.
        defaults["extra_info"] = {"prompt_format": "text"}
    if "reward_model" in line:
        return {**defaults, **line}
    key = answer_key or next(key for key in ANSWERS if key in line)
    return {**defaults, **line, "reward_model": {"ground_truth": line[key]}}
