"""The bar of evaluations, studies and runs: what a log gets, and what a terminal."""

from pathlib import Path

import pytest

from echorl_jax.evaluation.progress import Bar
from echorl_jax.training.logs import RunLog


@pytest.mark.parametrize(("at_once", "said"), [(True, ["1", "4"]), (False, ["4"])])
def test_a_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], at_once: bool, said: list[str]
) -> None:
    with Bar("rows", 4, at_once=at_once) as bar:
        for done in range(1, 5):
            bar.show(done, f"{done}", now=done == 4)
    assert capsys.readouterr().err.splitlines() == said


def test_lines_that_are_due_come_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("rows", 9, every_s=0.0) as bar:
        bar.show(1, "[one]")
        bar.show(2, "two")
    assert capsys.readouterr().err.splitlines() == ["[one]", "two"]


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Bar("rows", 4, every_s=0.0) as bar:
        bar.show(3, "a line", beside="beside it")
    shown = capsys.readouterr().err
    assert "rows" in shown and "3/4" in shown and "beside it" in shown and "a line" not in shown


def test_a_run_says_its_first_step_its_last_and_its_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, first_step=0, total_steps=5, tensorboard=False) as log:
        for step in range(1, 6):
            log.write({"step": step} | ({"eval/x/pass@1": 0.5} if step == 3 else {}))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/5", "step 3/5", "step 5/5"]
