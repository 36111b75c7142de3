"""The report file: complete, self-contained, and written for incomplete runs too."""

import base64
import hashlib
import html.parser
import json
import re

import pytest
from synthetic_run import dump_lines, write_run

from echorl_jax.config import ConfigError
from echorl_jax.files import write_jsonl
from echorl_jax.tools.report.headline import duration, facts, headline, progress
from echorl_jax.tools.report.page import config_differences, config_table, write_report
from echorl_jax.tools.report.runs import read_run, read_runs


class Page(html.parser.HTMLParser):
    """Elements, attributes and the text that a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.seen, self.scripts = [], [], [], []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag in ("script", "style"):
            self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
        elif not self._inside:
            self.seen.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.seen).split())

    @property
    def data(self):
        return json.loads(self.scripts[0])


def page_of(*args, **kwargs):
    return Page(write_report(*args, **kwargs).read_text(encoding="utf-8"))


def test_the_page_has_every_part(tmp_path):
    run = write_run(tmp_path / "countdown", steps=40)
    path = write_report(run)
    assert path == run / "report.html" and not (run / "report.html.part").exists()
    page = Page(path.read_text(encoding="utf-8"))
    assert re.search(r"Held-out success rose from [\d.]+% to [\d.]+% in 39 steps", page.text)
    assert "countdown · 40 steps" in page.text
    for part in (
        "Learning",
        "Signal",
        "Policy",
        "Cost",
        "Signal ledger",
        "EchoClips",
        "Where clips",
    ):
        assert part in page.text
    assert "learning_rate" in page.text and "0.10.2" in page.text
    titles = {p["title"] for s in page.data["sections"] for p in s["panels"]}
    assert {"Reward", "Token entropy", "EchoClips", "Echo loss", "Memory", "Rows skipped"} <= titles
    assert {"Throughput", "KL to the reference", "Response length", "Held-out success"} <= titles
    assert len(page.data["viewer"]["groups"]) == 3 * 9


def test_the_page_loads_nothing_and_its_policy_lists_its_scripts(tmp_path):
    page = page_of(write_run(tmp_path / "run", steps=5))
    references = [v for _, key, v in page.attributes if key in ("src", "href", "srcset", "action")]
    assert all(value.startswith("#") for value in references)
    assert "link" not in page.tags and "iframe" not in page.tags
    policy = next(v for _, key, v in page.attributes if key == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert digest in policy


def test_several_runs_are_compared(tmp_path):
    echo = write_run(tmp_path / "echo", steps=30)
    plain = write_run(tmp_path / "plain", steps=20, seed=1, echo=False)
    page = page_of(echo, compare=(plain,), out=tmp_path / "out" / "both.html")
    assert "Runs compared" in page.text and "Entropy collapse" in page.text
    assert "echo.enabled yes no" in page.text
    reward = next(p for p in page.data["sections"][0]["panels"] if p["title"] == "Reward")
    assert [series["label"] for series in reward["series"]] == ["echo", "plain"]


def test_an_empty_directory_gives_a_page_that_says_so(tmp_path):
    page = page_of(tmp_path)
    assert "This run has not finished a step yet" in page.text
    assert "No step has been logged yet" in page.text
    assert "This run has no ledger" in page.text and "This run has no samples yet" in page.text
    assert page.data == {
        "sections": [],
        "ledger": None,
        "viewer": {"groups": [], "entropy_scale": 1.0},
    }


@pytest.mark.parametrize("missing", ["metrics.jsonl", "samples/ledger.jsonl", "config.json"])
def test_a_missing_file_leaves_the_other_parts(tmp_path, missing):
    run = write_run(tmp_path / "run", steps=6)
    (run / missing).unlink()
    page = page_of(run)
    assert "EchoClips" in page.text and page.data["viewer"]["groups"]


def test_torn_files_are_shown_up_to_the_tear(tmp_path):
    run = write_run(tmp_path / "run", steps=12)
    for path in [p for p in run.rglob("*.json*") if p.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
    page = page_of(run)
    assert "unreadable line(s) left out" in page.text
    assert page.data["sections"] and page.data["ledger"]["totals"]["steps"] < 12


def test_supervised_training_has_no_parts_about_groups(tmp_path):
    rows = [{"step": 0, "eval/c/pass@1": 0.0}, {"step": 1, "loss/nll": 2.0, "kl/ref": 0.0}]
    dump_lines(tmp_path / "metrics.jsonl", rows)
    page = page_of(tmp_path)
    assert "A run of 1 step" in page.text and "Supervised loss" in page.text
    assert "Signal ledger" not in page.text and "canvas" not in page.tags
    # A curve of nothing but zeros is folded away, not hidden.
    folded = page.data["sections"][-1]["panels"]
    assert [panel["title"] for panel in folded] == ["Held-out success", "KL to the reference"]


def test_without_evaluations_the_headline_gives_the_reward(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=20, eval_every=0))
    assert re.fullmatch(r"Reward rose from 0\.\d+ to 0\.\d+ in 20 steps", headline(run))
    assert [fact.label for fact in facts(run)][0] == "Mean reward"


def test_a_small_change_is_called_neither_rise_nor_fall(tmp_path):
    rows = [{"step": 0, "eval/c/pass@1": 0.40}, {"step": 80, "eval/c/pass@1": 0.38}, {"step": 88}]
    dump_lines(tmp_path / "metrics.jsonl", [row | {"reward/mean": 0.4} for row in rows])
    (tmp_path / "config.json").write_text('{"steps": 120}')
    run = read_run(tmp_path)
    assert headline(run) == "Held-out success went from 40.0% to 38.0% in 80 steps"
    assert progress(run) == "3 of 120 steps"


def test_the_headline_is_the_mean_over_sources(tmp_path):
    """(0.2 + 0.6) / 2 = 0.4 before; (0.5 + 0.9) / 2 = 0.7 after."""
    rows = [
        {"step": 0, "eval/a/pass@1": 0.2, "eval/b/pass@1": 0.6},
        {"step": 8, "eval/a/pass@1": 0.5, "eval/b/pass@1": 0.9},
    ]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    expected = "Held-out success (mean of 2 sources) rose from 40.0% to 70.0% in 8 steps"
    assert headline(read_run(tmp_path)) == expected


def test_one_step_has_a_plain_headline(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=1))
    assert headline(run) == "A run of 1 step"


def test_headline_numbers_match_hand_worked_values(tmp_path):
    right, wrong = "group/all_success_fraction", "group/all_failure_fraction"
    dump_lines(
        tmp_path / "metrics.jsonl",
        [
            {"step": 0, "eval/c/pass@1": 0.25, right: 0.1, wrong: 0.2, "echo/clips": 0},
            {"step": 1, "eval/c/pass@1": 0.5, right: 0.3, wrong: 0.1, "echo/clips": 5}
            | {"echo/clip_tokens_mean": 12.0, "time/rollout_s": 60.0, "time/update_s": 30.0},
        ],
    )
    by_label = {fact.label: fact for fact in facts(read_run(tmp_path))}
    assert (by_label["Held-out: c"].before, by_label["Held-out: c"].after) == ("25.0%", "50.0%")
    assert by_label["Held-out: c"].detail == "pass@1, +25.0 points"
    assert by_label["Groups without advantage"].after == "40.0%"
    assert by_label["EchoClips"].detail == "in 1 of 2 steps, 12 tokens on average"
    assert by_label["Time in steps"].after == duration(90.0) == "1 min 30 s"
    assert by_label["Time in steps"].detail == "rollout 67%, update 33%"


def test_model_output_stays_text(tmp_path):
    hostile = "</script><script>window.hurt=1</script><img src=x onerror=hurt()>\x00\u202e{{ 7*7 }}"
    run = write_run(tmp_path / "<b>run&amp;", steps=3)
    rows = [{"group": 0, "prompt": hostile, "response": hostile, "tokens": [hostile, "\n"]}]
    rows[0] |= {"clip_tokens": 1, "reason": hostile, "data_source": hostile, "step_ids": [0, 1]}
    dump_lines(run / "samples" / "step_000000.jsonl", rows)
    (run / "config.json").write_text(json.dumps({hostile: {hostile: hostile}, "steps": hostile}))
    (run / "environment.json").write_text(json.dumps({hostile: [hostile]}))
    dump_lines(run / "metrics.jsonl", [{"step": 0, hostile: 1.0}, {"step": 1, hostile: 1.0}])
    page = page_of(run)
    assert page.tags.count("script") == 1 + 4 and "img" not in page.tags and "b" not in page.tags
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    shown = hostile.replace("\x00", "␀").replace("\u202e", "‹U+202E›")
    rollout = page.data["viewer"]["groups"][0]["rollouts"][0]
    assert rollout["tokens"] == [shown, "\n"] and rollout["reason"] == shown
    assert "49" not in shown and "{{ 7*7 }}" in page.text
    assert "\x00" not in page.text and "\u202e" not in page.text


def test_stored_studies_are_shown(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    point = {"order": "high", "deleted": 0, "trials": 10, "success": 0.9, "low": 0.6, "high": 1.0}
    write_jsonl(run / "analysis" / "deletion.jsonl", [point, point | {"deleted": 1}])
    assert "Step deletion" in page_of(run).text


def test_config_values_that_differ_from_the_defaults_are_marked():
    table = dict(config_table({"steps": 100, "echo": {"coef": 0.5, "delimiter_ids": [198, 271]}}))
    assert table["run"] == [("steps", "100", False)]
    assert table["echo"] == [("coef", "0.5", True), ("delimiter_ids", "198, 271", True)]
    assert dict(config_table({"mine": {"key": None}}))["mine"] == [("key", "none", False)]


def test_only_differing_config_keys_are_listed(tmp_path):
    for name, coef in (("a", 0.0), ("b", 0.1)):
        (tmp_path / name).mkdir()
        config = {"seed": 3, "echo": {"coef": coef}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    runs = read_runs([tmp_path / "a", tmp_path / "b"])
    assert config_differences(runs) == [["echo.coef", "0.0", "0.1"]]


def test_a_wrong_directory_is_a_usage_error(tmp_path):
    with pytest.raises(ConfigError, match="not a directory"):
        write_report(tmp_path, compare=(tmp_path / "typo",))


def test_the_page_of_a_long_run_is_thinned(tmp_path):
    run = write_run(
        tmp_path / "run",
        steps=1_200,
        prompts=300,
        samples_every=15,
        samples_groups=2,
    )
    path = write_report(run)
    assert path.stat().st_size < 10_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert "each point is the mean of 3 steps" in page.text
    assert "Thinned: groups from 60 of 81 sample files" in page.text
    assert "thinned evenly" in page.text
