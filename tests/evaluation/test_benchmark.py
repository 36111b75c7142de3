"""``echorl evaluate``: what is tried how often, and that a killed evaluation goes on exactly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from echorl_jax.cli import run
from echorl_jax.data.tokens import model_path
from echorl_jax.errors import UserError
from echorl_jax.evaluation.benchmark import Benchmark
from echorl_jax.evaluation.presets import passes, samples_of
from echorl_jax.evaluation.progress import EvaluationProgress
from echorl_jax.rollout import Progress
from tests.several import free_port
from tests.tiny_models import write_tiny_qwen

SHARED = Path(__file__).parents[3] / "shared" / "data"
COUNTDOWN = ["evaluate", "--model=builtin:countdown", "--data=countdown:split=eval&count=10"]
COUNTDOWN += ["--samples=3", "--greedy", "--max_new_tokens=24", "--dtype=float32", "--workers=0"]
COUNTDOWN += ["--devices=1", "--batch=12"]


def lines(out: Path) -> list[dict]:
    return [json.loads(text) for text in (out / "generations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert run([*COUNTDOWN, f"--out={out}"]) == 0
    return out


def test_greedy_and_sampled_attempts_are_scored_apart(whole: Path) -> None:
    found = lines(whole)
    expected = [(problem, 0, True) for problem in range(10)]
    expected += [(problem, sample, False) for problem in range(10) for sample in range(3)]
    assert [(line["problem"], line["sample"], line["greedy"]) for line in found] == expected
    score = json.loads((whole / "scores.json").read_text())["scores"]["countdown"]
    greedy = [line["correct"] for line in found if line["greedy"]]
    right = np.array([line["correct"] for line in found if not line["greedy"]]).reshape(10, 3)
    assert score["greedy"]["mean"] == pytest.approx(np.mean(greedy))
    assert score["mean"] == pytest.approx(right.mean())
    # 3 samples: pass@3 is whether any is right; pass@2 fails when the drawn pair is wrong.
    misses = 3 - right.sum(axis=1)
    assert score["pass_at"]["3"] == pytest.approx((misses < 3).mean())
    assert score["pass_at"]["2"] == pytest.approx(1 - np.mean(misses * (misses - 1) / 6))
    tokens = [line["tokens"] for line in found if not line["greedy"]]
    assert score["lengths"]["mean"] == pytest.approx(np.mean(tokens))
    assert score["lengths"]["longest"] == max(tokens)


def test_tokens_of_all_calls_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Calls of one look or several, larger and smaller than the one before, one unfinished."""
    with EvaluationProgress(12, done=4) as shown:
        for done, tokens, seconds in [(4, 40, 2.0), (4, 40, 2.0), (2, 50, 1.0), (4, 90, 2.0)]:
            shown.look(Progress(4, done, tokens, seconds, slots=4, occupancy=1.0))
        shown.look(Progress(4, 1, 10, 4.0, slots=4, occupancy=1.0))
        for _ in range(8):
            shown.attempt("math")
    first, last = capsys.readouterr().err.splitlines()
    assert first == "4 of 12 attempts are there already"
    assert last == "8 attempts, 180 tokens at 18 tokens/s"


@pytest.mark.parametrize("kept", [0, 7, 10, 23, 39])
def test_a_killed_evaluation_ends_with_the_same_files(
    whole: Path, tmp_path: Path, kept: int
) -> None:
    """Killed after some lines, in the middle of the next one."""
    (tmp_path / "options.json").write_bytes((whole / "options.json").read_bytes())
    written = (whole / "generations.jsonl").read_bytes().splitlines(keepends=True)
    torn = b"".join(written[:kept]) + written[kept][:20]
    (tmp_path / "generations.jsonl").write_bytes(torn)
    assert run([*COUNTDOWN, f"--out={tmp_path}"]) == 0
    for name in ("generations.jsonl", "scores.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_samples_do_not_depend_on_the_batch(whole: Path, tmp_path: Path) -> None:
    assert run([*COUNTDOWN, "--batch=5", "--slots=2", f"--out={tmp_path}"]) == 0
    assert lines(tmp_path) == lines(whole)


def test_fewer_samples_are_the_first_of_many(whole: Path, tmp_path: Path) -> None:
    few = ["--samples=2", "--limit=4"]
    assert run([*COUNTDOWN, *few, f"--out={tmp_path}"]) == 0
    wanted = [line for line in lines(whole) if line["sample"] < 2 and line["problem"] < 4]
    assert lines(tmp_path) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature=0.9"], "evaluation with temperature = None, not 0.9"),
        (["--limit=9"], "evaluation with rows = "),
        (["--seed=1"], "with seed = 0, not 1"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(
    whole: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run([*COUNTDOWN, *options, f"--out={whole}"])


def test_a_date_in_the_chat_template_is_that_of_the_first_start(tmp_path: Path) -> None:
    """The template writes the microsecond of the rendering; the second command goes on."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_path("builtin:countdown"), model)
    file = model / "tokenizer_config.json"
    clock = "{{ strftime_now('%M%S%f') }} {{ messages[0]['content'] }}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": clock}))
    command = ["evaluate", f"--model={model}", *COUNTDOWN[2:], "--limit=2", "--samples=1"]
    assert run([*command, f"--out={out}"]) == 0
    first = (out / "generations.jsonl").read_bytes().splitlines(keepends=True)
    assert len(first) == 4
    (out / "generations.jsonl").write_bytes(first[0])
    assert run([*command, f"--out={out}"]) == 0
    assert (out / "generations.jsonl").read_bytes().splitlines(keepends=True) == first
    options = json.loads((out / "options.json").read_text())
    options["started"] = "2020-01-01T00:00:00"
    (out / "options.json").write_text(json.dumps(options))
    with pytest.raises(UserError, match="holds an evaluation with rows = "):
        run([*command, f"--out={out}"])


def test_gradings_that_fail_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--limit=4", "--samples=1", "--grader=tests.environment.slow_graders:raising"]
    assert run([*COUNTDOWN[:3], *COUNTDOWN[5:], *options, f"--out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["ungraded"] == 4
    assert "4 of 4 attempts count as wrong because their grading failed" in capsys.readouterr().out


def test_rows_that_are_not_judged_are_left_out_of_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--limit=8", "--samples=2", "--grader=tests.environment.slow_graders:every_other"]
    command = [*COUNTDOWN[:3], *COUNTDOWN[5:], *options, f"--out={tmp_path}"]
    assert run(command) == 0
    found = lines(tmp_path)
    judged = [line for line in found if line["ground_truth"]["target"] % 2 == 0]
    left_out = [line for line in found if line["ground_truth"]["target"] % 2]
    assert (
        judged and left_out and all(line["score"] is None is line["correct"] for line in left_out)
    )
    document = json.loads((tmp_path / "scores.json").read_text())
    score = document["scores"]["countdown"]
    assert (document["unjudged"], document["ungraded"]) == (len(left_out), 0)
    assert (score["problems"], score["samples"]) == (len(judged) // 2, 2)
    assert score["mean"] == pytest.approx(np.mean([line["correct"] for line in judged]))
    printed = capsys.readouterr().out
    assert f"left out: {len(left_out)} attempts for which the grader returned None" in printed
    assert run(command) == 0  # reads the lines again


def test_metrics_of_the_grader_are_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--limit=3", "--samples=2", "--grader=tests.environment.slow_graders:measuring"]
    command = [*COUNTDOWN[:3], *COUNTDOWN[5:], *options, f"--out={tmp_path}"]
    assert run(command) == 0
    found = [line["metrics"] for line in lines(tmp_path)]
    score = json.loads((tmp_path / "scores.json").read_text())["scores"]["countdown"]
    words = [metrics["words"] for metrics in found]
    assert len(set(words)) > 1  # the even and the odd targets
    assert score["metrics"] == {"dropped_metrics": 1.0, "words": pytest.approx(np.mean(words))}
    assert "countdown: dropped_metrics 1.000, words" in capsys.readouterr().out
    assert run(command) == 0  # reads the lines again
    text = (tmp_path / "generations.jsonl").read_text()
    assert '"words": ' in text
    (tmp_path / "generations.jsonl").write_text(text.replace('"words": ', '"two words": ', 1))
    with pytest.raises(UserError, match="line 1: not an attempt .*metrics = "):
        run(command)


def test_a_grader_that_judges_nothing_gives_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--limit=2", "--samples=1", "--grader=tests.environment.slow_graders:nothing"]
    assert run([*COUNTDOWN[:3], *COUNTDOWN[5:], *options, f"--out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == {}
    assert capsys.readouterr().out == "left out: 2 attempts for which the grader returned None\n"


def test_a_workdir_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=f"workdir of a run, not a model: take {tmp_path}/export"):
        run([*COUNTDOWN, f"--model={tmp_path}", f"--out={tmp_path / 'out'}"])


def test_foreign_generations_are_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "generations.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"generations.jsonl without options.json"):
        run([*COUNTDOWN, f"--out={tmp_path}"])
    (tmp_path / "options.json").write_bytes((whole / "options.json").read_bytes())
    with pytest.raises(UserError, match=r"generations.jsonl, line 1: not an attempt"):
        run([*COUNTDOWN, f"--out={tmp_path}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples=0"], "--samples=0: must be a number from 1 on"),
        (["--samples=x=2,=3"], "must be a number from 1 on, or PATTERN=number"),
        (["--temperature=0"], "several samples need a --temperature above 0"),
        (["--temperature=-1"], "--temperature: '-1': must be a finite number, 0 or above"),
        (["--top_p=0"], "--top_p=0.0"),
        (["--batch=0"], "--batch: '0': must be a whole number from 1"),
        (["--preset=papers"], "--preset=papers: must be one of paper"),
        (["--max_prompt_tokens=1"], "no prompt is within --max_prompt_tokens=1"),
        (["--samples=5000"], "at most 4096"),
        (["--devices=99"], "--devices=99: there are 8"),
    ],
)
def test_a_wrong_option_is_one_clear_line(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run([*COUNTDOWN, *options, f"--out={tmp_path}"])


def test_the_papers_preset_and_what_wins_over_it() -> None:
    given = {"model": "m", "data": "d", "max_new_tokens": 64, "samples": None}
    settings = Benchmark.of(preset_name="paper", given=given)
    assert (settings.temperature, settings.top_p, settings.template) == (0.6, 1.0, "luffy")
    assert settings.max_new_tokens == 64
    sources = ["aime", "AIME25", "amc", "math", "arc_c"]
    assert [samples_of(settings.samples, source) for source in sources] == [32, 32, 32, 1, 1]
    alone = Benchmark.of(preset_name="paper", given={"model": "m", "data": "d"})
    assert (alone.max_new_tokens, alone.max_prompt_tokens) == (8192, 1024)


def test_rows_are_tried_as_often_as_their_source_says() -> None:
    one, many = passes(["a", "b", "a"], samples="b=4,2", temperature=None, greedy=False)
    assert (one.samples, one.places, one.temperature) == (2, (0, 2), 0.6)
    assert (many.samples, many.places, many.attempts) == (4, (1,), 4)
    (only,) = passes(["a"], samples="1", temperature=None, greedy=False)
    assert only.temperature == 0
    greedy, sampled = passes(["a"], samples="1", temperature=None, greedy=True)
    assert (greedy.temperature, sampled.temperature) == (0, 0.6)


def in_two_processes(*words: str) -> list[tuple[int, str]]:
    """Exit code and last line of each of two processes of two devices."""
    place = {"ECHORL_COORDINATOR": f"127.0.0.1:{free_port()}", "ECHORL_PROCESSES": "2"}
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", "echorl_jax", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **place, **flags, "ECHORL_PROCESS_ID": str(process)},
        )
        for process in (0, 1)
    ]
    said = [process.communicate(timeout=200)[1] for process in pair]
    last = [(text.splitlines() or [""])[-1] for text in said]
    return [(process.returncode, line) for process, line in zip(pair, last, strict=True)]


@pytest.mark.slow
def test_two_processes_write_what_one_does(whole: Path, tmp_path: Path) -> None:
    """Some of it is there already; then the folder belongs to this evaluation."""
    (tmp_path / "options.json").write_bytes((whole / "options.json").read_bytes())
    written = (whole / "generations.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "generations.jsonl").write_bytes(b"".join(written[:13]))
    words = [word for word in COUNTDOWN if not word.startswith("--devices")]
    (code, said), (other, silent) = in_two_processes(*words, f"--out={tmp_path}")
    assert (code, other) == (0, 0) and said.startswith("27 attempts, ")
    assert "attempts" not in silent
    for name in ("generations.jsonl", "options.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    scores = [json.loads((out / "scores.json").read_text())["scores"] for out in (whole, tmp_path)]
    assert scores[0] == scores[1]
    for code, said in in_two_processes(*words, "--seed=1", f"--out={tmp_path}"):
        assert code == 2 and "holds an evaluation with seed = 0, not 1" in said, said


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files")
def test_a_real_kill_and_public_files(tmp_path: Path) -> None:
    """Every kind of benchmark file, with a model that has never seen text, killed by SIGKILL."""
    tiny_qwen = write_tiny_qwen(tmp_path / "model", SHARED / "tokenizers" / "qwen2_5")
    names = ["luffy_eval_aime24_aime25_amc_math500", "luffy_eval_arc_c_600", "mmlu_pro_600"]
    files = [f"{SHARED}/{name}.parquet?limit=6" for name in [*names, "uft_countdown_test_512"]]
    aime = f"{SHARED}/{names[0]}.parquet?source=aime|aime25&limit=4"
    command = [sys.executable, "-m", "echorl_jax", "evaluate", f"--model={tiny_qwen}"]
    command += [f"--data={','.join([*files, aime])}", "--samples=aime*=4,1", "--temperature=0.6"]
    command += ["--max_new_tokens=12", "--template=qwen-math", "--batch=8", "--workers=1"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, f"--out={whole}"], check=True, env=env)
    process = subprocess.Popen([*command, f"--out={killed}"], env=env)
    written = killed / "generations.jsonl"
    while process.poll() is None and not (written.exists() and written.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(lines(killed)) < len(lines(whole))
    subprocess.run([*command, f"--out={killed}"], check=True, env=env)
    assert lines(killed) == lines(whole)
    scores = json.loads((killed / "scores.json").read_text())["scores"]
    assert scores == json.loads((whole / "scores.json").read_text())["scores"]
    counted = {name: (score["problems"], score["samples"]) for name, score in scores.items()}
    assert counted == {
        "aime": (4, 4),
        "math": (6, 1),
        "arc_c": (6, 1),
        "mmlu_pro_600": (6, 1),
        "countdown": (6, 1),
    }
