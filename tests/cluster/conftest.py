"""Processes that a test leaves behind are ended."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.several import Run


@pytest.fixture
def run() -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(**settings: Any) -> Run:
        made.append(Run(**settings))
        return made[-1]

    yield make
    for each in made:
        for process in each.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
