"""The file of an evaluation: one line per attempt, so that a killed evaluation can go on."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from echorl_jax.errors import UserError, writing
from echorl_jax.files import parse_object, read_json, replace_json
from echorl_jax.rewards.loading import clean_metrics

# Of each weight file so much is read, at both ends, to tell one model from another.
FINGERPRINT_BYTES = 1 << 20
# The time of the first start, which chat templates may write into prompts.
STARTED = "started"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The fields of an attempt that scores depend on."""

    data_source: str
    problem: int
    greedy: bool
    correct: bool | None  # None: not judged
    reason: str
    tokens: int
    truncated: bool
    metrics: dict
    final_answer: str | None = None


def first_start(out: Path) -> str:
    """The time at which the evaluation in ``out`` began; now if no file has it."""
    try:
        options = read_json(out / "options.json")
        return datetime.fromisoformat(options[STARTED]).isoformat()
    except (OSError, ValueError, TypeError, LookupError):  # claim() judges the file
        return datetime.now().isoformat(timespec="seconds")


def claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Makes ``out`` the place of one evaluation: writes ``options.json``, or compares with it.

    Raises:
      UserError: it holds another evaluation (names the first option that differs) or other files,
        or cannot be written.
    """
    file, known = out / "options.json", json.loads(json.dumps(identity))
    try:
        if not file.exists():
            if (out / "generations.jsonl").exists():
                raise UserError(
                    f"{out}: generations.jsonl without options.json; take another --out"
                )
            with writing(out):
                replace_json(file, known)
            return
        before = read_json(file)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from error
    for name in {**before, **known}:
        if name != STARTED and before.get(name) != known.get(name):
            raise UserError(
                f"{out} holds an evaluation with {name} = {before.get(name)!r}, "
                f"not {known.get(name)!r}; take another --out or the same options"
            )


def read_outcomes(path: Path, expected: Sequence[tuple[int, int, bool]]) -> Iterator[Outcome]:
    """The attempts of a file of whole lines.

    Args:
      expected: (problem, sample, greedy) of each line, in order; more than there are lines.

    Raises:
      UserError: the first line that is another attempt, or none.
    """
    with path.open("rb") as file:
        for number, (text, wanted) in enumerate(zip(file, expected, strict=False), start=1):
            try:
                line = {"metrics": {}, "final_answer": None, **parse_object(text)}
                found = (line["problem"], line["sample"], line["greedy"])
                fields = dataclasses.fields(Outcome)
                outcome = Outcome(**{field.name: line[field.name] for field in fields})
                for field in fields:
                    kinds = get_args(field.type) or (field.type,)
                    if type(getattr(outcome, field.name)) not in kinds:
                        raise TypeError(f"{field.name} = {getattr(outcome, field.name)!r}")
                if clean_metrics(outcome.metrics) != outcome.metrics:
                    raise TypeError(f"metrics = {outcome.metrics!r}")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: not an attempt ({error!r})") from error
            if found != wanted:
                raise UserError(f"{path}, line {number}: attempt {found}, expected {wanted}")
            yield outcome


def fingerprint(model: Path) -> str | None:
    """Tells models apart by their config and the ends of their weight files; None if not here."""
    if not model.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([model / "config.json", *model.glob("*.safetensors")]):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as content:
                digest.update(content.read(FINGERPRINT_BYTES))
                content.seek(max(0, size - FINGERPRINT_BYTES))
                digest.update(content.read())
    return digest.hexdigest()


def digest_rows(prompts: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Tells sets of rows apart by prompts (token ids), ground truths and sources."""
    digest = hashlib.blake2b(digest_size=16)
    for ids, row in zip(prompts, rows, strict=True):
        truth = row["reward_model"]["ground_truth"]
        content = [list(ids), row["data_source"], truth]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()
