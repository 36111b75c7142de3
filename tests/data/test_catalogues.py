"""Data sets by name: TFDS and Hugging Face."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from echorl_jax.data import DataError, expert_text, load_rows
from echorl_jax.data.rows import BadRow, normalise_row
from echorl_jax.data.sources import plain_row
from echorl_jax.data.tfds_countdown import examples
from echorl_jax.errors import UserError
from echorl_jax.rewards import load_grader

READ = """
import json, sys
from echorl_jax.data import load_rows
rows = load_rows(sys.argv[1])
print(json.dumps([len(rows), rows[0], "tensorflow" in sys.modules]))
"""


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="^hf:a/b needs a package: pip install 'datasets'$"):
        load_rows("hf:a/b")


def test_tfds_comes_with_a_plain_installation_and_is_imported_for_its_sources_alone():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(line.startswith("tensorflow-datasets") for line in project["dependencies"])
    assert not any(line.startswith("tensorflow>") for line in project["dependencies"])
    code = (
        "import sys; from echorl_jax.data import load_rows; load_rows('countdown:count=2')\n"
        "assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples_are_the_generators_problems():
    key, example = next(examples("eval"))
    assert key == 0 and example["question"].startswith(f"Reach {example['target']} with ")


def test_bytes_that_are_not_utf8_make_only_their_column_unusable():
    row = plain_row({"question": b"1+1?", "answer": b"2", "picture": b"\x89PNG"})
    assert normalise_row(row, source="any")["prompt"] == [{"role": "user", "content": "1+1?"}]
    with pytest.raises(BadRow, match="column question: not UTF-8 text"):
        normalise_row(plain_row({"question": b"caf\xe9", "answer": b"2"}), source="any")


@pytest.mark.slow
def test_our_data_set_is_prepared_once_and_read_without_tensorflow(tmp_path):
    spec = f"tfds:echorl_countdown?split=eval&data_dir={tmp_path}"
    found, written = [], []
    for _ in range(2):
        command = [sys.executable, "-c", READ, spec]
        read = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
        found.append(json.loads(read.stdout.splitlines()[-1]))
        files = tmp_path.rglob("*.array_record*")
        written.append({file: file.stat().st_mtime_ns for file in files})
    assert found[0] == found[1] and written[0] == written[1] != {}
    count, row, tensorflow = found[0]
    assert count == 1024 and not tensorflow
    assert row["data_source"] == "countdown"
    truth = row["reward_model"]["ground_truth"]
    assert row["prompt"][0]["content"].startswith(f"Reach {truth['target']} with ")
    with pytest.raises(DataError, match="split train of nothing|cannot be read"):
        load_rows(f"tfds:no_such_set?data_dir={tmp_path}")


# The published builders, fed with lines in their sources' format instead of a download.
PREPARE = """
import json, sys
from pathlib import Path
from tensorflow_datasets.datasets.ai2_arc.ai2_arc_dataset_builder import Builder
from tensorflow_datasets.text.gsm8k.gsm8k import Gsm8k

out = Path(sys.argv[1])
sums = [{"question": "2+2?", "answer": "It is 2+2=<<2+2=4>>4.\\n#### 4"}]
choices = [{"text": text, "label": label} for text, label in (("ice", "1"), ("steam", "2"))]
arc = [{"id": "a", "question": {"stem": "Hot?", "choices": choices}, "answerKey": "2"}]
for name, lines in (("sums", sums), ("arc", arc)):
    (out / name).write_text("".join(json.dumps(line) + "\\n" for line in lines))
Gsm8k._split_generators = lambda self, _: {"test": self._generate_examples(out / "sums")}
Builder._split_generators = lambda self, _: {"test": self._generate_examples(str(out / "arc"))}
Gsm8k(data_dir=out, file_format="array_record").download_and_prepare()
Builder(data_dir=out, config="ARC-Challenge", file_format="array_record").download_and_prepare()
"""


@pytest.mark.slow
def test_columns_of_published_tfds_sets(tmp_path):
    run = {"check": True, "text": True, "stdout": subprocess.PIPE}
    subprocess.run([sys.executable, "-c", PREPARE, str(tmp_path)], **run)
    rows = {}
    for name in ("gsm8k", "ai2_arc/ARC-Challenge"):
        spec = f"tfds:{name}?split=test&data_dir={tmp_path}"
        read = subprocess.run([sys.executable, "-c", READ, spec], **run)
        count, rows[name], tensorflow = json.loads(read.stdout)
        assert count == 1 and not tensorflow
    sums, arc = rows.values()
    assert sums["data_source"] == "gsm8k" and load_grader("math")("\\boxed{4}", sums).correct
    assert expert_text(sums) == "It is 2+2=4.\n#### 4"
    assert arc["data_source"] == "ai2_arc" and arc["options"] == ["ice", "steam"]
    assert arc["prompt"][0]["content"] == "Hot?\n\nA) ice\nB) steam"
    assert load_grader("auto")("(B)", arc).correct and not load_grader("auto")("(A)", arc).correct


@pytest.mark.slow
def test_a_hugging_face_data_set(tmp_path):
    pytest.importorskip("datasets")
    line = json.dumps({"question": "1+1?", "answer": "2"})
    (tmp_path / "sums.jsonl").write_text(line + "\n" + line + "\n")
    script = [sys.executable, "-c", READ, f"hf:{tmp_path}?split=train"]
    run = subprocess.run(script, check=True, text=True, stdout=subprocess.PIPE)
    count, row, _ = json.loads(run.stdout)
    assert count == 2 and row["reward_model"]["ground_truth"] == "2"
