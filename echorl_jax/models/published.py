"""The architectures of the paper's text models, for use without a network.

The files hold those fields of each published ``config.json`` that determine the computation.
"""

import json
from pathlib import Path

from echorl_jax.models.config import DecoderConfig
from echorl_jax.models.hf_config import from_hf, read_config

_DIRECTORY = Path(__file__).parent.parent / "assets" / "architectures"


def architecture(path: str) -> DecoderConfig:
    """The architecture of a model directory, or of a repository of the paper.

    Raises:
      ModelError: another path, or a ``config.json`` that we do not implement.

    >>> architecture("Qwen/Qwen2.5-Math-7B").num_layers
    28
    """
    known = _DIRECTORY / f"{path.replace('/', '--')}.json"
    if not Path(path).is_dir() and known.is_file():
        return from_hf(json.loads(known.read_text()))
    return read_config(path)
