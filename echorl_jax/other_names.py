"""Names of settings and metrics in TRL, verl, OpenRLHF and Tunix, with ours."""

import csv
import functools
from pathlib import Path
from typing import NamedTuple

_TABLE = Path(__file__).parent / "assets" / "other_names.tsv"
PROJECTS = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF", "tunix": "Tunix"}


class OtherName(NamedTuple):
    """One line of the table."""

    project: str
    names: tuple[str, ...]
    # A key of the config, an option that begins with --, "metric KEY", or "" for what we have not.
    key: str
    note: str  # how the values differ, or why we have it not

    @property
    def meaning(self) -> str:
        """Our name and the note, in one line."""
        plain = self.key.startswith(("--", "metric "))
        ours = self.key if plain or not self.key else f"config.{self.key}"
        return ": ".join(filter(None, (ours or "not here", self.note)))


@functools.cache
def other_names() -> tuple[OtherName, ...]:
    """The table, in its order."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(
            OtherName(project, tuple(names.split(", ")), key, note)
            for project, names, key, note in csv.reader(file, delimiter="\t")
        )


def named_elsewhere(name: str) -> OtherName | None:
    """The setting that another project calls so: by its whole name or by the last words of it.

    >>> named_elsewhere("num_generations").meaning
    'config.rollout.group_size'
    >>> named_elsewhere("actor.ppo_epochs").project, named_elsewhere("epochs")
    ('verl', None)
    """
    name = name.lstrip("-")
    for line in other_names():
        if not line.key.startswith("metric ") and any(
            known == name or known.endswith(f".{name}") for known in line.names
        ):
            return line
    return None
