"""The errors that a command prints as one line, and any other in one line."""

import difflib
from collections.abc import Iterable

# Characters of an error in one line.
MOST = 300


class UserError(ValueError):
    """A wrong option, file or row: the user's to mend. Exit code 2."""


class RunStopped(RuntimeError):
    """A run that cannot go on as it is; its last checkpoint stays. Exit code 1."""


def one_line(error: BaseException) -> str:
    """Type and text of an error without line breaks, of at most ``MOST`` characters.

    >>> one_line(KeyError("a\\nb"))
    "KeyError: 'a\\\\nb'"
    >>> one_line(OSError("no\\n  room"))
    'OSError: no room'
    """
    return " ".join(f"{type(error).__name__}: {error}".split())[:MOST]


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that a mistyped one may have meant, if one is at least so similar.

    >>> nearest("tarin", ["sft", "train"])
    'train'
    """
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)
