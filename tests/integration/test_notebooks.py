"""The notebooks under examples/ run from top to bottom."""

import json
from pathlib import Path
from typing import Any

import jax
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from echorl_jax.data import load_tokenizer
from echorl_jax.files import read_steps
from echorl_jax.models import Decoder, init_params, save_model
from echorl_jax.models.hf_config import read_config
from tests.integration.conftest import ROOT

EXAMPLES = ROOT / "examples"
QUESTIONS = [
    *[f"A shelf has {n} boxes with {n + 1} pens each. How many pens?" for n in (2, 3, 4, 5, 6)],
    *[f"Mia had {n} coins and found 3. How many has she now?" for n in (4, 7, 8, 11, 15)],
]
ANSWERS = [n * (n + 1) for n in (2, 3, 4, 5, 6)] + [n + 3 for n in (4, 7, 8, 11, 15)]


def executed(name: str, directory: Path, settings: str = "") -> list[str]:
    """The output of each cell as text.

    Args:
      name: of the notebook.
      directory: where it runs.
      settings: code that follows the cell with the tag ``parameters``.
    """
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    assert all(cell.get("outputs", []) == [] for cell in notebook.cells), "committed with outputs"
    if settings:
        (place,) = (
            number
            for number, cell in enumerate(notebook.cells)
            if "parameters" in cell.metadata.get("tags", [])
        )
        notebook.cells.insert(place + 1, new_code_cell(settings))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": directory}}).execute()
    return [text_of(cell) for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: Any) -> str:
    data = [output.get("data", {"text": output.get("text", "")}) for output in cell.outputs]
    return "".join(str(value) for kinds in data for value in kinds.values())


def tiny_model(directory: Path) -> Path:
    """The shape and the tokenizer of the model of this package, with random weights."""
    source = ROOT / "echorl_jax" / "assets" / "countdown"
    model = Decoder(read_config(source))
    weights = init_params(model, jax.random.key(0))
    save_model(directory, model, weights, load_tokenizer(str(source)))
    return directory


@pytest.fixture(autouse=True)
def environment_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device, and JAX's usual settings."""
    for name in ("XLA_FLAGS", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.slow
def test_lora_on_gsm8k(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = (
        {"question": question, "answer": f"We count. #### {answer}"}
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    )
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = (
        f"SOURCE, MODEL, TRAIN, EVAL = '', {str(tiny_model(tmp_path / 'model'))!r}, "
        f"{str(rows)!r}, {str(rows)!r}\nSTEPS, PROMPTS, GROUP, NEW_TOKENS = 2, 4, 2, 16"
    )
    outputs = executed("colab_gsm8k.ipynb", tmp_path, settings)
    run = tmp_path / "runs" / "gsm8k"
    lines = list(read_steps(run / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert (run / "export" / "adapter" / "adapter_model.safetensors").exists()
    assert any("computes in float32" in text for text in outputs)
    assert any("iframe srcdoc=" in text and "EchoClip" in text for text in outputs)
    assert "trained parameters" in outputs[-1]


@pytest.mark.slow
def test_the_method_as_pure_functions(tmp_path: Path) -> None:
    outputs = executed("compose.ipynb", tmp_path)
    assert sum("image/png" in text or "Figure" in text for text in outputs) == 2
    assert any(text.startswith("prompt ") for text in outputs)
    assert outputs[-1].startswith("loss ") and "gradient norm 0.0000" not in outputs[-1]
