"""One decoder for Llama, Qwen2, Qwen3 and Qwen2.5-VL, from and to Hugging Face directories."""

from echorl_jax.models.attention import attend
from echorl_jax.models.config import DecoderConfig, Lora, ModelError, RopeConfig
from echorl_jax.models.decoder import Decoder
from echorl_jax.models.hf import load_decoder, load_model, save_model
from echorl_jax.models.hf_config import from_hf, read_config, to_hf
from echorl_jax.models.initialise import abstract_params, init_params, merge, param_shardings
from echorl_jax.models.lora import base_params, init_adapters, split_params, with_adapters
from echorl_jax.models.peft import load_adapter, read_adapter, save_adapter
from echorl_jax.models.repositories import claim_repository, local_directory, push

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Lora",
    "ModelError",
    "RopeConfig",
    "abstract_params",
    "attend",
    "base_params",
    "claim_repository",
    "from_hf",
    "init_adapters",
    "init_params",
    "load_adapter",
    "load_decoder",
    "load_model",
    "local_directory",
    "merge",
    "param_shardings",
    "push",
    "read_adapter",
    "read_config",
    "save_adapter",
    "save_model",
    "split_params",
    "to_hf",
    "with_adapters",
]
