"""Architectures that are known without a network: those of the paper's text backbones.

The files hold the fields of each model's published ``config.json`` that shape the computation.
"""

import json
from pathlib import Path

from echorl_jax.models.config import DecoderConfig
from echorl_jax.models.hf_config import from_hf, read_config

_DIRECTORY = Path(__file__).parent.parent / "assets" / "architectures"


def architecture(path: str) -> DecoderConfig:
    """The architecture of a model directory, or of one of those repositories.

    Raises:
      ModelError: neither a directory with a ``config.json`` that we implement, nor known.

    >>> architecture("Qwen/Qwen2.5-Math-7B").num_layers
    28
    """
    known = _DIRECTORY / f"{path.replace('/', '--')}.json"
    if not Path(path).is_dir() and known.is_file():
        return from_hf(json.loads(known.read_text()))
    return read_config(path)
