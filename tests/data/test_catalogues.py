"""Data sets by name: TFDS and Hugging Face."""

import json
import os
import subprocess
import sys

import pytest

from echorl_jax.data import DataError, load_rows
from echorl_jax.data.tfds_countdown import examples

READ = """
import json, sys
from echorl_jax.data import load_rows
rows = load_rows(sys.argv[1])
print(json.dumps([len(rows), rows[0], "tensorflow" in sys.modules]))
"""


@pytest.mark.parametrize(
    ("module", "spec", "package"),
    [
        ("tensorflow_datasets", "tfds:gsm8k", "tensorflow-datasets"),
        ("datasets", "hf:a/b", "datasets"),
    ],
)
def test_a_missing_package_is_named(module, spec, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"needs the package {package}: pip install {package}"):
        load_rows(spec)


def test_examples_are_the_generators_problems():
    key, example = next(examples("eval"))
    assert key == 0 and example["question"].startswith(f"Reach {example['target']} with ")


@pytest.mark.slow
def test_a_prepared_data_set_is_read_by_another_process_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    run = {"check": True, "text": True, "stdout": subprocess.PIPE, "env": dict(os.environ)}
    module = "echorl_jax.data.tfds_countdown"
    subprocess.run([sys.executable, "-m", module, f"--data_dir={tmp_path}"], **run)
    spec = f"tfds:echorl_countdown?split=eval&data_dir={tmp_path}"
    count, row, tensorflow = json.loads(
        subprocess.run([sys.executable, "-c", READ, spec], **run).stdout
    )
    assert count == 1024 and not tensorflow
    assert row["data_source"] == "countdown"
    truth = row["reward_model"]["ground_truth"]
    assert row["prompt"][0]["content"].startswith(f"Reach {truth['target']} with ")
    with pytest.raises(DataError, match="split train of nothing|cannot be read"):
        load_rows(f"tfds:no_such_set?data_dir={tmp_path}")


@pytest.mark.slow
def test_a_hugging_face_data_set(tmp_path):
    pytest.importorskip("datasets")
    line = json.dumps({"question": "1+1?", "answer": "2"})
    (tmp_path / "sums.jsonl").write_text(line + "\n" + line + "\n")
    script = [sys.executable, "-c", READ, f"hf:{tmp_path}?split=train"]
    run = subprocess.run(script, check=True, text=True, stdout=subprocess.PIPE)
    count, row, _ = json.loads(run.stdout)
    assert count == 2 and row["reward_model"]["ground_truth"] == "2"
