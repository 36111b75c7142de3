"""The scores of an evaluation, per data source, as a table and as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from echorl_jax.evaluation.evaluate import (
    Lengths,
    Score,
    length_stats,
    majority_by_source,
    score_by_source,
)
from echorl_jax.evaluation.generations import Outcome
from echorl_jax.rewards import mean_metrics

COLUMNS = ("problems", "greedy", "95%", "avg@k", "95%", "pass@k", "95%", "tokens", "p95", "cut off")


@dataclasses.dataclass(frozen=True)
class SourceResult:
    """One data source."""

    greedy: Score | None
    sampled: Score | None
    lengths: Lengths  # of the samples; of the greedy attempts where there are none
    metrics: dict[str, float]  # means of the grader's metrics, over the same attempts
    majority_at: dict[int, float]  # k -> maj@k of the samples

    @property
    def main(self) -> Score:
        """The samples' score, or the greedy one where there are no samples."""
        score = self.sampled or self.greedy
        assert score is not None
        return score

    def as_json(self) -> dict[str, Any]:
        """The main score's fields, the greedy one's, the lengths and the grader's metrics."""
        greedy = dataclasses.asdict(self.greedy) if self.greedy else None
        lengths = dataclasses.asdict(self.lengths)
        score = dataclasses.asdict(self.main)
        others = {"lengths": lengths, "metrics": self.metrics, "majority_at": self.majority_at}
        return {**score, "greedy": greedy, **others}


def summarise(outcomes: Sequence[Outcome]) -> dict[str, SourceResult]:
    """Results per data source, in the order in which the sources appear.

    Attempts that were not judged count for the lengths only; a source without any other is left
    out.
    """

    def scores(greedy: bool) -> dict[str, Score]:
        own = [o for o in outcomes if o.greedy == greedy]
        return score_by_source((o.data_source, o.problem, o.correct) for o in own)

    greedy, sampled = scores(True), scores(False)
    majority = majority_by_source(
        (o.data_source, o.problem, o.correct, o.final_answer) for o in outcomes if not o.greedy
    )
    results = {}
    for source in dict.fromkeys(o.data_source for o in sorted(outcomes, key=lambda o: o.problem)):
        if source not in greedy and source not in sampled:
            continue
        own = [
            o for o in outcomes if o.data_source == source and o.greedy == (source not in sampled)
        ]
        lengths = length_stats([o.tokens for o in own], [o.truncated for o in own])
        metrics = mean_metrics(o.metrics for o in own)
        results[source] = SourceResult(
            greedy.get(source), sampled.get(source), lengths, metrics, majority.get(source, {})
        )
    return results


def print_results(
    results: Mapping[str, SourceResult], *, left_out: int, bad: int, unjudged: int = 0
) -> None:
    """The table, a mean over sources where there are several, and what was left out."""
    if results:
        _print_table(results)
    for source, result in results.items():
        if result.majority_at:
            votes = ", ".join(f"maj@{k} {value:.3f}" for k, value in result.majority_at.items())
            print(f"{source}: {votes}")
        if result.metrics:
            means = ", ".join(f"{name} {mean:.3f}" for name, mean in result.metrics.items())
            print(f"{source}: {means} (means of the grader's metrics)")
    for count, reason in (
        (left_out, "prompts too long"),
        (bad, "rows that cannot be read"),
        (unjudged, "attempts for which the grader returned None"),
    ):
        if count:
            print(f"left out: {count} {reason}")


def _print_table(results: Mapping[str, SourceResult]) -> None:
    lines = [[source, *_cells(result)] for source, result in results.items()]
    # Without greedy attempts, or without several samples, some columns have nothing to say.
    said = [i for i in range(len(lines[0])) if any(line[i] for line in lines)]
    if len(results) > 1:
        lines.append(["mean of sources", "", *_means(list(results.values()))])
    table = Table(box=box.SIMPLE)
    for i in said:
        name = ("data source", *COLUMNS)[i]
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for number, line in enumerate(lines):
        if number == len(results):
            table.add_section()
        table.add_row(*(line[i] for i in said))
    console = Console()
    # A file or pipe has no width; this one cuts nothing.
    Console(width=max(console.width, 130)).print(table)


def _cells(result: SourceResult) -> list[str]:
    greedy, sampled, lengths = result.greedy, result.sampled, result.lengths
    cells = [str(result.main.problems)]
    cells += [f"{greedy.mean:.3f}", _range(greedy.low, greedy.high)] if greedy else ["", ""]
    if sampled:
        most = max(sampled.pass_at)
        cells += [f"@{sampled.samples} {sampled.mean:.3f}", _range(sampled.low, sampled.high)]
        shown = [f"@{most} {sampled.pass_at[most]:.3f}", _range(*sampled.pass_range)]
        cells += shown if most > 1 else ["", ""]
    else:
        cells += [""] * 4
    return [*cells, f"{lengths.mean:.0f}", f"{lengths.p95:.0f}", f"{lengths.truncated:.1%}"]


def _means(results: Sequence[SourceResult]) -> list[str]:
    """Every source counts the same, as in the papers' averages."""

    def mean(scores: Sequence[Score | None]) -> str:
        known = [score.mean for score in scores if score]
        return f"{sum(known) / len(known):.3f}" if len(known) == len(results) else ""

    greedy, sampled = mean([r.greedy for r in results]), mean([r.sampled for r in results])
    return [greedy, "", sampled, "", "", "", "", "", ""]


def _range(low: float, high: float) -> str:
    return f"{low:.3f}-{high:.3f}"
