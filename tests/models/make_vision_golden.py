"""Runs transformers (torch) on the prompts of ``vision_cases`` and writes the results.

With torch 2.13.0 and transformers 5.23.0, also for a model directory of ours:

    python tests/models/make_vision_golden.py --out=tests/models/golden/vision
    python tests/models/make_vision_golden.py --out=OUT --load=DIRECTORY
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
import vision_cases as cases
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def published(name: str) -> str:
    """The name of a tensor in published files."""
    return re.sub(r"^model\.(visual|language_model)\.", _older, name)


def _older(match: re.Match) -> str:
    return "visual." if match[1] == "visual" else "model."


def build() -> torch.nn.Module:
    """The model with the weights of the cases."""
    config = Qwen2_5_VLConfig(**json.loads(json.dumps(cases.CONFIG)))
    config._attn_implementation = "eager"
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    state = model.state_dict()
    shapes = {published(name): tuple(tensor.shape) for name, tensor in state.items()}
    weights = cases.weights_of(shapes)
    model.load_state_dict({name: torch.from_numpy(weights[published(name)]) for name in state})
    return model


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(cases.tokens_of(name)).long()[None]
    inputs = {"input_ids": tokens, "mm_token_type_ids": (tokens == cases.IMAGE_ID).int()}
    if grids := cases.PROMPTS[name]:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(cases.pixels_of(name)))
        inputs["image_grid_thw"] = torch.tensor([(1, *grid) for grid in grids])
    return inputs


def run(model: torch.nn.Module, name: str) -> dict[str, np.ndarray]:
    """Features, positions, logits, gradients of the mean next-token loss, greedy tokens."""
    inputs, results = inputs_of(name), {}
    tokens = inputs["input_ids"]
    grids = inputs.get("image_grid_thw")
    types = inputs["mm_token_type_ids"]
    positions, delta = model.model.get_rope_index(tokens, types, image_grid_thw=grids)
    results["positions"] = positions[:, 0].T.numpy()
    results["delta"] = delta[0].numpy()
    if grids is not None:
        with torch.no_grad():
            features = model.model.get_image_features(inputs["pixel_values"], grids)
        parts = features.pooler_output
        results["features"] = torch.cat(list(parts)).numpy()
    model.zero_grad()
    logits = model(**inputs).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:]).backward()
    results["logits"] = logits.detach().numpy()
    for parameter, value in model.named_parameters():
        if value.grad is not None:
            stored = published(parameter)
            results[f"gradient/{stored}"] = cases.projections(stored, value.grad.numpy())
    with torch.no_grad():
        written = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=cases.GREEDY,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=list(cases.BANNED),
        )
    results["greedy"] = written[0, tokens.shape[1] :].numpy().astype(np.int32)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load", type=Path, help="a directory to load instead")
    parser.add_argument("--save", action="store_true", help="also save the model as a directory")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if args.load:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.load, dtype=torch.float32)
    else:
        model = build()
        text = model.config.to_json_string(use_diff=False)
        config = json.loads(text) | {"architectures": [type(model).__name__]}
        config.pop("_name_or_path", None)
        (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if args.save:
        model.save_pretrained(args.out / "saved")
    model.eval()
    arrays = {
        f"{name}/{key}": value for name in cases.PROMPTS for key, value in run(model, name).items()
    }
    np.savez_compressed(args.out / "results.npz", **arrays)


if __name__ == "__main__":
    main()
