"""The report in a browser: the viewer shows the samples, and model output cannot run as code.

Needs Chromium and the package playwright; skipped where either is missing.
"""

import json
import shutil
from collections import defaultdict

import pytest
from synthetic_run import dump_lines, write_run

from echorl_jax.files import read_jsonl
from echorl_jax.tools.report.page import write_report
from echorl_jax.tools.report.runs import read_run
from echorl_jax.tools.report.viewer import visible

pytestmark = pytest.mark.slow
# Quiet: no look-ups of updates or components by the browser itself.
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_report(browser):
    """Opens reports; fails if one of them fetched a file, logged a message or opened a dialog."""
    pages, trouble, fetched = [], [], []

    def open_page(path, *, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(120_000)  # a loaded machine is slow, not wrong
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(path.as_uri())
        pages.append((page, path.as_uri()))
        return page

    yield open_page
    assert trouble == []
    assert [url for url in fetched if url not in {uri for _, uri in pages}] == []
    for page, _ in pages:
        page.close()


def groups_of(run_path):
    """``(step, group) -> rows`` straight from the samples files."""
    groups = defaultdict(list)
    for _, path in read_run(run_path).sample_files():
        for row in read_jsonl(path):
            groups[row["step"], row["group"]].append(row)
    return groups


def outcome(rows):
    right = sum(row["correct"] for row in rows)
    return "wrong" if right == 0 else "right" if right == len(rows) else "mixed"


def shown_text(page):
    # A line end is drawn as a mark; a line break follows it only inside a step.
    text = "".join(page.locator(".sheet .token").all_text_contents())
    return text.replace("↵\n", "↵").replace("↵", "\n")


def test_the_filter_selects_groups_by_step_and_outcome(tmp_path, open_report):
    run = write_run(tmp_path / "run", steps=16, samples_every=5)
    page = open_report(write_report(run))
    groups = groups_of(run)
    for step in ("", *(str(s) for s in sorted({step for step, _ in groups}))):
        for kind in ("", "mixed", "right", "wrong"):
            page.select_option("#viewer-step", step)
            page.select_option("#viewer-outcome", kind)
            expected = [
                key
                for key, rows in groups.items()
                if step in ("", str(key[0])) and kind in ("", outcome(rows))
            ]
            place = page.inner_text("#viewer-place")
            assert place == (f"1 of {len(expected)}" if expected else "0 of 0")
            if expected:
                assert_group_shown(page, groups[expected[0]])
            else:
                assert "No sampled group fits" in page.inner_text("#viewer-body")


def assert_group_shown(page, rows):
    assert page.locator(".other").count() == len(rows)
    for number, row in enumerate(rows):
        page.locator(".other").nth(number).click()
        assert shown_text(page) == visible("".join(row["tokens"]))
        assert page.locator(".sheet .prompt").text_content() == visible(row["prompt"])
        assert row["reason"] in page.locator(".sheet").inner_text()
        assert page.locator(".sheet .step").count() == len(row["step_entropy"])
        peak = row["step_entropy"].index(max(row["step_entropy"]))
        classes = page.locator(".sheet .step").nth(peak).get_attribute("class") or ""
        assert "peak" in classes and page.locator(".sheet .step.peak").count() == 1
        clipped = page.locator(".sheet .step.in-clip .token").count()
        assert clipped == row["clip_tokens"]
        assert page.locator(".sheet .clip-end").count() == (row["clip_tokens"] > 0)


def test_the_buttons_step_through_the_groups(tmp_path, open_report):
    run = write_run(tmp_path / "run", steps=6, samples_every=5)
    page = open_report(write_report(run))
    groups = groups_of(run)
    page.select_option("#viewer-clip", "yes")
    with_clip = [rows for rows in groups.values() if any(row["clip_tokens"] for row in rows)]
    for rows in with_clip:
        # The rollout with the clip is the one that is opened.
        row = next(row for row in rows if row["clip_tokens"])
        assert shown_text(page) == visible("".join(row["tokens"]))
        if rows is not with_clip[-1]:
            page.get_by_role("button", name="Next").click()
    assert page.get_by_role("button", name="Next").is_disabled()
    assert page.inner_text("#viewer-place") == f"{len(with_clip)} of {len(with_clip)}"


def test_model_output_cannot_run_as_code(tmp_path, open_report):
    hostile = [
        "</script><script>window.hurt = 1</script>",
        "<img src=x onerror='window.hurt = 2'><svg onload='window.hurt = 3'>",
        "</textarea></pre></title><iframe src='https://example.com'></iframe>",
        "\x00\x01\u202etxet\u2066\ud800\u2028<!--",
        "javascript:window.hurt=4 ${window.hurt=5} {{ 7*7 }} __proto__",
    ]
    run = write_run(tmp_path / "run <b>&lt;", steps=3)
    text = "\n".join(hostile)
    tokens = [piece for line in hostile for piece in (line, "\n")]
    row = {"group": 0, "row": 0, "step": 0, "prompt": text, "response": text, "reason": text}
    row |= {"tokens": tokens, "entropy": [1.0] * len(tokens), "data_source": text}
    row |= {"step_ids": [i // 2 for i in range(len(tokens))], "correct": True, "clip_tokens": 4}
    dump_lines(run / "samples" / "step_000000.jsonl", [row])
    (run / "config.json").write_text(json.dumps({text: {text: text}}))
    dump_lines(run / "metrics.jsonl", [{"step": i, text: 0.5} for i in range(3)])
    page = open_report(write_report(run))
    page.select_option("#viewer-step", "0")
    page.locator("details summary").first.click()
    assert page.evaluate("window.hurt") is None
    assert shown_text(page) == visible("".join(tokens))
    assert page.locator(".sheet .prompt").text_content() == visible(text)
    assert page.locator("img, svg, iframe, textarea, b:not(.readout b)").count() == 0
    assert "‹U+202E›" in page.inner_text("#viewer") and "␀" in page.inner_text("#viewer")
    assert "<script>" in page.inner_text("details") and "{{ 7*7 }}" in (
        page.text_content("#config") or ""
    )


def test_curves_are_drawn_and_read_out(tmp_path, open_report):
    runs = [write_run(tmp_path / name, steps=25, seed=i) for i, name in enumerate("ab")]
    page = open_report(write_report(runs[0], compare=(runs[1],)))
    data = json.loads(page.locator("#data").text_content() or "")
    folded = data["sections"][-1]["panels"]
    drawn = sum(len(section["panels"]) for section in data["sections"]) - len(folded)
    assert page.locator(".panel canvas").count() == drawn
    page.locator("details summary").first.click()
    page.wait_for_function(
        f"document.querySelectorAll('.panel canvas').length === {drawn + len(folded)}"
    )
    plot = page.locator("#learning .panel", has_text="Reward").locator(".u-over")
    plot.hover()
    readout = page.locator("#learning .panel", has_text="Reward").locator(".readout")
    assert "step 12" in readout.inner_text() and "a 0." in readout.inner_text()
    # One cursor for all panels over steps.
    assert "step 12" in page.locator("#policy .panel .readout").first.inner_text()


def test_pointing_at_a_ledger_cell_describes_it(tmp_path, open_report):
    run = write_run(tmp_path / "run", steps=12)
    page = open_report(write_report(run))
    page.locator("#ledger-canvas").hover(position={"x": 3, "y": 3})
    groups = next(read_jsonl(run / "samples" / "ledger.jsonl"))["groups"]
    best = max(groups, key=lambda group: (group["correct"], group["index"]))
    said = page.inner_text("#ledger-readout")
    assert f"step 0 · prompt {best['index']}" in said
    assert f"{best['correct']} of {best['size']} right" in said
    page.get_by_role("button", name="By prompt").click()
    assert "A row is a prompt" in page.inner_text("#ledger-readout")


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_screen_in_both_colour_schemes(tmp_path, open_report, width, scheme):
    run = write_run(tmp_path / "a-run-with-a-rather-long-name-that-must-wrap-on-a-phone", steps=8)
    page = open_report(write_report(run), width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(20, 24, 28)") == (scheme == "dark")


def test_the_report_of_an_empty_directory_opens(tmp_path, open_report):
    page = open_report(write_report(tmp_path))
    assert "has not finished a step yet" in page.inner_text("h1")


def test_a_change_of_colour_scheme_redraws_the_charts(tmp_path, open_report):
    page = open_report(write_report(write_run(tmp_path / "run", steps=8)))
    before = page.locator(".panel canvas").count()
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    assert page.locator(".panel canvas").count() == before


def test_a_long_run_opens_within_two_seconds(tmp_path, open_report):
    # 10,000 steps and 100,000 samples: thinned, and it says so.
    sizes = {"prompts_per_step": 10, "samples_groups": 10, "samples_every": 4, "prompts": 500}
    path = write_report(write_run(tmp_path / "long", steps=10_000, **sizes))
    assert path.stat().st_size < 10_000_000
    seconds: list[float] = []
    # Another program may have the processor meanwhile: one undisturbed opening is enough.
    while len(seconds) < 10 and min(seconds, default=2) >= 2:
        page = open_report(path)
        text = page.inner_text("body")
        timing = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        seconds.append(timing / 1000)
    assert min(seconds) < 2, seconds
    assert "Thinned: groups from" in text and "each point is the mean of 25 steps" in text


def test_studies_without_a_run_open(tmp_path, open_report):
    points = [
        {"order": order, "deleted": k, "trials": 9, "success": 1 - k / 2, "low": 0.0, "high": 1.0}
        for order in ("high", "low", "random")
        for k in (0, 1, 2)
    ]
    (tmp_path / "analysis").mkdir()
    dump_lines(tmp_path / "analysis" / "deletion.jsonl", points)
    page = open_report(write_report(tmp_path), width=390, scheme="dark")
    assert page.inner_text("h1") == "Step deletion"
    assert page.locator(".panel canvas").count() == 1
    page.locator(".panel .u-over").hover()
    assert "steps deleted 1" in page.locator(".panel .readout").inner_text()
    assert page.locator("#ledger, #viewer, #config").count() == 0
