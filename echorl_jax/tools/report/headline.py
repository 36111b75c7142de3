"""The numbers at the top of the report: the changes between start and end of a run."""

import dataclasses
from collections.abc import Callable, Sequence

from echorl_jax.tools.report.runs import Run, integer

# The start and the end of a noisy curve are means over this share of it.
EDGE = 0.1
# A smaller change of success or reward is probably noise; the headline gives no verdict on it.
VERDICT = 0.03
TENTHS = "first to last tenth"


@dataclasses.dataclass(frozen=True)
class Fact:
    """One headline number: ``before`` is empty where only one value exists."""

    label: str
    after: str
    before: str = ""
    detail: str = ""


def headline(run: Run) -> str:
    """One sentence about the run: its held-out success, averaged over sources, else its reward."""
    rows = [row for row in run.metrics if any(key in row for key in eval_keys(run))]
    keys = [key for key in eval_keys(run) if key in rows[-1]] if rows else []
    rows = [row for row in rows if all(key in row for key in keys)]
    if len(rows) > 1:
        first, last = (sum(row[key] for key in keys) / len(keys) for row in (rows[0], rows[-1]))
        over = f" (mean of {len(keys)} sources)" if len(keys) > 1 else ""
        change = f"{_verb(first, last)} from {share(first)} to {share(last)}"
        count = _steps(int(rows[-1]["step"] - rows[0]["step"]))
        return f"Held-out success{over} {change} in {count}"
    count, edge = _steps(run.steps_done), edges(run, "reward/mean")
    if edge and run.steps_done > 1:
        return f"Reward {_verb(*edge)} from {number(edge[0])} to {number(edge[1])} in {count}"
    return f"A run of {count}" if run.steps_done else "This run has not finished a step yet"


def progress(run: Run) -> str:
    """The steps done, with the configured number if the run has not reached it."""
    planned = integer(run.config.get("steps")) or 0
    done = run.steps_done
    return f"{done:,} of {_steps(planned)}" if done < planned else _steps(done)


def facts(run: Run) -> list[Fact]:
    """The headline numbers that a run's metrics allow, most telling first."""
    nll = edges(run, "loss/nll")
    right = edges(run, "group/all_success_fraction")
    wrong = edges(run, "group/all_failure_fraction")
    both = right and wrong and (right[0] + wrong[0], right[1] + wrong[1])
    found = [
        *(_evaluation(run, key) for key in eval_keys(run)),
        _change("Mean reward", edges(run, "reward/mean"), f"{TENTHS} of the run"),
        _change("Supervised loss", nll if any(nll or ()) else None, f"nats, {TENTHS}"),
        _change("Groups without advantage", both, f"all right {_arrow(right, share)}", share),
        _clips(run),
        _change("Token entropy", edges(run, "entropy/token_mean"), f"nats, {TENTHS}"),
        _time(run),
    ]
    return [fact for fact in found if fact is not None]


def comparison(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """A table over several runs: its column titles, and one row of text per run."""
    keys = list(dict.fromkeys(key for run in runs for key in eval_keys(run)))
    columns = ["Run", "Steps", *map(_source, keys), "Reward", "All right", "Entropy"]
    columns += ["Clips", "Time"]
    rows = [
        [
            run.name,
            f"{run.steps_done:,}",
            *(_arrow(run.series(key)[1], share) for key in keys),
            _arrow(edges(run, "reward/mean"), number),
            _arrow(edges(run, "group/all_success_fraction"), share),
            _arrow(edges(run, "entropy/token_mean"), number),
            f"{sum(run.series('echo/clips')[1]):,.0f}",
            duration(_seconds(run)),
        ]
        for run in runs
    ]
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
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in its two largest units.

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
    if abs(after - before) < VERDICT:
        return "went"
    return "rose" if after > before else "fell"


def _source(key: str) -> str:
    return f"Held-out: {key.removeprefix('eval/').removesuffix('/pass@1')}"


def _arrow(values: Sequence[float] | None, form: Callable[[float], str]) -> str:
    if not values:
        return "–"
    return form(values[0]) if len(values) == 1 else f"{form(values[0])} → {form(values[-1])}"


def _change(
    label: str,
    edge: tuple[float, float] | None,
    detail: str,
    form: Callable[[float], str] = number,
) -> Fact | None:
    return Fact(label, form(edge[1]), form(edge[0]), detail) if edge else None


def _evaluation(run: Run, key: str) -> Fact:
    _, values = run.series(key)
    if len(values) == 1:
        return Fact(_source(key), share(values[0]), "", "pass@1, evaluated once")
    detail = f"pass@1, {100 * (values[-1] - values[0]):+.1f} points"
    return Fact(_source(key), share(values[-1]), share(values[0]), detail)


def _clips(run: Run) -> Fact | None:
    _, counts = run.series("echo/clips")
    if not any(counts):
        return None
    _, lengths = run.series("echo/clip_tokens_mean")
    detail = f"in {sum(c > 0 for c in counts):,} of {len(counts):,} steps"
    if lengths and sum(counts):
        detail += f", {number(sum(lengths) / len(lengths))} tokens on average"
    return Fact("EchoClips", f"{sum(counts):,.0f}", "", detail)


def _seconds(run: Run) -> float:
    return sum(sum(run.series(key)[1]) for key in run.keys() if key.startswith("time/"))


def _time(run: Run) -> Fact | None:
    total = _seconds(run)
    if not total:
        return None
    parts = (
        (part, sum(run.series(f"time/{part}_s")[1])) for part in ("rollout", "grade", "update")
    )
    detail = ", ".join(f"{part} {100 * seconds / total:.0f}%" for part, seconds in parts if seconds)
    return Fact("Time in steps", duration(total), "", detail)
