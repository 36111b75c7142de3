"""Models of no use but their size, with a real tokenizer."""

import shutil
from pathlib import Path

import jax

from echorl_jax.models import init_params, load_decoder, save_model

# Qwen2's architecture with its whole vocabulary, so that its tokenizer's ids fit.
CONFIG = """{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936,
"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
"num_key_value_heads": 1, "hidden_act": "silu", "max_position_embeddings": 4096,
"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
"eos_token_id": 151643, "torch_dtype": "float32"}"""


def write_tiny_qwen(directory: Path, tokenizer: Path) -> Path:
    """A random Qwen2 model of 5M parameters, nearly all of them its embedding."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(CONFIG)
    model = load_decoder(directory, dtype="float32")
    save_model(directory, model, init_params(model, jax.random.key(0)))
    for file in tokenizer.iterdir():
        shutil.copy(file, directory / file.name)
    return directory
