"""Shows how far a long study is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 15.0


class Counter:
    """Counts towards ``total`` on stderr.

    Used as a context manager; :meth:`add` is called as work is done.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> "Counter":
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._bar.start()
            self._bar.add_task(self._what, total=self._total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, count: int) -> None:
        """Says that ``count`` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
            return
        now = time.monotonic()
        if self._done >= self._total or now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            print(f"{self._what}: {self._done} of {self._total}", file=sys.stderr, flush=True)
