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
import numpy as np
import torch
from make_golden import build, gradients_of, logits_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def write(out: Path, name: str, case: dict[str, Any], settings: dict[str, Any]) -> None:
    """One adapter with random A and B, and what PEFT makes of it."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(build(case), config).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape) * 0.3
    model.save_pretrained(str(out / name))
    (out / name / "README.md").unlink()
    with torch.no_grad():
        arrays = {"logits": torch.cat(logits_of(model, case)).numpy()}
    arrays |= {
        key.replace(".default", "").removeprefix("gradient/"): value
        for key, value in gradients_of(model, case).items()
    }
    np.savez_compressed(out / name / "results.npz", **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load", type=Path, help="a base model with tokens.npy")
    parser.add_argument("--adapter", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.load:
        base = AutoModelForCausalLM.from_pretrained(args.load, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(args.adapter))
        model.save_pretrained(str(args.out))
        with torch.no_grad():
            tokens = torch.from_numpy(np.load(args.load / "tokens.npy")).long()
            np.save(args.out / "logits.npy", model(tokens).logits.numpy())
        return
    for name, (case, settings) in reference.ADAPTERS.items():
        write(args.out, name, reference.CASES[case], settings)


if __name__ == "__main__":
    main()
