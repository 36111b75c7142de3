"""Runs PEFT (torch) on adapters of the cases of ``hf_reference`` and writes the results.

For each adapter a directory as PEFT saves it, with ``results.npz`` beside: the logits of the real
tokens and the gradients of A and B. In an environment as for ``make_golden.py``, with peft 0.21.2:

    python tests/models/peft_reference.py --out tests/models/golden

With ``--load BASE --adapter DIR`` it writes the logits of that model for BASE/tokens.npy instead.
"""

import argparse
from pathlib import Path
from typing import Any

import hf_reference as reference
import make_vision_golden as vision
import numpy as np
import torch
import vision_cases
from make_golden import build, gradients_of, logits_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def adapted(
    out: Path, base: torch.nn.Module, settings: dict[str, Any], size: float = 0.3
) -> PeftModel:
    """The model with A and B drawn from N(0, size^2), which are saved as PEFT does."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape) * size
    model.save_pretrained(str(out))
    (out / "README.md").unlink()
    return model


def write(out: Path, name: str, case: dict[str, Any], settings: dict[str, Any]) -> None:
    """One adapter, its logits, and the gradients of A and B."""
    model = adapted(out / name, build(case), settings)
    with torch.no_grad():
        arrays = {"logits": torch.cat(logits_of(model, case)).numpy()}
    arrays |= {
        key.replace(".default", "").removeprefix("gradient/"): value
        for key, value in gradients_of(model, case).items()
    }
    np.savez_compressed(out / name / "results.npz", **arrays)


def write_vision(out: Path) -> None:
    """The same of a model with a vision tower, for a prompt with two images."""
    model = adapted(out, vision.build(), vision_cases.ADAPTER, size=0.1)
    inputs = vision.inputs_of("two")
    logits = model(**inputs).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], inputs["input_ids"][0, 1:]).backward()
    arrays = {"logits": logits.detach().numpy()}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            arrays[key.replace(".default", "")] = parameter.grad.numpy()
    np.savez_compressed(out / "results.npz", **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load", type=Path, help="a base model with tokens.npy")
    parser.add_argument("--adapter", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.load:
        images = "vision_config" in (args.load / "config.json").read_text()
        kind = AutoModelForImageTextToText if images else AutoModelForCausalLM
        base = kind.from_pretrained(args.load, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(args.adapter))
        model.save_pretrained(str(args.out))
        with torch.no_grad():
            inputs = vision.inputs_of("two") if images else {}
            if not images:
                inputs["input_ids"] = torch.from_numpy(np.load(args.load / "tokens.npy")).long()
            np.save(args.out / "logits.npy", model(**inputs).logits.numpy())
        return
    write_vision(args.out / "peft_vision")
    for name, (case, settings) in reference.ADAPTERS.items():
        write(args.out, name, reference.CASES[case], settings)


if __name__ == "__main__":
    main()
