"""``echorl analyze``: its files and sections against values computed independently."""

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import dump_lines, write_run

from echorl_jax.errors import UserError
from echorl_jax.files import read_jsonl
from echorl_jax.tools.report.analyze import Analysis, analyze

SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"


def rows_of(path):
    return list(read_jsonl(path))


def test_the_studies_of_a_run_need_no_options(tmp_path):
    runs = [write_run(tmp_path / name, echo=name == "echo") for name in ("echo", "plain")]
    *files, report = analyze(Analysis(workdir=runs[0], compare=(runs[1],)))
    assert [path.name for path in files] == ["collapse.jsonl", "entropy_law.jsonl", "clips.jsonl"]
    assert [row["run"] for row in rows_of(files[0])] == ["echo", "plain"]
    text = report.read_text()
    assert "Entropy collapse" in text and "Where clips end" in text and "Entropy law" in text


def test_stored_entropies_need_no_model(tmp_path):
    right = {"correct": True, "entropy": [1.0, 3.0, 5.0], "step_ids": [0, 0, 1]}
    wrong = {"correct": False, "entropy": [0.5], "step_ids": [0]}
    unjudged = {**wrong, "correct": None}
    dump_lines(tmp_path / "rollouts.jsonl", [wrong, right, unjudged])
    workdir = tmp_path / "new"
    profiles, steps, report = analyze(
        Analysis(workdir=workdir, rollouts=tmp_path / "rollouts.jsonl")
    )
    found = {row["source"]: row for row in rows_of(profiles)}
    assert list(found) == ["right answers", "unjudged answers", "wrong answers"]
    # Tokens (1 + 3 + 5) / 3, steps (2 + 5) / 2, highest step 5.
    means = [found["right answers"][f"{what}_mean"] for what in ("token", "step", "peak")]
    assert means == pytest.approx([3.0, 3.5, 5.0])
    assert rows_of(steps)[0]["step_entropy"] == [2.0, 5.0] and rows_of(steps)[0]["peak_step"] == 1
    text = report.read_text()
    # Without a run the page has no empty ledger and config.
    assert (
        "Entropy of trajectories" in text
        and 'id="ledger"' not in text
        and 'id="config"' not in text
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to study"),
        ({"studies": ("entropie",)}, "unknown study 'entropie'"),
        ({"data": "countdown:"}, "--model is missing"),
        ({"studies": ("deletion",)}, "--model is missing"),
        ({"model": "builtin:countdown"}, "--data is missing"),
        ({"studies": ("entropy",)}, "--rollouts with stored entropies"),
        ({"rollouts": Path("none.jsonl")}, "none.jsonl: no such file"),
        ({"deletions": (-1,)}, "--deletions"),
        ({"samples": 5000}, "--samples=5000: at most 4096"),
        ({"studies": ("run",)}, "not a directory|holds no run"),
    ],
)
def test_a_missing_or_wrong_option_is_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        analyze(Analysis(workdir=tmp_path / "new", **options))


def test_rollouts_without_entropies_are_named_by_line(tmp_path):
    good = {"entropy": [1.0], "step_ids": [0]}
    dump_lines(tmp_path / "r.jsonl", [good, good | {"step_ids": [0, 1]}])
    with pytest.raises(UserError, match="r.jsonl, line 2: no entropy"):
        analyze(Analysis(workdir=tmp_path / "new", rollouts=tmp_path / "r.jsonl"))


def reaches(lines, numbers, target):
    """Countdown by hand: each line's numbers are at hand, each once; the last makes the target."""
    at_hand, result = sorted(numbers), None
    for line in lines:
        left, result = line.split("=")
        sign = next(s for s in "+-*" if s in left)
        a, b = (int(part) for part in left.split(sign))
        result = int(result)
        for used in (a, b):
            if used not in at_hand:
                return False
            at_hand.remove(used)
        if {"+": a + b, "-": a - b, "*": a * b}[sign] != result:
            return False
        at_hand.append(result)
    return result == target


@pytest.mark.slow
def test_deletion_on_countdown(tmp_path):
    from echorl_jax.data import encode_prompt, load_rows, load_tokenizer
    from echorl_jax.data.tokens import BUILTIN
    from echorl_jax.models import load_model

    data = "countdown:split=eval&count=48&seed=5"
    options = Analysis(
        workdir=tmp_path / "out",
        studies=("deletion",),
        model="builtin:countdown",
        data=data,
        dtype="float32",
        max_new_tokens=32,
        samples=2,
        batch=96,
        workers=0,
    )
    curve, outcomes, report = analyze(options)
    problems, found = load_rows(data), rows_of(outcomes)
    for row in found:
        lines = row["left"].splitlines()
        assert len(lines) == row["steps"] - row["deleted"]
        assert row["answer"].startswith(row["left"].rstrip("\n"))
        truth = problems[row["row"]]["reward_model"]["ground_truth"]
        if row["deleted"] == 0:
            assert reaches(lines, truth["numbers"], truth["target"])
    points = {(row["order"], row["deleted"]): row for row in rows_of(curve)}
    assert len(points) == 9
    for (order, deleted), point in points.items():
        own = [row for row in found if (row["order"], row["deleted"]) == (order, deleted)]
        assert point["trials"] == len(own) >= 10
        assert point["success"] == pytest.approx(np.mean([row["correct"] for row in own]))
        # A bound at a share of 0 or 1 may be off by a rounding.
        assert -1e-9 <= point["low"] - 1e-9 <= point["success"] <= point["high"] + 1e-9
    # Without any step left all orders leave the same: nothing.
    assert len({points[order, 2]["success"] for order in ("high", "low", "random")}) == 1
    # Which line goes first, by the entropies that the model gives without this package's studies.
    model, params = load_model(str(BUILTIN["builtin:countdown"]), dtype="float32")
    tokenizer = load_tokenizer("builtin:countdown")
    whole = {row["row"]: row["left"] for row in found if row["deleted"] == 0}
    agreed = 0
    for row in [row for row in found if (row["order"], row["deleted"]) == ("high", 1)][:8]:
        prompt = encode_prompt(tokenizer, problems[row["row"]])
        ids = tokenizer.encode(whole[row["row"]], add_special_tokens=False)
        logits = np.asarray(model.logits(params, np.array([prompt + ids], np.int32)), np.float64)[0]
        entropy = [_entropy(logits[len(prompt) - 1 + t]) for t in range(len(ids))]
        ends = np.cumsum(["\n" in tokenizer.decode([i]) for i in ids])
        step = ends - np.array(["\n" in tokenizer.decode([i]) for i in ids])
        means = [np.mean([h for h, s in zip(entropy, step, strict=True) if s == k]) for k in (0, 1)]
        lines = whole[row["row"]].splitlines()
        agreed += row["left"].strip() == lines[1 - int(np.argmax(means))]
    assert agreed == 8
    assert "Step deletion" in report.read_text()


@pytest.mark.slow
def test_golden_entropy_on_expert_trajectories(tmp_path):
    data = SHARED_DATA / "luffy_train_expert.parquet"
    if not data.is_file():
        pytest.skip(f"no {data}")
    from echorl_jax.data import encode_prompt, load_rows, load_tokenizer
    from echorl_jax.models import load_model
    from tests.tiny_models import write_tiny_qwen

    model_dir = write_tiny_qwen(tmp_path / "qwen", SHARED_DATA / "tokenizers" / "qwen2_5")
    options = Analysis(
        workdir=tmp_path / "golden",
        studies=("entropy",),
        model=str(model_dir),
        data=str(data),
        limit=3,
        template="plain",
        dtype="float32",
        max_new_tokens=64,
        batch=3,
        workers=0,
    )
    profiles, steps, report = analyze(options)
    found = {row["source"]: row for row in rows_of(profiles)}
    assert {name: row["trajectories"] for name, row in found.items()} == {"expert": 3, "policy": 3}
    assert sum(found["expert"]["token_histogram"]) == pytest.approx(1.0)
    assert "Entropy of trajectories" in report.read_text()
    # The first expert trajectory's mean entropy, from dense logits.
    tokenizer, row = load_tokenizer(str(model_dir)), load_rows(str(data))[0]
    model, params = load_model(str(model_dir), dtype="float32")
    prompt = encode_prompt(tokenizer, row, "plain")
    ids = tokenizer.encode(row["target"][0]["content"], add_special_tokens=False)[:64]
    tokens = np.array([prompt + ids], np.int32)
    logits = np.asarray(model.logits(params, tokens), np.float64)[0]
    expected = np.mean([_entropy(logits[len(prompt) - 1 + t]) for t in range(64)])
    assert rows_of(steps)[0]["token_entropy"] == pytest.approx(expected, rel=1e-4)
    # Its own trajectories, read from a file, are scored under the model too.
    rollouts = tmp_path / "generations.jsonl"
    rollouts.write_text(json.dumps({"prompt": row["prompt"], "response": "1\n2\n3"}) + "\n")
    again = Analysis(**vars(options) | {"rollouts": rollouts, "workdir": tmp_path / "again"})
    own = rows_of(analyze(again)[1])[-1]
    assert own["source"] == "policy" and len(own["step_entropy"]) == 3


def _entropy(logits):
    shifted = logits - logits.max()
    p = np.exp(shifted) / np.exp(shifted).sum()
    return float(-(p * np.log(p)).sum())
