"""``echorl grade``: verdicts for the lines of a JSONL file."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echorl_jax.errors import UserError
from echorl_jax.rewards import GraderPool

# Lines graded together: progress is shown, and written, this often.
CHUNK = 512


def grade_file(
    path: Path,
    *,
    out: Path | None,
    response_key: str,
    answer_key: str,
    grader: str,
    workers: int,
    timeout_s: float,
) -> str:
    """Writes each object again with ``correct``, ``score`` and ``reason``; returns the summary.

    Args:
      path: JSON lines.
      out: where to; None is standard output.
      response_key, answer_key: fields with the generation and the right answer. A line that has a
        ``reward_model`` already keeps it.

    Raises:
      UserError: the file, or the first line that is not such an object.
    """
    count = right = 0
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(GraderPool(grader, workers=workers, timeout_s=timeout_s))
        target = sys.stdout if out is None else stack.enter_context(out.open("w"))
        for lines in _chunks(path, response_key, answer_key):
            rows = [_row(line, answer_key) for line in lines]
            verdicts = pool.grade([line[response_key] for line in lines], rows)
            for line, verdict in zip(lines, verdicts, strict=True):
                target.write(json.dumps({**line, **vars(verdict)}) + "\n")
            count += len(lines)
            right += sum(verdict.correct for verdict in verdicts)
            if out is not None:
                print(f"\r{count} graded", end="", file=sys.stderr)
    share = f" ({right / count:.1%})" if count else ""
    if out is not None:
        print(file=sys.stderr)
    return f"{right} of {count} correct{share}"


def _chunks(path: Path, response_key: str, answer_key: str) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    chunk.append(_parse(text, f"{path}, line {number}", response_key, answer_key))
                if len(chunk) == CHUNK:
                    yield chunk
                    chunk = []
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error
    if chunk:
        yield chunk


def _parse(text: str, place: str, response_key: str, answer_key: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg})") from error
    if not isinstance(line, dict):
        raise UserError(f"{place}: an object was expected")
    if not isinstance(line.get(response_key), str):
        raise UserError(f"{place}: no text in {response_key!r}; it has {', '.join(line)}")
    if answer_key not in line and "reward_model" not in line:
        raise UserError(f"{place}: no {answer_key!r}; it has {', '.join(line)}")
    return line


def _row(line: dict[str, Any], answer_key: str) -> dict[str, Any]:
    """The line as a row in verl's columns."""
    defaults = {"data_source": "", "prompt": [], "extra_info": {}}
    if "reward_model" in line:
        return {**defaults, **line}
    return {**defaults, **line, "reward_model": {"ground_truth": line[answer_key]}}
