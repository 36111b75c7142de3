"""The numbers at the top of the report: what changed between the start and the end of a run."""

import dataclasses
from collections.abc import Sequence

from echorl_jax.tools.report.runs import Run, integer

# The start and the end of a noisy curve are means over this share of it.
EDGE = 0.1
# Changes of success or reward below this are not called a rise or a fall.
VERDICT = 0.03


@dataclasses.dataclass(frozen=True)
class Fact:
    """One headline number: ``before`` is empty where only one value exists."""

    label: str
    after: str
    before: str = ""
    detail: str = ""


def headline(run: Run) -> str:
    """One sentence on what the run did.

    The evaluation says it where there is one, as the mean over its sources; else the reward.
    """
    rows = [row for row in run.metrics if any(key in row for key in eval_keys(run))]
    keys = [key for key in eval_keys(run) if key in rows[-1]] if rows else []
    rows = [row for row in rows if all(key in row for key in keys)]
    if len(rows) > 1:
        first, last = (sum(row[key] for key in keys) / len(keys) for row in (rows[0], rows[-1]))
        change = f"{_verb(first, last)} from {share(first)} to {share(last)}"
        over = f" (mean of {len(keys)} sources)" if len(keys) > 1 else ""
        return (
            f"Held-out success{over} {change} in {_steps(int(rows[-1]['step'] - rows[0]['step']))}"
        )
    count = _steps(run.steps_done)
    edge = edges(run, "reward/mean")
    if edge and run.steps_done > 1:
        return f"Reward {_verb(*edge)} from {number(edge[0])} to {number(edge[1])} in {count}"
    return f"A run of {count}" if run.steps_done else "This run has not finished a step yet"


def progress(run: Run) -> str:
    """How far the run has come, with the number of steps it was set to where that is known.

    A run that went on past that number, or whose config is not there, only says what it did.
    """
    planned = integer(run.config.get("steps")) or 0
    if run.steps_done < planned:
        return f"{run.steps_done:,} of {_steps(planned)}"
    return _steps(run.steps_done)


def facts(run: Run) -> list[Fact]:
    """The headline numbers that a run's metrics allow, most telling first."""
    found = [_evaluation(run, key) for key in eval_keys(run)]
    found += [_reward(run), _supervised(run), _degenerate(run), _clips(run), _entropy(run)]
    found.append(_time(run))
    return [fact for fact in found if fact is not None]


def comparison(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """A table over several runs: its column titles, and one row of text per run."""
    keys = list(dict.fromkeys(key for run in runs for key in eval_keys(run)))
    columns = ["Run", "Steps", *(_source(key) for key in keys), "Reward", "All right", "Entropy"]
    columns += ["Clips", "Time"]
    rows = []
    for run in runs:
        cells = [run.name, f"{run.steps_done:,}"]
        cells += [_arrow(run.series(key)[1], share) for key in keys]
        cells += [_arrow(edges(run, "reward/mean"), number)]
        cells += [_arrow(edges(run, "group/all_success_fraction"), share)]
        cells += [_arrow(edges(run, "entropy/token_mean"), number)]
        cells += [f"{sum(run.series('echo/clips')[1]):,.0f}", duration(_seconds(run))]
        rows.append(cells)
    return columns, rows


def eval_keys(run: Run) -> list[str]:
    """The metrics that hold pass@1 on held-out problems."""
    return [key for key in run.keys() if key.startswith("eval/") and key.endswith("/pass@1")]


def edges(run: Run, key: str) -> tuple[float, float] | None:
    """Means over the first and the last tenth of a metric; None where it was never logged."""
    _, values = run.series(key)
    if not values:
        return None
    width = max(1, int(len(values) * EDGE))
    return sum(values[:width]) / width, sum(values[-width:]) / width


def share(value: float) -> str:
    """A fraction as per cent.

    >>> share(0.4321)
    '43.2%'
    """
    return f"{100 * value:.1f}%"


def number(value: float) -> str:
    """Three significant digits without needless zeros or exponents.

    >>> number(0.12345), number(1234.5), number(0.0)
    ('0.123', '1,234', '0')
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time for people to read.

    >>> duration(42.2), duration(250), duration(7300)
    ('42 s', '4 min 10 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"


def _verb(before: float, after: float) -> str:
    # A small change of one run's success is as likely noise: it is told without a verdict.
    if abs(after - before) < VERDICT:
        return "went"
    return "rose" if after > before else "fell"


def _source(key: str) -> str:
    return f"Held-out: {key.removeprefix('eval/').removesuffix('/pass@1')}"


def _arrow(values, form) -> str:
    if not values:
        return "–"
    return form(values[0]) if len(values) == 1 else f"{form(values[0])} → {form(values[-1])}"


def _evaluation(run: Run, key: str) -> Fact | None:
    _, values = run.series(key)
    points = 100 * (values[-1] - values[0])
    detail = f"pass@1, {points:+.1f} points" if len(values) > 1 else "pass@1, evaluated once"
    before = share(values[0]) if len(values) > 1 else ""
    return Fact(_source(key), share(values[-1]), before, detail)


def _reward(run: Run) -> Fact | None:
    edge = edges(run, "reward/mean")
    if edge is None:
        return None
    return Fact("Mean reward", number(edge[1]), number(edge[0]), "first to last tenth of the run")


def _supervised(run: Run) -> Fact | None:
    edge = edges(run, "loss/nll")
    if edge is None or not any(edge):
        return None
    return Fact("Supervised loss", number(edge[1]), number(edge[0]), "nats, first to last tenth")


def _degenerate(run: Run) -> Fact | None:
    right, wrong = (
        edges(run, "group/all_success_fraction"),
        edges(run, "group/all_failure_fraction"),
    )
    if right is None or wrong is None:
        return None
    detail = f"all right {share(right[0])} → {share(right[1])}"
    return Fact(
        "Groups without advantage", share(right[1] + wrong[1]), share(right[0] + wrong[0]), detail
    )


def _clips(run: Run) -> Fact | None:
    _, counts = run.series("echo/clips")
    if not any(counts):
        return None
    _, lengths = run.series("echo/clip_tokens_mean")
    detail = f"in {sum(c > 0 for c in counts):,} of {len(counts):,} steps"
    if lengths and sum(counts):
        detail += f", {number(sum(lengths) / len(lengths))} tokens on average"
    return Fact("EchoClips", f"{sum(counts):,.0f}", "", detail)


def _entropy(run: Run) -> Fact | None:
    edge = edges(run, "entropy/token_mean")
    if edge is None:
        return None
    return Fact("Token entropy", number(edge[1]), number(edge[0]), "nats, first to last tenth")


def _seconds(run: Run) -> float:
    return sum(sum(run.series(key)[1]) for key in run.keys() if key.startswith("time/"))


def _time(run: Run) -> Fact | None:
    total = _seconds(run)
    if not total:
        return None
    parts = [
        (part, sum(run.series(f"time/{part}_s")[1])) for part in ("rollout", "grade", "update")
    ]
    detail = ", ".join(f"{part} {100 * t / total:.0f}%" for part, t in parts if t)
    return Fact("Time in steps", duration(total), "", detail)
