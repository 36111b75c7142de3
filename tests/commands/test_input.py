"""Texts and tokenizers that a model cannot take: every command says so in one line."""

import io
import json
import shutil
from pathlib import Path

import pytest

import echorl_jax
from echorl_jax.cli import run
from echorl_jax.data import load_tokenizer
from echorl_jax.errors import UserError

ASSETS = Path(echorl_jax.__file__).parent / "assets"
BUGS = Path(__file__).parents[3] / "shared" / "bugs"
SIZE = 512  # rows of the tiny model's embedding
CHECK = ["check", "--config=configs/countdown.py"]
TRAIN = ["train", "--config=configs/countdown.py"]
SFT = ["sft", "--config=configs/countdown_sft.py", "--config.model.init=pretrained"]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose tokenizer got <think> as token 512 while the embedding has 512 rows."""
    path = tmp_path_factory.mktemp("grown") / "model"
    shutil.copytree(ASSETS / "countdown", path)
    tokenizer = load_tokenizer(str(path))
    tokenizer.add_tokens([f"<filler {i}>" for i in range(SIZE - len(tokenizer))])
    tokenizer.add_tokens(["<think>", "<unused>"])
    assert tokenizer.convert_tokens_to_ids("<think>") == SIZE
    tokenizer.save_pretrained(str(path))
    return path


def write_rows(path: Path, question: str, thought: str) -> Path:
    row = {
        "prompt": [{"role": "user", "content": question}],
        "target": [{"role": "assistant", "content": f"{thought} 3*2=6"}],
        "reward_model": {"ground_truth": {"numbers": [2, 3], "target": 6}},
        "data_source": "countdown",
    }
    path.write_text(2 * (json.dumps(row) + "\n"))
    return path


def commands(name: str, model: Path, data: Path, out: Path) -> list[str]:
    config = [f"--config.model.path={model}", f"--config.data.train={data}", "--config.data.eval="]
    config += ["--config.eval.every=0", f"--workdir={out}"]
    direct = [f"--model={model}", f"--data={data}", "--workers=0", "--max_new_tokens=8"]
    return {
        "check": [*CHECK, *config[:-1]],
        "train": [*TRAIN, *config],
        "luffy": [*TRAIN, *config, "--config.objective.name=luffy"],
        "uft": [*TRAIN, *config, "--config.objective.name=uft"],
        "sft": [*SFT, *config],
        "check sft": [*CHECK, *config[:-1], "--config.objective.name=sft"],
        "eval": [*TRAIN, *config, "--config.data.train=countdown:", f"--config.data.eval={data}"]
        + ["--config.eval.every=5"],
        "evaluate": ["evaluate", *direct, f"--out={out}", "--devices=1"],
        "analyze": ["analyze", "entropy", *direct, f"--workdir={out}"],
    }[name]


@pytest.mark.parametrize(
    "name", ["check", "train", "luffy", "uft", "sft", "eval", "evaluate", "analyze"]
)
def test_a_prompt_with_a_token_beyond_the_embedding_is_one_line(
    grown: Path, tmp_path: Path, name: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "<think>Reach 6 with 2, 3.", "")
    with pytest.raises(UserError, match=r"token 512 \('<think>'\) is beyond .* vocabulary of 512"):
        run(commands(name, grown, rows, tmp_path / "out"))


@pytest.mark.parametrize("name", ["check sft", "luffy", "uft", "sft", "analyze"])
def test_an_expert_text_with_a_token_beyond_the_embedding_is_one_line(
    grown: Path, tmp_path: Path, name: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "Reach 6 with 2, 3.", "<think>")
    with pytest.raises(UserError, match=r"token 512 \('<think>'\) is beyond"):
        run(commands(name, grown, rows, tmp_path / "out"))


@pytest.mark.skipif(not BUGS.is_dir(), reason="no reported files beside the repository")
def test_the_reported_demonstrations_are_refused(grown: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 0, expert text: token 512"):
        run(commands("sft", grown, BUGS / "sft_rows.jsonl", tmp_path / "out"))


def test_expert_texts_that_are_not_used_and_unused_tokens_do_not_matter(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "Reach 6 with 2, 3.", "<think>")
    run(commands("check", grown, rows, tmp_path / "out"))
    assert "longest 11 tokens" in capsys.readouterr().out


def test_code_in_a_model_directory_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the user confirms the question that transformers would ask."""
    model, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(ASSETS / "countdown", model)
    (model / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    changes = {
        "config.json": {
            "model_type": "unknown",
            "auto_map": {"AutoConfig": "code.Config", "AutoTokenizer": ["code.T", "code.T"]},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Unknown",
            "auto_map": {"AutoTokenizer": ["code.T", "code.T"]},
        },
    }
    for name, fields in changes.items():
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        with pytest.raises(UserError) as error:
            run([*CHECK, f"--config.model.path={model}"])
        assert "\n" not in str(error.value)
    assert not mark.exists()


def test_positions_beyond_the_models_are_told_before_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model is made for 2,048 positions."""
    longer = ["--config.rollout.max_new_tokens=2000", "--config.data.max_prompt_tokens=512"]
    said = "may reach 512 + 2000 = 2512 tokens, but the model is made for 2048 positions"
    run([*CHECK, *longer, "--rows=2"])
    assert said in capsys.readouterr().out
    run(["plan", "--config=configs/countdown.py", *longer, "--estimate"])
    assert said in capsys.readouterr().err
    run([*SFT, *longer, "--config.steps=0", "--config.eval.every=0", f"--workdir={tmp_path / 'w'}"])
    assert said in "".join(capsys.readouterr())
    arguments = ["--model=builtin:countdown", "--data=countdown:count=1", "--workers=0"]
    arguments += [f"--out={tmp_path / 'e'}", "--devices=1", "--dtype=float32"]
    run(["evaluate", *arguments, "--max_new_tokens=2047"])
    assert "+ 2047 = 20" in (told := capsys.readouterr().err) and "2048 positions" in told
    run([*CHECK, "--rows=2"])
    assert "positions" not in capsys.readouterr().out
