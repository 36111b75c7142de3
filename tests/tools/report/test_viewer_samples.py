"""The data of the EchoClip viewer: tokens and steps of the files, within a budget, escaped."""

import html.parser
import json

from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import dump_lines, write_run

from echorl_jax.files import read_jsonl
from echorl_jax.tools.report.runs import read_run
from echorl_jax.tools.report.viewer import (
    MAX_TOKENS,
    build_viewer,
    embed_json,
    pack_group,
    pack_rollout,
    visible,
)


def test_groups_hold_the_tokens_steps_and_clips_of_the_files(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=20, samples_every=5))
    viewer = build_viewer(run)
    rows = [row for _, path in run.sample_files() for row in read_jsonl(path)]
    packed = [rollout for group in viewer.groups for rollout in group["rollouts"]]
    assert ["".join(r["tokens"]) for r in packed] == ["".join(row["tokens"]) for row in rows]
    assert [r["clip_tokens"] for r in packed] == [row["clip_tokens"] for row in rows]
    for rollout, row in zip(packed, rows, strict=True):
        assert [mean for _, mean in rollout["steps"]] == [round(h, 4) for h in row["step_entropy"]]
        assert rollout["steps"][-1][0] == len(row["tokens"])
        assert rollout["entropy"] == [round(100 * h) for h in row["entropy"]]
    assert {g["outcome"] for g in viewer.groups} == {"mixed", "right", "wrong"}
    assert (viewer.files, viewer.files_read, viewer.groups_left_out) == (5, 5, 0)
    assert len(viewer.clips) == sum(row["clip_tokens"] > 0 for row in rows)


def test_a_small_page_shows_every_phase_within_its_budget(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=200, samples_every=1, samples_groups=4))
    viewer = build_viewer(run, page_bytes=60_000)
    assert len(embed_json(viewer.groups)) < 62_000
    assert viewer.files == 200 and viewer.files_read < 200
    steps = [group["step"] for group in viewer.groups]
    assert min(steps) == 0 and max(steps) == 199
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) < 60


def test_a_run_without_samples_has_no_groups(tmp_path):
    viewer = build_viewer(read_run(tmp_path))
    assert viewer.groups == [] and viewer.files == 0 and viewer.clips == ()


def test_incomplete_rows_are_still_shown(tmp_path):
    rows = [
        {"group": 0, "response": "only text"},
        {"group": 0, "response": "x", "tokens": ["a", "b"], "entropy": [1.0], "step_ids": None},
        {"group": 1, "tokens": ["a", "b"], "entropy": [0.5, None], "step_ids": [0, -1]},
        {"group": 2},
    ]
    (tmp_path / "samples").mkdir()
    dump_lines(tmp_path / "samples" / "step_000007.jsonl", rows)
    (tmp_path / "samples" / "step_notes.jsonl").write_text("not a samples file")
    first, second = build_viewer(read_run(tmp_path)).groups
    assert first["step"] == 7 and first["rollouts"][0]["tokens"] == ["only text"]
    assert first["rollouts"][0]["steps"] == [[1, None]]
    assert first["rollouts"][1]["entropy"] == [] and first["rollouts"][1]["steps"] == [[2, None]]
    # (0.5 + 0) / 2: the masked token belongs to the step before it.
    assert second["rollouts"][0]["steps"] == [[2, 0.25]]


def test_an_unjudged_rollout_is_neither_right_nor_wrong():
    rows = [{"step": 1, "response": "7", "correct": correct} for correct in (True, None)]
    packed = pack_group(rows)
    assert (packed["outcome"], packed["right"]) == ("right", 1)
    assert [rollout["correct"] for rollout in packed["rollouts"]] == [True, None]


def test_a_very_long_rollout_is_cut_after_its_clip():
    count = MAX_TOKENS + 500
    row = {"tokens": ["t"] * count, "entropy": [0.1] * count, "step_ids": [0] * count}
    assert len(pack_rollout(row)["tokens"]) == MAX_TOKENS
    clipped = pack_rollout(row | {"clip_tokens": MAX_TOKENS + 100})
    assert len(clipped["tokens"]) == len(clipped["entropy"]) == MAX_TOKENS + 100
    assert clipped["length"] == count and clipped["steps"][-1][0] == MAX_TOKENS + 100


class Scripts(html.parser.HTMLParser):
    """Collects the elements that a browser would open."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


@settings(max_examples=50)
@given(st.text())
def test_embedded_text_cannot_leave_its_element(text):
    hostile = text + "</script><script>alert(1)</script><!--<script>" + text
    parser = Scripts()
    parser.feed(f'<script type="application/json">{embed_json([hostile])}</script>')
    assert parser.found == ["script"]
    assert json.loads(embed_json([hostile])) == [hostile]


@given(st.text())
def test_visible_text_keeps_every_character(text):
    shown = visible(text)
    assert visible(shown) == shown
    assert len(shown) >= len(text)
    shown.encode("utf-8")


def test_hiding_and_reordering_characters_are_replaced():
    assert visible("a\x00b\r\n\tc\x7f") == "a␀b␍\n\tc␡"
    assert visible("\u202eevil\u2066\u200f\u200b\ufeff\ud800\x85") == (
        "‹U+202E›evil‹U+2066›‹U+200F›‹U+200B›‹U+FEFF›‹U+D800›‹U+0085›"
    )
    assert visible("naïve 数学 👩‍🔬 שלום") == "naïve 数学 👩‍🔬 שלום"
