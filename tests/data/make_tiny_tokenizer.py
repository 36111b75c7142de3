"""Makes the tokenizer and the config.json of the tiny model that ships with the package.

``python tests/data/make_tiny_tokenizer.py DIR`` writes a Hugging Face directory without weights.
The tokenizer is byte-level BPE: all 256 bytes are in it, so any text can be encoded (after NFC
normalisation) and decoded. Digits and newlines are always tokens of their own, and the words of
Countdown prompts are one token each. Text is split by Qwen2's rule, because transformers builds the
tokenizer of any model of that type with that rule, whatever tokenizer.json says.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END = "<|endoftext|>"
PAD = "<|pad|>"
VOCAB_SIZE = 512
# Contractions, a word with the sign before it, a digit, a run of signs, line ends, spaces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What the merges are learnt from: the words of generated prompts, often, and words of such puzzles.
# No text here has a newline, so that no merge holds one.
CORPUS = [
    *["Reach 1 with 2, 3, 4."] * 200,
    *["Using the numbers 1, 2 and 3, make an equation that equals the target."] * 4,
    *["<think> The steps go here. </think> <answer> (1 + 2) / 3 </answer>"] * 8,
    "The user asks a question, and the assistant thinks first and then gives the answer.",
    "The assistant works on the problem step by step, in a process of reasoning, for example.",
    "Solve this problem and show your work. You can use each number only once.",
    "Basic arithmetic operations are allowed: add, subtract, multiply and divide.",
    "Find the final answer and write it in a box. Let me think about the next step.",
    "A question from the user to the assistant, with an answer that can be checked.",
    "Therefore the result is the sum of the two numbers. So the final equation holds.",
]

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


def make_tokenizer() -> Tokenizer:
    """Trains the byte-level BPE; the same vocabulary each time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def model_config(*, eos_id: int, pad_id: int) -> dict[str, Any]:
    """config.json of a Qwen2 model of 0.85M parameters."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }


def write_directory(path: str | Path) -> None:
    """Writes the tokenizer's files, config.json and generation_config.json into ``path``."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    tokenizer.save(str(directory / "tokenizer.json"))
    documents = {
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "chat_template": TEMPLATE,
        },
        "config.json": model_config(eos_id=vocabulary[END], pad_id=vocabulary[PAD]),
        "generation_config.json": {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": vocabulary[END],
            "pad_token_id": vocabulary[PAD],
        },
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    write_directory(parser.parse_args().directory)
