"""Errors that are hidden after a write that failed, and errors that are not."""

import asyncio
import sys
from types import TracebackType
from typing import Any

import pytest

from echorl_jax.training.logs import hide_closed_loop_errors, is_closed_loop_error


def raised(*, by_python: bool) -> tuple[RuntimeError, TracebackType]:
    """The error of a real closed loop; its traceback with or without the Python that called it."""
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as caught:
        loop.call_soon_threadsafe(print)
    traceback = caught.value.__traceback__
    assert traceback is not None and traceback.tb_next is not None
    return caught.value, traceback if by_python else traceback.tb_next


class Clumsy:
    def __del__(self) -> None:
        raise OSError("in a finalizer")


def test_only_late_writes_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    hide_closed_loop_errors.cache_clear()
    hide_closed_loop_errors()
    Clumsy()
    assert isinstance(seen[0].exc_value, OSError)

    def unraisable(error: Exception, traceback: TracebackType, of: object = None) -> Any:
        return type(seen[0])((type(error), error, traceback, None, of))

    error, traceback = raised(by_python=False)
    late = unraisable(error, traceback)
    others = [
        unraisable(RuntimeError("another"), traceback),
        unraisable(error, traceback, of="a finalizer"),
        unraisable(*raised(by_python=True)),
        unraisable(ValueError("Event loop is closed"), traceback),
    ]
    assert is_closed_loop_error(late)
    for report in (late, *others):
        sys.unraisablehook(report)
    assert seen[1:] == others
    hide_closed_loop_errors.cache_clear()
