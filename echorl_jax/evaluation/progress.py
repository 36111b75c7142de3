"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from echorl_jax.parallel import is_first
from echorl_jax.rollout import Progress


class Bar:
    """Counts towards ``total`` on stderr; silent but on the first process. A context manager.

    Args:
      what: is counted.
      total: how many there are.
      done: how many of them there are at the beginning.
      every_s: seconds between two lines where there is no bar.
      at_once: the first line does not wait so long.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        done: int = 0,
        every_s: float = 30.0,
        at_once: bool = False,
    ) -> None:
        self.console = Console(file=sys.stderr, quiet=not is_first())
        self.drawn = self.console.is_terminal and is_first()
        columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._bar = RichProgress(*columns, TextColumn("{task.description}"), console=self.console)
        self._task = self._bar.add_task("", total=total, completed=done)
        self._every_s = every_s
        self._last_line = -math.inf if at_once else time.monotonic()

    def __enter__(self) -> "Bar":
        if self.drawn:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.drawn:
            self._bar.stop()

    def show(self, done: int, line: str, *, beside: str = "", now: bool = False) -> None:
        """Moves the bar; where there is none, prints a line if it is time.

        Args:
          done: of the total.
          line: is printed.
          beside: stands beside the bar.
          now: it is time, whenever the last line was.
        """
        if self.drawn:
            self._bar.update(self._task, completed=done, description=beside)
        elif now or time.monotonic() - self._last_line >= self._every_s:
            self._last_line = time.monotonic()
            self.say(line)

    def say(self, text: str) -> None:
        """Prints one line, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class EvaluationProgress:
    """Counts attempts and shows the sampler's speed and the share of its slots that are busy."""

    def __init__(self, total: int, *, done: int) -> None:
        self._total, self._done, self._first = total, done, done
        self._bar = Bar("attempts", total, done=done)
        self._sampler = ""
        self._source = ""
        self._finished_tokens, self._finished_seconds = 0, 0.0
        self._last: Progress | None = None

    def __enter__(self) -> "EvaluationProgress":
        if self._done:
            self._bar.say(f"{self._done} of {self._total} attempts are there already")
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()
        self._settle()
        speed = self._finished_tokens / max(self._finished_seconds, 1e-9)
        self._bar.say(
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
        line = f"{self._done} of {self._total} attempts  {text}"
        self._bar.show(self._done, line, beside=text)
