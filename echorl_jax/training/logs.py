"""What a run writes while it runs: metrics.jsonl, TensorBoard events, a progress bar or lines."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 30.0


class RunLog:
    """Appends one JSON object per step and shows how the run goes."""

    def __init__(self, workdir: Path, *, first_step: int, total_steps: int, tensorboard: bool):
        self._file = (workdir / "metrics.jsonl").open("a")
        self._events = _open_events(workdir / "tensorboard", first_step) if tensorboard else None
        self._total = total_steps
        self._console = Console(file=sys.stderr)
        self._progress: Progress | None = None
        self._task = None
        self._last_line = -math.inf

    def __enter__(self) -> "RunLog":
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        if self._events:
            self._events.close()
        self._file.close()

    def write(self, metrics: dict[str, float]) -> None:
        """Records one step; ``metrics["step"]`` says which. A value that is no number is null."""
        step = int(metrics["step"])
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({**values, "step": step}) + "\n")
        self._file.flush()
        if self._events:
            for name, value in metrics.items():
                if name != "step":
                    self._events.add_scalar(name, value, step)
        self._show(step, metrics)

    def say(self, text: str) -> None:
        """Prints one line, above the progress bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        summary = "  ".join(_summary(metrics))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, description=summary)
        now = time.monotonic()
        evaluated = any(name.startswith("eval/") for name in metrics)
        due = now - self._last_line >= LINE_EVERY_SECONDS
        if evaluated or (self._progress is None and (due or step == self._total)):
            self._last_line = now
            self.say(f"step {step}/{self._total}  {summary}")


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds spent inside to ``times[name]``."""
    start = time.perf_counter()
    yield
    times[name] = times.get(name, 0.0) + time.perf_counter() - start


def _open_events(directory: Path, first_step: int):
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory), purge_step=first_step + 1)


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
