"""Logits, gradients and greedy tokens equal those of transformers (``make_golden.py``)."""

import json
from pathlib import Path

import pytest
from hf_reference import CASES, GRADIENTS, GREEDY, load_golden
from reference_check import check_gradients, check_greedy, check_logits, write_case

GOLDEN = Path(__file__).parent / "golden"


def _directory(tmp_path: Path, name: str) -> Path:
    return write_case(tmp_path, CASES[name], json.loads((GOLDEN / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path):
    directory = _directory(tmp_path, name)
    check_logits(directory, CASES[name], load_golden(GOLDEN, name)["logits"], "float32", 2e-5)


@pytest.mark.parametrize("name", ["llama_llama3", "qwen2_yarn", "qwen3_plain"])
def test_logits_in_bfloat16_stay_near_float32(name, tmp_path):
    directory = _directory(tmp_path, name)
    check_logits(directory, CASES[name], load_golden(GOLDEN, name)["logits"], "bfloat16", 0.1)


def test_yarn_added_to_a_saved_directory_equals_transformers(tmp_path):
    """Adds rope_scaling to the saved default rope_parameters, as Qwen's model card says."""
    raw = json.loads((GOLDEN / "qwen2_yarn.json").read_text())
    theta = raw["rope_parameters"]["rope_theta"]
    scaling = {k: v for k, v in raw["rope_parameters"].items() if k != "rope_theta"}
    raw |= {"rope_scaling": scaling}
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    directory = write_case(tmp_path, CASES["qwen2_yarn"], raw)
    golden = load_golden(GOLDEN, "qwen2_yarn")
    check_logits(directory, CASES["qwen2_yarn"], golden["logits"], "float32", 2e-5)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_torch(name, tmp_path):
    check_gradients(_directory(tmp_path, name), CASES[name], load_golden(GOLDEN, name))


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_equal_generate(name, tmp_path):
    directory = _directory(tmp_path, name)
    check_greedy(directory, CASES[name], load_golden(GOLDEN, name)["greedy"])
