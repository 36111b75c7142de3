"""How far an evaluation is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from echorl_jax.parallel import is_first
from echorl_jax.rollout import Progress

LINE_EVERY_SECONDS = 30.0


class EvaluationProgress:
    """Counts attempts and shows the sampler's speed and the share of its slots that are busy."""

    def __init__(self, total: int, *, done: int) -> None:
        self._total, self._done, self._first = total, done, done
        self._console = Console(file=sys.stderr, quiet=not is_first())
        self._bar: Bar | None = None
        self._task = None
        self._sampler = ""
        self._source = ""
        self._finished_tokens, self._finished_seconds = 0, 0.0
        self._last: Progress | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> "EvaluationProgress":
        if self._done:
            self._say(f"{self._done} of {self._total} attempts are there already")
        if self._console.is_terminal:
            columns = (TextColumn("attempts"), MofNCompleteColumn(), BarColumn())
            text = TextColumn("{task.description}")
            self._bar = Bar(*columns, TimeRemainingColumn(), text, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._done)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        self._settle()
        speed = self._finished_tokens / max(self._finished_seconds, 1e-9)
        self._say(
            f"{self._done - self._first} attempts, {self._finished_tokens:,} tokens "
            f"at {speed:,.0f} tokens/s"
        )

    def look(self, now: Progress) -> None:
        """Shows how far the sampler's present call is."""
        self._last = now
        self._sampler = (
            f"{now.rows_done} of {now.rows} rows of this call, "
            f"{now.tokens_per_second:,.0f} tokens/s, slots {now.occupancy:.0%} busy"
        )
        self._show()
        if now.rows_done == now.rows:
            self._settle()

    def attempt(self, source: str) -> None:
        """One more is graded and written."""
        self._done += 1
        self._source = source
        self._show()

    def _settle(self) -> None:
        if self._last is not None:
            self._finished_tokens += self._last.tokens
            self._finished_seconds += self._last.seconds
            self._last = None

    def _show(self) -> None:
        text = f"{self._source}  {self._sampler}".strip()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, description=text)
        elif time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self._say(f"{self._done} of {self._total} attempts  {text}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
