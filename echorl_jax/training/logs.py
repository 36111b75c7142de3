"""The log of a run: metrics.jsonl, TensorBoard, trackers, and progress on stderr."""

import functools
import json
import math
import os
import sys
import time
from asyncio import base_events
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.table import Table

from echorl_jax.evaluation.progress import Bar
from echorl_jax.files import read_steps, replace_text
from echorl_jax.parallel import is_first
from echorl_jax.training.trackers import Sender

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


# Seconds between flushes of TensorBoard events: on a bucket, each flush uploads the file again.
EVENTS_EVERY_S = 60.0


class RunLog:
    """Appends one JSON object per step and shows progress; only the first process does so."""

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        total_steps: int,
        tensorboard: bool,
        senders: Sequence[Sender] = (),
    ):
        writes = is_first()
        self._path = path = workdir / "metrics.jsonl"
        self._lines = path.read_text().count("\n") if writes and path.exists() else 0
        self._file = path.open("a") if writes else None
        events = tensorboard and writes
        self._events = _Events(workdir / "tensorboard", first_step) if events else None
        self._total = total_steps
        self._bar = Bar("step", total_steps, at_once=True)
        self._senders = senders
        for sender in senders:
            sender.send()

    def __enter__(self) -> "RunLog":
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.__exit__()
        for file in filter(None, (self._events, self._file)):
            try:
                file.close()
            except OSError:
                if kind is None:  # else the first error is the one to report
                    raise

    def write(self, metrics: dict[str, float]) -> None:
        """Records the step ``metrics["step"]``; a value that is not finite becomes null."""
        if self._file is None:
            return
        step = int(metrics["step"])
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({**values, "step": step}) + "\n")
        self._file.flush()
        self._lines += 1
        self._publish(values, metrics, shown=metrics)

    def lacks(self, key: str) -> bool:
        """True if the last line has no such key; False without a line or on another process."""
        lines = list(read_steps(self._path)) if self._file is not None else []
        return bool(lines) and key not in lines[-1]

    def amend(self, metrics: dict[str, float]) -> None:
        """Adds metrics to the last line, and to what is shown of its step."""
        if self._file is None:
            return
        *lines, last = read_steps(self._path)
        self._file.close()
        line = {**last, **metrics}
        replace_text(self._path, "".join(json.dumps(one) + "\n" for one in [*lines, line]))
        self._file = self._path.open("a")
        known = {name: value for name, value in last.items() if value is not None}
        self._publish(line, metrics, shown={**known, **metrics})

    def secure(self) -> int:
        """Waits until all lines are on the disk; returns their number, 0 on other processes."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return self._lines

    def say(self, text: str) -> None:
        """Prints one line, above the progress bar where there is one."""
        self._bar.say(text)

    def present(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Shows the settings of a run at its start: a table on a terminal, lines in a log."""
        if self._bar.drawn:
            table = Table(title=title, show_header=False, title_justify="left")
            for row in rows:
                table.add_row(*row)
            self._bar.console.print(table)
        else:
            self.say("\n".join([title, *(f"  {name:<9} {text}" for name, text in rows)]))

    def _publish(
        self, line: dict[str, Any], new: dict[str, float], *, shown: dict[str, float]
    ) -> None:
        """Sends a step's new metrics to TensorBoard and to the trackers, and shows all of them."""
        step = int(line["step"])
        if self._events:
            self._events.write(new, step)
        for sender in self._senders:
            sender.send({**line, "step": step})
        self._show(step, shown)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        summary = "  ".join(_summary(metrics))
        line = f"step {step}/{self._total}  {summary}"
        evaluated = any(name.startswith("eval/") for name in metrics)
        self._bar.show(step, line, beside=summary, now=evaluated or step == self._total)
        if evaluated and self._bar.drawn:
            self.say(line)  # remains when the bar shows the next step


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds spent inside to ``times[name]``; a profile shows the span by its name."""
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation(name):
        yield
    times[name] = times.get(name, 0.0) + time.perf_counter() - start


class _Events:
    """Writes TensorBoard events in the caller's thread, so that a full disk raises there.

    tensorboardX's ``SummaryWriter`` writes in another thread. A full disk ends that thread with a
    traceback, and the caller waits forever once its queue is full.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        directory.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = Event, scalar
        self._writer = EventsWriter(str(directory / "events"))
        # TensorBoard hides earlier events of the steps from here on, which a resumed run repeats.
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(session_log=start, step=first_step + 1))
        self._flush()

    def write(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            if name != "step":
                summary = self._scalar(name, value)
                self._writer.write_event(
                    self._event(wall_time=time.time(), step=step, summary=summary)
                )
        if time.monotonic() - self._flushed > EVENTS_EVERY_S:
            self._flush()

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _summary(metrics: dict[str, float]) -> Iterator[str]:
    shown = {
        "reward/mean": "reward",
        "group/all_success_fraction": "all right",
        "group/all_failure_fraction": "all wrong",
        "echo/clips": "clips",
        "entropy/token_mean": "entropy",
        "completion/length_mean": "length",
    }
    for name, label in shown.items():
        if name in metrics:
            yield f"{label} {metrics[name]:.3g}"
    if "reward/mean" not in metrics and "loss/total" in metrics:
        yield f"loss {metrics['loss/total']:.3g}"
    for name, value in metrics.items():
        if name.startswith("eval/") and "/pass@" in name:
            yield f"{name} {value:.3f}"


@functools.cache
def hide_closed_loop_errors() -> None:
    """Hides the tracebacks that follow the error of a failed checkpoint; installs the hook once.

    When one array's write fails, Orbax raises that error and closes its event loop. TensorStore
    is still writing other arrays. As each of them ends, a C++ thread reports it to the closed loop,
    and Python prints a traceback of "Event loop is closed".
    """
    before = sys.unraisablehook

    def report(error: "UnraisableHookArgs") -> None:
        if not is_closed_loop_error(error):
            before(error)

    sys.unraisablehook = report


def is_closed_loop_error(error: "UnraisableHookArgs") -> bool:
    """True if code outside Python reported the end of its work to a closed event loop."""
    first = error.exc_traceback
    return (
        isinstance(error.exc_value, RuntimeError)
        and str(error.exc_value) == "Event loop is closed"
        and error.object is None
        and first is not None
        and first.tb_frame.f_code is base_events.BaseEventLoop.call_soon_threadsafe.__code__
    )
