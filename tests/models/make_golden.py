"""Runs transformers (torch) on the cases of ``hf_reference`` and writes the results.

For each case: ``NAME.json``, the ``config.json`` as transformers saves it, and ``NAME.npz`` with
the logits of the real tokens, and for some cases the gradients of a loss and greedy continuations.
In an environment with torch 2.13.0 and transformers 5.23.0:

    python tests/models/make_golden.py --out tests/models/golden
"""

import argparse
import json
from pathlib import Path
from typing import Any

import hf_reference as reference
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def build(case: dict[str, Any]) -> torch.nn.Module:
    """The transformers model with the case's weights."""
    fields = {name: value for name, value in case["config"].items() if name != "model_type"}
    config = _CONFIGS[case["config"]["model_type"]](**json.loads(json.dumps(fields)))
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    weights = reference.fill_weights(case, shapes)
    model.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()}, strict=False)
    return model.eval()


def logits_of(model: torch.nn.Module, case: dict[str, Any]) -> list[torch.Tensor]:
    """Each row's logits ``[length, V]``, from one padded batch.

    Under dynamic NTK the reference rotates all rows by the longest one; there rows run alone.
    """
    tokens = torch.from_numpy(reference.tokens_of(case)).long()
    rope = case["config"].get("rope_parameters", {})
    if rope.get("rope_type") == "dynamic":
        rows = [model(tokens[i : i + 1, :n]).logits[0] for i, n in enumerate(case["rows"])]
        return rows
    lengths = torch.tensor(case["rows"])
    mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()
    logits = model(tokens, attention_mask=mask).logits
    return [logits[i, :n] for i, n in enumerate(case["rows"])]


def gradients_of(model: torch.nn.Module, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Gradients of the mean next-token loss over all real tokens."""
    tokens = torch.from_numpy(reference.tokens_of(case)).long()
    model.zero_grad()
    losses = [
        torch.nn.functional.cross_entropy(row[:-1], tokens[i, 1:n], reduction="sum")
        for i, (row, n) in enumerate(zip(logits_of(model, case), case["rows"], strict=True))
    ]
    (sum(losses) / sum(n - 1 for n in case["rows"])).backward()
    return {
        f"gradient/{name}": parameter.grad.numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def greedy_of(model: torch.nn.Module, case: dict[str, Any]) -> np.ndarray:
    """Token ids that ``generate`` appends to the first tokens of each row."""
    prompt = torch.from_numpy(reference.tokens_of(case)).long()[:, : reference.GREEDY_PROMPT]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=reference.GREEDY_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, prompt.shape[1] :].numpy().astype(np.int32)


def write(directory: Path, name: str, case: dict[str, Any], *, gradients: bool, greedy: bool):
    """Writes one case's files."""
    model = build(case)
    with torch.no_grad():
        logits = torch.cat(logits_of(model, case)).numpy()
    arrays: dict[str, np.ndarray] = {"logits": logits}
    if gradients:
        arrays |= gradients_of(model, case)
    if greedy:
        arrays["greedy"] = greedy_of(model, case)
    np.savez_compressed(directory / f"{name}.npz", **arrays)
    text = model.config.to_json_string(use_diff=False)
    config = {k: v for k, v in json.loads(text).items() if k not in ("_name_or_path",)}
    config["architectures"] = [type(model).__name__]
    (directory / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--random", type=int, default=0, help="number of drawn cases instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", type=Path, help="a model directory to run tokens.npy through")
    parser.add_argument("--new", type=int, default=0, help="greedy tokens after its prompt.npy")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.load:
        model = AutoModelForCausalLM.from_pretrained(args.load, dtype=torch.float32)
        tokens = torch.from_numpy(np.load(args.load / "tokens.npy")).long()
        with torch.no_grad():
            np.save(args.out / "logits.npy", model(tokens).logits.numpy())
        if args.new:
            prompt = torch.from_numpy(np.load(args.load / "prompt.npy")).long()
            written = model.generate(
                prompt, do_sample=False, max_new_tokens=args.new, pad_token_id=0
            )
            np.save(args.out / "greedy.npy", written[:, prompt.shape[1] :].numpy())
        return
    if args.random:
        for i, (name, case) in enumerate(reference.random_cases(args.seed, args.random).items()):
            dynamic = case["config"]["rope_parameters"]["rope_type"] == "dynamic"
            write(args.out, name, case, gradients=i % 5 == 0, greedy=not dynamic)
        return
    for name, case in reference.CASES.items():
        write(
            args.out,
            name,
            case,
            gradients=name in reference.GRADIENTS,
            greedy=name in reference.GREEDY,
        )


if __name__ == "__main__":
    main()
