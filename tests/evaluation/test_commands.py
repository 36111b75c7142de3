"""evaluate, grade, check and convert on real input."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from echorl_jax.cli import run
from echorl_jax.data import load_rows, load_tokenizer
from echorl_jax.errors import UserError
from echorl_jax.models import (
    Lora,
    init_adapters,
    load_model,
    save_adapter,
    save_model,
    with_adapters,
)

ASSETS = Path("echorl_jax/assets/countdown")


def test_evaluate_keeps_every_generation(tmp_path: Path) -> None:
    arguments = ["--model=builtin:countdown", "--data=countdown:split=eval&count=6"]
    arguments += ["--samples=4", "--temperature=1.0", "--max_new_tokens=24", "--dtype=float32"]
    arguments += ["--workers=0", "--batch=8", "--devices=1"]
    assert run(["evaluate", *arguments, f"--out={tmp_path}"]) == 0
    lines = [json.loads(s) for s in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert [(line["problem"], line["sample"]) for line in lines] == [
        (problem, sample) for problem in range(6) for sample in range(4)
    ]
    score = json.loads((tmp_path / "scores.json").read_text())["scores"]["countdown"]
    assert score["problems"] == 6 and score["samples"] == 4
    assert np.isclose(score["mean"], np.mean([line["correct"] for line in lines]))
    assert score["pass_at"]["1"] <= score["pass_at"]["2"] <= score["pass_at"]["4"]
    rows = load_rows("countdown:split=eval&count=6")
    assert lines[-1]["ground_truth"] == rows[5]["reward_model"]["ground_truth"]
    again = tmp_path / "again.jsonl"
    kept = ["--verdict_key=correct", "--grader=countdown", "--workers=0"]
    assert run(["grade", str(tmp_path / "generations.jsonl"), *kept, f"--out={again}"]) == 0
    verdicts = [json.loads(s) for s in again.read_text().splitlines()]
    assert all(line["correct"] == line["expected"] for line in verdicts)


def test_evaluate_adds_an_adapter(tmp_path: Path) -> None:
    """The same samples as of the merged model, and others than of the base."""
    base, params = load_model(ASSETS, dtype="float32")
    lora = Lora.uniform(base.config, ("q", "v", "down"), rank=2, alpha=4.0, rslora=False)
    adapters = init_adapters(base, lora, jax.random.key(0), init="kaiming")
    adapters = jax.tree.map(lambda x: x + 0.02, adapters)  # b is no longer zero
    model, params = with_adapters(base, params, lora, adapters)
    save_adapter(tmp_path / "adapter", model, params, base="builtin:countdown")
    save_model(tmp_path / "merged", model, params, load_tokenizer(str(ASSETS)), dtype="float32")
    common = ["--data=countdown:split=eval&count=8", "--samples=2", "--temperature=1.0"]
    common += ["--max_new_tokens=24", "--dtype=float32", "--workers=0", "--devices=1"]
    texts = {}
    for name, which in (
        ("adapter", ["--model=builtin:countdown", f"--adapter={tmp_path / 'adapter'}"]),
        ("merged", [f"--model={tmp_path / 'merged'}"]),
        ("base", ["--model=builtin:countdown"]),
    ):
        out = tmp_path / f"scores_{name}"
        assert run(["evaluate", *which, *common, f"--out={out}"]) == 0
        lines = (out / "generations.jsonl").read_text().splitlines()
        texts[name] = [json.loads(line)["response"] for line in lines]
    assert texts["adapter"] == texts["merged"] != texts["base"]


def test_grade_writes_each_line_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    truth = {"numbers": [5, 7, 9], "target": 45}
    given = [
        {"response": "9*5=45", "answer": truth, "id": 1},
        {"response": "9*7=63", "answer": truth, "id": 2},
        {"response": "\x00" + "(" * 100_000, "answer": truth, "id": 3},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in given))
    assert run(["grade", str(source), "--grader=countdown", f"--out={out}", "--workers=0"]) == 0
    graded = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["correct"] for line in graded] == [True, False, False]
    assert [line["id"] for line in graded] == [1, 2, 3]
    assert "1 of 3 correct" in capsys.readouterr().out


def test_grade_leaves_what_stands_at_its_output_until_all_is_graded(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"response": "\\\\boxed{1}", "answer": "1"}\nno JSON\n')
    out.write_text("graded before\n")
    with pytest.raises(UserError, match="line 2"):
        run(["grade", str(source), "--grader=math", f"--out={out}", "--workers=0"])
    assert out.read_text() == "graded before\n"
    with pytest.raises(UserError, match="is the file that is graded"):
        run(["grade", str(source), "--grader=math", f"--out={source}", "--workers=0"])
    assert source.read_text().endswith("no JSON\n")
    source.write_text('{"response": "\\\\boxed{1}", "answer": "1"}\n')
    (tmp_path / "link.jsonl").symlink_to(out)
    run(["grade", str(source), "--grader=math", f"--out={tmp_path / 'link.jsonl'}", "--workers=0"])
    assert (tmp_path / "link.jsonl").is_symlink() and '"correct": true' in out.read_text()
    with pytest.raises(UserError, match="--workers: '-1': must be a whole number from 0"):
        run(["grade", str(source), "--grader=math", "--workers=-1"])


def test_grade_reads_text_prompts_and_byte_order_marks_and_counts_failed_grading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grader is a TRL function in the current folder, which the program finds by itself."""
    (tmp_path / "my_rules.py").write_text(
        "def ends_alike(prompts, completions, **columns):\n"
        "    if 'broken' in prompts[0]:\n"
        "        raise RuntimeError('no rule')\n"
        "    return [float(c.endswith(p[-1])) for p, c in zip(prompts, completions)]\n"
    )
    lines = [
        {"prompt": "say 7", "response": "it is 7", "answer": ""},
        {"prompt": "say 8", "response": "it is 7", "answer": ""},
        {"prompt": "broken", "response": "it is 7", "answer": ""},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    program = [str(Path(sys.executable).with_name("echorl")), "grade", "lines.jsonl"]
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run(
        [*program, "--grader=my_rules:ends_alike", "--out=out.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    judged = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in judged] == [True, False, False]
    assert judged[0]["prompt"] == "say 7"
    assert "1 of 3 correct (33.3%); 1 could not be graded and count as wrong" in done.stdout
    assert "line 3: " in done.stdout and "no rule" in done.stdout


def test_grade_leaves_unjudged_lines_out_of_its_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    # Odd targets are not judged; a first digit up to 5 is right.
    given = [("1", 2, True), ("9", 2, True), ("1", 3, True), ("2", 4, True), ("9", 5, False)]
    lines = [
        {"response": text, "answer": {"target": target}, "right": verdict}
        for text, target, verdict in given
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    grader = "--grader=tests.environment.slow_graders:every_other"
    assert run(["grade", str(source), grader, f"--out={out}", "--verdict_key=right"]) == 0
    graded = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["correct"] for line in graded] == [True, False, None, True, None]
    assert graded[2]["score"] is None and graded[2]["reason"] == "not judged"
    printed = capsys.readouterr().out
    assert "2 of 3 correct (66.7%); 2 more not judged: the grader returned None\n" in printed
    assert "right ones accepted: 2 of 3 (66.7%); wrong ones rejected: 0 of 0\n" in printed
    assert "agreement: 2 of 3" in printed and "line 3" not in printed


def test_grade_compares_with_another_judge(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    truth = {"numbers": [5, 7, 9], "target": 45}
    # The other judge is right on two lines and mistaken on one each way.
    judged = [("9*5=45", True), ("9*7=63", False), ("5*9=45", False), ("7*9=63", True)]
    lines = [{"response": text, "answer": truth, "correct": verdict} for text, verdict in judged]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["grade", str(source), "--grader=countdown", f"--out={out}", "--workers=0"]
    assert run([*command, "--verdict_key=correct"]) == 0
    printed = capsys.readouterr().out
    assert "right ones accepted: 1 of 2 (50.0%); wrong ones rejected: 1 of 2 (50.0%)" in printed
    assert "agreement: 2 of 4 (50.0%); accepting everything would get 2 of 4" in printed
    assert "line 3: judged wrong before, now: reaches 45" in printed
    graded = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["expected"] for line in graded] == [True, False, False, True]
    assert [line["correct"] for line in graded] == [True, False, True, False]
    with pytest.raises(UserError, match="line 1: 'id' is neither true nor false"):
        run([*command, "--verdict_key=id"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"response": "x"', "line 1: not JSON"),
        ("[1]", "line 1: expected an object, found list"),
        ('{"output": "x", "answer": 1}', "no text in 'response'"),
        ('{"response": "x"}', "no 'answer' or 'ground_truth'"),
    ],
)
def test_grade_names_the_bad_line(tmp_path: Path, text: str, expected: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text + "\n")
    with pytest.raises(UserError, match=expected):
        run(["grade", str(source), "--workers=0"])


def test_check_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = ["check", "--config=configs/countdown.py", "--rows=16"]
    assert run(config) == 0
    assert "16 of 16 gold answers right" in capsys.readouterr().out
    assert run([*config, "--config.data.eval=countdown:split=train&count=16"]) == 1
    assert "overlap: 16 of 16" in capsys.readouterr().out
    assert run([*config, "--config.data.max_prompt_tokens=3"]) == 1
    wrong = tmp_path / "wrong.jsonl"
    rows = [dict(row) for row in load_rows("countdown:count=4")]
    for row in rows:
        row["reward_model"] = {"ground_truth": {"numbers": [1, 1, 1], "target": 400}}
    wrong.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run([*config, f"--config.data.train={wrong}"]) == 1
    assert "gold answer refused" in capsys.readouterr().out


def test_convert_there_and_back_is_bit_identical(tmp_path: Path) -> None:
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    assert run(["convert", "--model=builtin:countdown", f"--out={orbax}"]) == 0
    assert run(["convert", f"--model={orbax}", f"--out={back}"]) == 0
    before, after = load_file(ASSETS / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and np.array_equal(tensor, after[name]), name
    with pytest.raises(UserError, match="exists already"):
        run(["convert", "--model=builtin:countdown", f"--out={back}"])
