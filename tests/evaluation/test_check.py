"""``echorl check`` on good and damaged copies of real files, and the search for contamination."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echorl_jax.cli import run
from echorl_jax.errors import UserError
from echorl_jax.evaluation.contamination import find_overlap

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files")
PARQUET = ["luffy_eval_aime24_aime25_amc_math500", "luffy_eval_arc_c_600", "luffy_train_expert"]
PARQUET += ["mmlu_pro_600", "uft_countdown_test_512", "uft_countdown_train", "uft_math_700"]
JSONL = ["gsm8k_test", "gsm8k_train_1000", "math_train_1000"]
FILES = [f"{name}.parquet" for name in PARQUET] + [f"{name}.jsonl" for name in JSONL]
# Where a row's right answer stands, and how to make it wrong or no answer at all.
ANSWER = {"mmlu_pro_600": "answer", **dict.fromkeys(JSONL, "answer")}
COUNT = 12
SUMS = [{"question": f"1+{i}?", "answer": f"{1 + i}"} for i in range(3)]


def read(name: str) -> list[dict]:
    path = SHARED / name
    if path.suffix == ".parquet":
        return pq.read_table(path).slice(0, COUNT).to_pylist()
    with path.open() as file:
        return [json.loads(line) for line, _ in zip(file, range(COUNT), strict=False)]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(path: Path, *more: str) -> int:
    return run(
        [
            *("check", "--config=configs/countdown.py", "--rows=12"),
            *(f"--config.data.train={path}", "--config.data.eval=", "--config.eval.every=0", *more),
            *("--config.data.template=plain", "--config.data.max_prompt_tokens=4096"),
        ]
    )


def empty_answer(row: dict) -> dict:
    if row.get("reward_model"):
        return {**row, "reward_model": {**row["reward_model"], "ground_truth": None}}
    return {**row, "answer": ""}


def without_prompt(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("prompt", "question", "problem")}


@needs_files
@pytest.mark.parametrize("name", FILES)
def test_good_copies_pass_and_damaged_ones_are_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = read(name)
    path = write(tmp_path / name, rows)
    assert check(path) == 0
    assert f"{COUNT} rows, {COUNT} looked at" in capsys.readouterr().out

    damages: list[tuple[Callable[[dict], dict], str]] = [
        (empty_answer, "ground_truth|answer"),
        (without_prompt, "prompt"),
    ]
    place = "row 7" if path.suffix == ".parquet" else "line 8"
    for damage, column in damages:
        broken = [damage(row) if i == 7 else row for i, row in enumerate(rows)]
        write(path, broken)
        with pytest.raises(UserError, match=rf"{name}, {place}, column \S*({column})"):
            check(path)
        assert check(path, "--config.data.on_bad_row=skip") == 0
        assert "left out: 1 bad rows" in capsys.readouterr().out

    path.write_bytes((SHARED / name).read_bytes()[:3000])
    with pytest.raises(UserError, match=name):
        check(path)


@needs_files
@pytest.mark.parametrize(
    "name", ["luffy_train_expert.parquet", "uft_math_700.parquet", "gsm8k_train_1000.jsonl"]
)
def test_answers_of_other_rows_are_found_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The solutions of a file must come to its answers."""
    rows = read(name)
    column = "reward_model" if "reward_model" in rows[0] else "answer"
    moved = [{**row, column: rows[i - 1][column]} for i, row in enumerate(rows)]
    assert check(write(tmp_path / name, moved)) == 1
    printed = capsys.readouterr().out
    assert "gold answer refused: does not equal the answer" in printed
    assert printed.splitlines()[-1] == "wrong: train: grader and gold answers disagree"


@needs_files
def test_an_answer_beyond_the_options_is_named(tmp_path: Path) -> None:
    rows = read("mmlu_pro_600.parquet")
    rows[3]["answer"] = "Q"
    with pytest.raises(UserError, match=r"row 3, column answer: 'Q', but there are only \d+ opt"):
        check(write(tmp_path / "choices.parquet", rows))


@needs_files
def test_rows_without_experts_cannot_train_sft(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path / "plain.jsonl", SUMS)
    assert check(path) == 0
    assert check(path, "--config.objective.name=luffy") == 1
    printed = capsys.readouterr().out
    assert "expert texts: 0 of 3 rows have one" in printed
    assert "wrong: train: luffy needs expert texts" in printed
    expert = SHARED / "luffy_train_expert.parquet"
    assert check(expert, "--config.objective.name=luffy", "--show=1") == 0
    printed = capsys.readouterr().out
    assert "expert texts: 12 of 12" in printed and "systematic, thorough" in printed


def test_a_failing_grader_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "plain.jsonl", SUMS)
    assert check(path, "--config.data.grader=os.path:join") == 1
    assert "6 verdicts failed, the first: the grader raised" in capsys.readouterr().out


@needs_files
def test_overlap_of_real_files_is_where_their_source_says() -> None:
    """Each expert row names the row of the test set that it was made from."""
    experts = pq.read_table(SHARED / "luffy_train_expert.parquet").to_pylist()
    with (SHARED / "gsm8k_test.jsonl").open() as file:
        test = [json.loads(line)["question"] for line in file]
    prompts = [row["prompt"][-1]["content"] for row in experts]
    found = {o.held_out: o.train for o in find_overlap(prompts, test) if o.same}
    assert found == {row["extra_info"]["source_index"]: i for i, row in enumerate(experts)}


@needs_files
def test_test_problems_in_ufts_frame_are_found(capsys: pytest.CaptureFixture) -> None:
    """UFT's MATH rows are from the test set, of which MATH-500 is a part; one of them by hand."""
    benchmark = SHARED / "luffy_eval_aime24_aime25_amc_math500.parquet"
    assert check(SHARED / "uft_math_700.parquet", f"--config.data.eval={benchmark}") == 1
    printed = capsys.readouterr().out
    assert "overlap: 62 of 643 evaluation problems are among the 700 training" in printed
    both = [
        pq.read_table(path).to_pylist() for path in (SHARED / "uft_math_700.parquet", benchmark)
    ]
    assert "evaluation row 49 is training row 212" in printed and "  and 52 more" in printed
    for row in (both[0][212], both[1][49]):
        assert "Half the value of $3x-9$ is $x+37$. What is the value of $x$?" in str(row["prompt"])


def test_a_changed_problem_is_nearly_the_same() -> None:
    draw = random.Random(0)
    vocabulary = [f"word{i}" for i in range(400)]
    texts = [" ".join(draw.choices(vocabulary, k=40)) for _ in range(30)]
    frame = "Solve the problem below step by step and put the answer into a box. "
    changed = texts[5].replace(texts[5].split()[20], "other", 1)
    held_out = [frame + changed, frame + texts[9].upper(), *(frame + "new " * 3 for _ in range(20))]
    near, same = find_overlap([frame + text for text in texts], held_out)
    assert (same.held_out, same.train, same.same) == (1, 9, True)
    # 46 + 8 - 1 words with 33 telling 8-grams or more, 8 of which hold the changed word.
    assert (near.held_out, near.train, near.same) == (0, 5, False)
    assert 0.7 < near.share < 0.9


def test_golds_are_tried_in_a_second_spelling(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    golds = ["4.5e33", "1e-05", "0.125", r"\frac{3}{4}", "12345", r"\text{East}", "x+1"]
    rows = [{"question": f"{i}?", "answer": gold} for i, gold in enumerate(golds)]
    path = write(tmp_path / "golds.jsonl", rows)
    assert check(path) == 0
    assert "grader: 6 of 6 right in a second spelling" in capsys.readouterr().out
    strict = "--config.data.grader=tests.environment.slow_graders:by_letter"
    assert check(path, strict) == 0  # the user's grader may want one spelling
    printed = capsys.readouterr().out
    assert "grader: 0 of 6 right in a second spelling" in printed
    unjudged = "--config.data.grader=tests.environment.slow_graders:nothing"
    assert check(path, unjudged) == 1
    assert "gold answers not judged, it returned None for them" in capsys.readouterr().out
    assert r"second spelling refused: '4.5 \\times 10^{33}' for '4.5e33'" in printed


RULES = """
def partly(response, row):
    return 0.8 if row["reward_model"]["ground_truth"] in response else 0.0

def form(response, row):
    return float("boxed" in response)
"""


def test_a_plain_score_below_one_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With a threshold the same score is a success; the end of a long text is shown."""
    (tmp_path / "rules.py").write_text(RULES)
    long = {"role": "assistant", "content": f"{'words ' * 30}so it is 1"}
    rows = [{**row, "target": [long]} if i == 0 else row for i, row in enumerate(SUMS)]
    path = write(tmp_path / "plain.jsonl", rows)
    grader = (
        f"--config.data.grader={tmp_path / 'rules.py'}:partly, {tmp_path / 'rules.py'}:form@0.1"
    )
    assert check(path, grader) == 1
    printed = capsys.readouterr().out
    assert "gold answer refused: partly: scored 0.8; form: scored 0: ...'" in printed
    assert "words so it is 1' for '1'" in printed
    assert "a plain score below 1 is no success" in printed
    assert "grader: form is 0.666667 on average for gold answers" in printed
    assert check(path, grader, "--config.objective.success_threshold=0.8") == 0
    assert "below 1" not in capsys.readouterr().out
    assert check(path, grader, "--config.objective.success_threshold=0.9") == 1
    printed = capsys.readouterr().out
    assert "below objective.success_threshold = 0.9 is no success" in printed


def test_prompts_and_stops_are_those_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}{{ end }}")
    targets = ["2.\nSo \\boxed{1}", "\\boxed{2}", "\\boxed{3}"]
    rows = [
        {**row, "target": [{"role": "assistant", "content": text}]}
        for row, text in zip(SUMS, targets, strict=True)
    ]
    path = write(tmp_path / "plain.jsonl", rows)
    more = ['--config.data.template_kwargs={"end": "now"}', "--show=1"]
    more += ["--config.data.system_prompt=Sum.", '--config.rollout.stop_strings=["\\n"]']
    words = ["check", "--config=configs/countdown.py", f"--config.data.train={path}"]
    words += ["--config.data.eval=", "--config.eval.every=0", f"--config.data.template={template}"]
    assert run([*words, *more]) == 0
    printed = capsys.readouterr().out
    assert "tokens: 'system:Sum.|user:1+0?|now'" in printed
    assert "stop strings: 1 of 3 gold answers go on after one" in printed
    with pytest.raises(UserError, match="config.rollout.stop_ids = .*ids from 0 to"):
        run([*words, "--config.rollout.stop_ids=5,100000"])
