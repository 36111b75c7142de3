"""One decoder for Llama, Qwen2 and Qwen3, read from and written to Hugging Face directories."""

from echorl_jax.models.attention import attend
from echorl_jax.models.config import DecoderConfig, ModelError, RopeConfig
from echorl_jax.models.decoder import Decoder
from echorl_jax.models.hf import load_decoder, load_model, save_model
from echorl_jax.models.hf_config import from_hf, read_config, to_hf
from echorl_jax.models.initialise import abstract_params, init_params, merge, param_shardings

__all__ = [
    "Decoder",
    "DecoderConfig",
    "ModelError",
    "RopeConfig",
    "abstract_params",
    "attend",
    "from_hf",
    "init_params",
    "load_decoder",
    "load_model",
    "merge",
    "param_shardings",
    "read_config",
    "save_model",
    "to_hf",
]
