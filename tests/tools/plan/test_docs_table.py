"""The table of docs/launch.md is what `echorl plan` says now."""

import json
from pathlib import Path

import pytest

from echorl_jax.cli import run

ROOT = Path(__file__).parents[3]
MODELS = {
    "Qwen2.5-Math-1.5B": "qwen2.5-math-1.5b",
    "Qwen2.5-(Math-)7B": "qwen2.5-math-7b",
    "Llama-3.1-8B-Instruct": "llama-3.1-8b-instruct",
}
SAMPLING, LEARNING = ("prefill", "decode"), ("accumulate", "apply")


def rows() -> list[list[str]]:
    """Model, chips, changed options, slots, GB of sampling and of learning, seconds; no others."""
    found, model = [], ""
    for line in (ROOT / "docs" / "launch.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[3].isdecimal():
            model = MODELS[cells[0]] if cells[0] else model
            if "compiled" not in cells[1]:
                found.append([model, *cells[1:]])
    return found


@pytest.mark.slow
def test_the_table_of_memory_and_time_by_formula(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command sets them for its process, which is that of other tests too.
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert len(rows()) == 13
    for model, chips, changes, slots, sampling, learning, seconds in rows():
        options = [f"--config.{change}" for change in changes.strip("`").split()]
        config = f"--config=configs/paper.py:{model},grpo,echo"
        run(["plan", config, f"--topology={chips}", "--estimate", "--json", *options])
        plan = json.loads(capsys.readouterr().out)
        peaks = {program["program"]: program["total"] / 1e9 for program in plan["programs"]}
        found = [
            str(plan["slots"]),
            f"{max(peaks[name] for name in SAMPLING):.1f}",
            f"{max(peaks[name] for name in LEARNING):.1f}",
            f"{plan['roofline']['step_seconds']:.0f}",
        ]
        assert found == [slots, sampling, learning, seconds], (model, chips)
