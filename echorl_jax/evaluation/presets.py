"""Settings of evaluations by name, and how often each row is tried."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from echorl_jax.errors import UserError

PRESETS: dict[str, dict[str, Any]] = {
    # The EchoRL authors' validation: temperature 0.6 and 8,192 tokens from their scripts (the
    # paper's section on settings agrees), 32 attempts at each of the few AIME and AMC problems,
    # one at the others, as in LUFFY, and the system prompt of LUFFY's evaluation files.
    "paper": {
        "temperature": 0.6,
        "top_p": 1.0,
        "max_new_tokens": 8192,
        "max_prompt_tokens": 1024,
        "samples": "aime*=32,amc*=32,1",
        "template": "luffy",
    },
}


def preset(name: str) -> Mapping[str, Any]:
    """The settings of a preset; none for an empty name.

    Raises:
      UserError: there is no such preset.
    """
    if name and name not in PRESETS:
        raise UserError(f"--preset={name}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name] if name else {}


def samples_of(spec: str, source: str) -> int:
    """Attempts at each row of a data source, by ``--samples``.

    Args:
      spec: a number, or ``PATTERN=number`` for some sources and a number for the others, with
        commas. The first pattern that fits counts; 1 where none does.
      source: the row's data source; upper and lower case are the same.

    Raises:
      UserError: not of that form.

    >>> [samples_of("aime*=32,4", source) for source in ("AIME25", "math")]
    [32, 4]
    """
    others, fitting = 1, None
    for part in spec.split(","):
        pattern, equals, number = part.strip().rpartition("=")
        if not (number.isdecimal() and int(number) >= 1) or (equals and not pattern):
            raise UserError(f"--samples={spec}: must be a number from 1 on, or PATTERN=number,...")
        if not equals:
            others = int(number)
        elif fitting is None and fnmatch.fnmatchcase(source.casefold(), pattern.casefold()):
            fitting = int(number)
    return others if fitting is None else fitting


@dataclasses.dataclass(frozen=True)
class Pass:
    """Rows that are tried in the same way."""

    samples: int
    temperature: float  # 0 is greedy
    places: tuple[int, ...]

    @property
    def attempts(self) -> int:
        return self.samples * len(self.places)


def passes(
    sources: Sequence[str], *, samples: str, temperature: float | None, greedy: bool
) -> list[Pass]:
    """The passes in order: the greedy pass if there is one, then by number of samples.

    Args:
      sources: the data source of each row.
      samples: as :func:`samples_of` takes it.
      temperature: of the samples; None is 0 where every row has one sample, else 0.6.
      greedy: try each row greedily too.

    Raises:
      UserError: several samples at temperature 0.
    """
    counts = [samples_of(samples, source) for source in sources]
    if temperature is None:
        temperature = 0.0 if max(counts) == 1 and not greedy else 0.6
    if temperature == 0 and max(counts) > 1:
        raise UserError(f"--samples={samples}: several samples need a --temperature above 0")
    every = tuple(range(len(sources)))
    if temperature == 0:
        return [Pass(1, 0.0, every)]
    sampled = [
        Pass(count, temperature, tuple(i for i in every if counts[i] == count))
        for count in sorted(set(counts))
    ]
    return [Pass(1, 0.0, every), *sampled] if greedy else sampled
