"""The errors that a command prints as one line, and any other in one line."""

import difflib
import errno
import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

# Characters of an error in one line.
MOST = 300
# Reasons of the system why a file cannot be written; libraries repeat them in their own errors.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


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
    return plain_line(f"{type(error).__name__}: {error}", most=MOST)


def plain_line(text: str, *, most: int = 1000) -> str:
    """A text from elsewhere as one line: no line breaks and control characters, bounded length.

    >>> plain_line("no\\n  \\x1b[2Jroom")
    'no [2Jroom'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:most]


def storage_reason(error: BaseException) -> str | None:
    """The reason why a file could not be read or written, if the error comes from that.

    Searches the causes of the error too, because libraries wrap a full disk in other errors.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror} ({cause.filename})" if cause.filename else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return next((reason for reason in map(os.strerror, STORAGE) if reason in str(error)), None)


def require_package(module: str, requirement: str, wanted_by: str) -> ModuleType:
    """Imports a package that a plain installation does not have.

    Raises:
      UserError: it is not installed; with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{wanted_by} needs a package: pip install '{requirement}'") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names ``path`` where a write fails without naming a file, as on a full disk.

    Raises:
      RunStopped: storage has failed.
    """
    try:
        yield
    except Exception as error:  # an OSError, or what a library makes of one
        reason = storage_reason(error)
        if isinstance(error, RunStopped | UserError) or reason not in [*map(os.strerror, STORAGE)]:
            raise
        raise RunStopped(f"{path} cannot be written: {reason}") from error


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that a mistyped one may have meant, if one is at least so similar.

    >>> nearest("tarin", ["sft", "train"])
    'train'
    """
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)
