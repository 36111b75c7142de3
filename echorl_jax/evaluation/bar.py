"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from echorl_jax.parallel import is_first


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
        self._bar = Progress(*columns, TextColumn("{task.description}"), console=self.console)
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
