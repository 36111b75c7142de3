"""Panels from logged metrics: common grids, running means, thinning, and completeness."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import dump_lines, write_run

from echorl_jax.tools.report.curves import (
    MAX_POINTS,
    averaged,
    build_sections,
    rolling_mean,
    span_of,
    thinned_steps,
)
from echorl_jax.tools.report.runs import read_run, read_runs


def panel(sections, title):
    return next(p for section in sections for p in section.panels if p.title == title)


def test_a_short_run_is_drawn_as_logged(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=11, eval_every=10))
    success = panel(build_sections([run]), "Held-out success")
    steps, values = run.series("eval/countdown/pass@1")
    assert success.x == steps == [0, 10]
    assert success.series[0].y == pytest.approx(values, rel=1e-4)
    assert success.series[0].raw is None


def test_a_smoothed_curve_also_has_the_logged_values(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=100))
    reward = panel(build_sections([run]), "Reward").series[0]
    _, values = run.series("reward/mean")
    assert reward.raw == pytest.approx(values, rel=1e-4)
    # 6% of 100 points, made odd: 7 points, three on each side.
    assert reward.y[50] == pytest.approx(sum(values[47:54]) / 7, rel=1e-4)


def test_a_long_run_is_averaged_over_equal_spans(tmp_path):
    dump_lines(
        tmp_path / "metrics.jsonl", [{"step": s, "reward/mean": float(s)} for s in range(10_000)]
    )
    run = read_run(tmp_path)
    reward = panel(build_sections([run]), "Reward")
    assert thinned_steps([run]) == 25 and len(reward.x) == 400
    # The first span holds the steps 0..24: its mean and its middle are 12.
    assert reward.x[0] == 12 and reward.series[0].raw[0] == 12.0


def test_runs_of_different_length_share_one_grid(tmp_path):
    long = write_run(tmp_path / "long", steps=900, samples_every=0)
    short = write_run(tmp_path / "short", steps=40, samples_every=0)
    reward = panel(build_sections(read_runs([long, short])), "Reward")
    assert [series.label for series in reward.series] == ["long", "short"]
    assert len(reward.x) == 300
    assert sum(v is not None for v in reward.series[1].y) == 14  # ceil(40 / 3)
    assert reward.series[0].colour != reward.series[1].colour


def test_the_stacked_shares_add_up_to_one(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=50))
    stack = panel(build_sections([run]), "Outcomes of groups")
    for parts in zip(*(series.y for series in stack.series), strict=True):
        assert sum(parts) == pytest.approx(1.0, abs=1e-3)
    assert [series.colour for series in stack.series] == ["right", "mixed", "wrong"]


def test_a_metric_without_a_panel_is_under_other_metrics(tmp_path):
    directory = write_run(tmp_path / "run", steps=3)
    dump_lines(directory / "metrics.jsonl", [{"step": 0, "my/own": 1, "reward/mean": 0.5}])
    sections = build_sections([read_run(directory)])
    assert [(s.title, s.folded) for s in sections] == [("Learning", False), ("Other metrics", True)]
    assert panel(sections, "my/own").series[0].y == [1.0]


def test_several_keys_in_a_panel_are_named_by_what_differs(tmp_path):
    rows = [{"step": 0, "eval/aime/pass@1": 0.1, "eval/amc/24/pass@1": 0.2, "eval/amc/pass@8": 0.3}]
    dump_lines(tmp_path / "metrics.jsonl", rows)
    success = panel(build_sections([read_run(tmp_path)]), "Held-out success")
    assert [series.label for series in success.series] == ["aime", "amc/24"]
    assert [series.dash for series in success.series] == [0, 1]


def test_a_run_without_metrics_has_no_sections(tmp_path):
    assert build_sections([read_run(tmp_path)]) == []


@given(st.sets(st.integers(0, 50_000), min_size=1, max_size=300))
def test_spans_keep_every_value_and_stay_within_the_limit(steps):
    ordered = sorted(steps)
    span = span_of(ordered)
    grid, (points,) = averaged((ordered, [1.0] * len(ordered)))
    assert list(points) == grid and len(points) <= MAX_POINTS
    assert set(points.values()) == {1.0}
    assert all(abs(x - min(ordered, key=lambda s, x=x: abs(s - x))) < span for x in points)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(0, 9))
def test_a_running_mean_stays_within_the_values(values, half):
    means = rolling_mean(values, width=2 * half + 1)
    assert len(means) == len(values)
    slack = 1e-9 * max(map(abs, values)) * len(values) + 1e-9
    assert all(min(values) - slack <= m <= max(values) + slack for m in means)
    assert math.isclose(means[0], sum(values[: half + 1]) / len(values[: half + 1]), abs_tol=slack)


def test_curves_of_one_call_share_their_spans():
    # 0..799 in spans of 2 steps, named after the first of them; the second curve starts at 1.
    grid, (first, second) = averaged((range(800), [1.0] * 800), ([1, 2, 4], [3.0, 5.0, 7.0]))
    assert grid == list(range(0, 800, 2)) == list(first)
    assert second == {0: 3.0, 2: 5.0, 4: 7.0}
