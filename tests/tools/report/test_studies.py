"""Compares entropy law and collapse, clips, trajectories and deletion with hand-worked values."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import dump_lines, write_run

from echorl_jax.evaluation.evaluate import bootstrap_mean, wilson
from echorl_jax.files import read_jsonl
from echorl_jax.tools.report.analyze import write_studies
from echorl_jax.tools.report.entropy_decay import (
    collapse_section,
    entropy_collapse,
    entropy_law,
    fit_entropy_law,
    law_section,
)
from echorl_jax.tools.report.golden_entropy import entropy_profiles, profile_section, step_means
from echorl_jax.tools.report.runs import read_run, read_runs
from echorl_jax.tools.report.step_deletion import (
    deletion_curve,
    deletion_order,
    deletion_section,
    plan_deletions,
)
from echorl_jax.tools.report.viewer import clip_of, clip_section, clip_statistics


def logged(directory, **columns):
    directory.mkdir()
    keys = {name.replace("_", "/", 1): values for name, values in columns.items()}
    count = len(next(iter(keys.values())))
    rows = [{"step": i} | {k: v[i] for k, v in keys.items()} for i in range(count)]
    dump_lines(directory / "metrics.jsonl", rows)
    return read_run(directory)


class TestEntropyLaw:
    @given(st.floats(-2, 2), st.floats(-3, 3))
    def test_an_exact_law_is_recovered(self, a, b):
        entropy = [0.05 * i for i in range(40)]
        law = fit_entropy_law(entropy, [b - a * math.exp(h) for h in entropy])
        assert law is not None
        assert law["a"] == pytest.approx(a, abs=1e-6) and law["b"] == pytest.approx(b, abs=1e-6)
        assert law["ceiling"] == pytest.approx(b - a, abs=1e-6) and law["points"] == 40

    def test_a_noisy_law_is_fitted_by_least_squares(self):
        rng = np.random.default_rng(0)
        entropy = rng.uniform(0.1, 1.0, 200)
        reward = 0.9 - 0.2 * np.exp(entropy) + rng.normal(0, 0.02, 200)
        law = fit_entropy_law(entropy.tolist(), reward.tolist())
        design = np.stack([-np.exp(entropy), np.ones(200)], axis=1)
        (a, b), squares, *_ = np.linalg.lstsq(design, reward)
        assert law is not None
        assert law["a"] == pytest.approx(a) and law["b"] == pytest.approx(b)
        assert law["r2"] == pytest.approx(1 - squares[0] / (reward.var() * 200))

    def test_a_constant_reward_is_explained_in_full(self):
        law = fit_entropy_law([0.1 * i for i in range(20)], [0.5] * 20)
        assert law is not None and law["r2"] == 1
        assert (law["a"], law["b"]) == pytest.approx((0, 0.5), abs=1e-12)

    def test_too_few_or_equal_points_give_no_law(self):
        assert fit_entropy_law([0.1] * 5, [0.5] * 5) is None
        assert fit_entropy_law([0.1] * 50, [0.5] * 50) is None
        with pytest.raises(ValueError, match="2 points, reward has 1"):
            fit_entropy_law([1.0, 2.0], [1.0])

    def test_a_run_along_the_law_gets_its_ceiling(self, tmp_path):
        entropy = [1.0 - 0.03 * i for i in range(30)]
        reward = [0.8 - 0.1 * math.exp(h) for h in entropy]
        run = logged(tmp_path / "run", entropy_token_mean=entropy, reward_mean=reward)
        row = entropy_law(run)
        assert row is not None
        assert row["run"] == "run" and row["ceiling"] == pytest.approx(0.7)
        section = law_section([run])
        assert section is not None and section.tables[0][1][0][4] == "0.7"
        # The drawn curve starts at zero entropy, at the ceiling.
        assert (section.panels[0].x[0], section.panels[0].series[1].y[0]) == (0.0, 0.7)
        assert list(section.panels[0].x) == sorted(section.panels[0].x)

    def test_a_law_that_explains_little_names_no_ceiling(self, tmp_path):
        entropy = [0.3 + 0.1 * (i % 7) for i in range(40)]
        reward = [0.5 - 0.01 * h + 0.1 * (i % 2) for i, h in enumerate(entropy)]
        section = law_section(
            [logged(tmp_path / "run", entropy_token_mean=entropy, reward_mean=reward)]
        )
        assert section is not None and section.tables[0][1][0][4] == "unclear"

    def test_reward_that_rises_with_entropy_has_no_ceiling(self, tmp_path):
        rising = [0.1 + 0.02 * i for i in range(20)]
        run = logged(tmp_path / "run", entropy_token_mean=rising, reward_mean=rising)
        section = law_section([run])
        assert section is not None and section.tables[0][1][0][4] == "none, a is not positive"

    def test_a_run_without_entropy_has_no_law(self, tmp_path):
        assert law_section([logged(tmp_path / "run", reward_mean=[0.1] * 20)]) is None


class TestCollapse:
    def test_start_end_and_half_step_match_hand_worked_values(self, tmp_path):
        # 10 values: no smoothing, the edges are the first and the last value alone.
        values = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.25]
        found = entropy_collapse(logged(tmp_path / "run", entropy_token_mean=values))
        assert found is not None
        run = found.pop("run")
        assert (run, list(found.values())) == ("run", [1.0, 0.25, 0.25, 5, 9])

    def test_constant_entropy_has_no_half_step(self, tmp_path):
        found = entropy_collapse(logged(tmp_path / "run", entropy_token_mean=[0.3] * 50))
        assert found is not None and found["half_step"] is None

    def test_the_section_compares_at_least_two_runs(self, tmp_path):
        echo = write_run(tmp_path / "echo", steps=40, samples_every=0)
        plain = write_run(tmp_path / "plain", steps=20, echo=False, samples_every=0)
        runs = read_runs([echo, plain])
        section = collapse_section(runs)
        assert section is not None and [s.label for s in section.panels[0].series] == [
            "echo",
            "plain",
        ]
        assert [row[0] for row in section.tables[0][1]] == ["echo", "plain"]
        assert collapse_section(runs[:1]) is None


class TestClips:
    ROW = {
        "step": 4,
        "tokens": ["a", "\n", "b", "c", "\n\n", "d"],
        "step_ids": [0, 0, 1, 1, 1, 2],
        "clip_tokens": 5,
        "clip_step": 1,
    }

    def test_a_clip_holds_its_place_in_the_response(self):
        assert clip_of(self.ROW) == {
            "training_step": 4,
            "tokens": 5,
            "length": 6,
            "step": 1,
            "steps": 3,
            "ending": "\n\n",
            "place": 5 / 6,
            "whole": False,
        }

    @pytest.mark.parametrize("change", [{"clip_tokens": 0}, {"clip_tokens": None}, {"tokens": []}])
    def test_a_row_without_a_clip_gives_none(self, change):
        assert clip_of(self.ROW | change) is None

    def test_statistics_and_endings_match_hand_worked_values(self):
        whole = clip_of(self.ROW | {"clip_tokens": 6, "clip_step": 2})
        first = clip_of(self.ROW | {"clip_tokens": 2, "clip_step": 0})
        clips = [clip for clip in (clip_of(self.ROW), whole, first, first) if clip]
        assert clip_statistics(clips) == {
            "tokens_mean": 15 / 4,
            "tokens_median": 3.5,
            "steps_mean": (2 + 3 + 1 + 1) / 4,
            "place_mean": pytest.approx((5 / 6 + 1 + 2 / 6 + 2 / 6) / 4),
            "whole_share": 0.25,
            "first_step_share": 0.5,
        }
        section = clip_section(clips)
        assert section is not None
        cells = [["all", "4", "3.75", "3.5", "1.75", "62.5%", "25.0%", "50.0%"]]
        assert section.tables[0][1] == cells
        assert section.tables[1][1] == [["\\n", "2", "50.0%"], ["\\n\\n", "1", "25.0%"]]

    def test_the_section_compares_early_and_late_clips(self):
        clips = [clip_of(self.ROW | {"step": s, "clip_tokens": 1 + s % 6}) for s in range(60)]
        section = clip_section([clip for clip in clips if clip])
        assert section is not None
        assert [row[0] for row in section.tables[0][1]] == ["all", "first third", "last third"]
        assert sum(section.panels[0].series[0].y) == pytest.approx(1.0, abs=1e-3)
        assert sum(section.panels[1].series[0].y) == pytest.approx(1.0, abs=1e-3)
        assert clip_section([]) is None


class TestFiles:
    def test_the_studies_of_a_run_are_written(self, tmp_path):
        run = write_run(tmp_path / "run", steps=30, samples_every=3)
        other = write_run(tmp_path / "other", steps=30, echo=False, samples_every=0)
        collapse, law, clips = write_studies(run, compare=(other,))
        assert [row["run"] for row in read_jsonl(collapse)] == ["run", "other"]
        assert {row["run"] for row in read_jsonl(law)} == {"run", "other"}
        logged = [r for _, p in read_run(run).sample_files() for r in read_jsonl(p)]
        expected = [(r["step"], r["clip_tokens"]) for r in logged if r["clip_tokens"]]
        assert [(r["training_step"], r["tokens"]) for r in read_jsonl(clips)] == expected

    def test_a_run_without_steps_gets_empty_files(self, tmp_path):
        assert [path.read_text() for path in write_studies(tmp_path)] == ["", "", ""]


class TestTrajectories:
    def test_masked_tokens_are_in_no_step(self):
        assert step_means([1.0, 3.0, 5.0, 9.0], [0, 0, 2, -1]) == [2.0, 5.0]
        assert step_means([], []) == []
        with pytest.raises(ValueError, match="1 entropies, 2 step ids"):
            step_means([1.0], [0, 0])

    def test_profiles_match_hand_worked_values(self):
        rows = [
            {"source": "expert", "entropy": [1.0, 3.0, 5.0], "step_ids": [0, 0, 1]},
            {"source": "policy", "entropy": [0.5, 9.0], "step_ids": [0, -1]},
            {"source": "expert", "entropy": [1.0], "step_ids": [0]},
            {"source": "policy", "entropy": [], "step_ids": []},
        ]
        expert, policy = entropy_profiles(rows)
        counts = ("trajectories", "tokens", "steps")
        assert [expert[key] for key in counts] == [2, 4, 3]
        assert expert["token_mean"] == 2.5
        assert expert["step_mean"] == pytest.approx((2 + 5 + 1) / 3)
        assert expert["peak_mean"] == 3.0  # (5 + 1) / 2
        assert expert["token_low"] <= 2.5 <= expert["token_high"]
        assert [policy[key] for key in ("trajectories", "token_mean", "token_low")] == [1, 0.5, 0.5]
        for profile in (expert, policy):
            assert sum(profile["token_histogram"]) == pytest.approx(1.0)
            assert sum(profile["step_histogram"]) == pytest.approx(1.0)
        assert entropy_profiles([]) == []

    def test_the_section_has_two_histograms_and_a_table(self):
        rows = [
            {"source": s, "entropy": [h, 2 * h], "step_ids": [0, 1]}
            for s, h in (("expert", 1.0), ("policy", 0.2))
        ]
        section = profile_section(entropy_profiles(rows))
        assert section is not None and len(section.panels) == 2
        assert section.tables[0][1][0][:4] == ["expert", "1", "2", "2"]
        assert profile_section([]) is None


class TestDeletion:
    def test_steps_are_deleted_by_entropy_or_at_random(self):
        entropy = [0.2, 0.9, 0.5, 0.9]
        assert deletion_order(entropy, order="high") == [1, 3, 2, 0]
        assert deletion_order(entropy, order="low") == [0, 2, 1, 3]
        shuffled = deletion_order(entropy, order="random", seed=3)
        assert sorted(shuffled) == [0, 1, 2, 3]
        assert shuffled == deletion_order(entropy, order="random", seed=3)

    def test_tokens_of_deleted_steps_are_left_out(self):
        planned = plan_deletions([0, 0, 1, 2, -1], [0.1, 0.9, 0.5], counts=[0, 1, 3, 4])
        kept = {(d.order, d.deleted): d.kept for d in planned}
        assert kept["high", 0] == kept["low", 0] == kept["random", 0] == (0, 1, 2, 3)
        assert kept["high", 1] == (0, 1, 3) and kept["low", 1] == (2, 3)
        assert kept["random", 3] == ()
        assert ("high", 4) not in kept

    def test_the_curve_has_a_point_per_order_and_count(self):
        rng = random.Random(0)
        outcomes = [
            {"order": order, "deleted": k, "correct": rng.random() < 0.5}
            for order in ("low", "high")
            for k in (0, 2)
            for _ in range(30)
        ]
        unjudged = [{"order": "high", "deleted": 2, "correct": None}]
        points = deletion_curve(unjudged + outcomes)
        found = [(p["order"], p["deleted"]) for p in points]
        assert found == [("high", 0), ("high", 2), ("low", 0), ("low", 2)]
        right = sum(o["correct"] for o in outcomes if o["order"] == "high" and o["deleted"] == 2)
        assert points[1]["success"] == right / 30 and points[1]["trials"] == 30
        assert points[1]["low"] < points[1]["success"] < points[1]["high"]
        section = deletion_section(points)
        assert section is not None and section.panels[0].x == [0, 2]
        assert section.panels[0].series[0].low is not None
        assert deletion_section([]) is None


class TestIntervals:
    def test_wilson_matches_a_hand_worked_interval(self):
        # n = 4, p = 3/4, z = 1.96: (p + z^2/2n) / (1 + z^2/n) = 0.6275, and 0.3269 to either side.
        assert wilson(3, 4) == pytest.approx((0.3006, 0.9544), abs=1e-4)

    def test_wilson_without_trials_is_the_whole_range(self):
        assert wilson(0, 0) == (0.0, 1.0)

    def test_bootstrap_covers_the_mean_of_a_normal(self):
        values = np.random.default_rng(1).normal(3.0, 1.0, 400).tolist()
        low, high = bootstrap_mean(values)
        # The normal interval is 3 +- 1.96 / sqrt(400).
        assert low == pytest.approx(np.mean(values) - 0.098, abs=0.02)
        assert high == pytest.approx(np.mean(values) + 0.098, abs=0.02)

    def test_units_without_weight_do_not_count(self):
        assert bootstrap_mean([1.0, 5.0], [0.0, 2.0]) == (5.0, 5.0)
        with pytest.raises(ValueError, match="nothing to average"):
            bootstrap_mean([])
