"""The architecture of a decoder as a static, hashable description without files."""

import dataclasses
import math
from typing import Literal

from echorl_jax.errors import UserError


class ModelError(UserError):
    """A model that we cannot use; one line names the field or the tensor."""


RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Base and scaling of rotary position embedding; fields of Hugging Face ``rope_parameters``."""

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    # Context of pre-training (llama3, yarn).
    original_max_position_embeddings: int = 0
    # llama3: wavelengths between original / high and original / low are blended.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    # yarn: within that context, dimensions that turn more than beta_fast times are kept, and those
    # that turn less than beta_slow times are interpolated.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    # Pairs of a head that turn with each of three axes of positions (time, height, width); empty
    # for plain positions. Source: Qwen2-VL, arXiv 2409.12191.
    sections: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Architecture of Qwen2.5-VL's vision tower, and the token ids that stand for images.

    A patch is ``patch_size`` pixels square; ``merge`` x ``merge`` patches make one token of the
    decoder; attention sees ``window`` pixels square, in ``full_layers`` the whole image. Source:
    Qwen2.5-VL, arXiv 2502.13923.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    full_layers: tuple[int, ...]
    image_id: int
    video_id: int
    start_id: int
    end_id: int
    patch_size: int = 14
    # A still image is repeated as so many frames.
    frames: int = 2
    channels: int = 3
    merge: int = 2
    window: int = 112
    norm_eps: float = 1e-6
    mlp_bias: bool = True
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads):
            raise ModelError(
                f"vision_config: hidden_size={self.hidden_size} is not a multiple of 4 * "
                f"num_heads={self.num_heads}; rotary embedding needs pairs for height and width"
            )
        if self.window // self.patch_size < self.merge:
            raise ModelError(f"vision_config: window_size={self.window} holds no merged patch")
        if any(layer >= self.num_layers for layer in self.full_layers):
            raise ModelError(f"vision_config: fullatt_block_indexes={list(self.full_layers)}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers that describe a patch."""
        return self.channels * self.frames * self.patch_size**2

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """Tokens that stand for pictures and videos, which a policy never writes."""
        return tuple(sorted({self.image_id, self.video_id, self.start_id, self.end_id}))

    @property
    def window_tokens(self) -> int:
        """Merged patches along a side of a window."""
        return self.window // self.merge // self.patch_size

    @property
    def window_patches(self) -> int:
        """Patches of a window."""
        return (self.window_tokens * self.merge) ** 2


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a Llama, Qwen2, Qwen3 or Qwen2.5-VL decoder; static and hashable."""

    model_type: Literal["llama", "qwen2", "qwen3", "qwen2_5_vl"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = RopeConfig()
    # For each layer the number of latest positions it attends to, itself included; None is all.
    windows: tuple[int | None, ...] = ()
    # Standard deviation of fresh weights.
    initializer_range: float = 0.02
    # Type of the stored tensors.
    stored_dtype: str = "bfloat16"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    vision: VisionConfig | None = None
    # Tokens without probability: sampling and training leave out their logits.
    never: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """Positions that the model supports, rope scaling included."""
        if self.rope.kind == "yarn":
            scaled = self.rope.factor * self.rope.original_max_position_embeddings
        else:
            scaled = self.max_position_embeddings * (
                self.rope.factor if self.rope.kind == "linear" else 1.0
            )
        return max(self.max_position_embeddings, int(scaled))

    def warn_of_positions(self, prompt_tokens: int, max_new_tokens: int) -> str:
        """A warning if rows may be longer than :attr:`positions`, else an empty string."""
        longest = prompt_tokens + max_new_tokens
        if longest <= self.positions:
            return ""
        return (
            f"warning: prompt and completion may reach {prompt_tokens} + {max_new_tokens} = "
            f"{longest} tokens, but the model is made for {self.positions} positions "
            "(max_position_embeddings and rope scaling in its config.json)"
        )

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} is odd or 0; rotary embedding needs pairs")
        if self.head_dim == 2 and self.rope.kind == "dynamic":
            raise ModelError("rope type 'dynamic' needs a head_dim above 2")
        if self.rope.sections and sum(self.rope.sections) != self.head_dim // 2:
            raise ModelError(
                f"mrope_section={list(self.rope.sections)} does not add up to half of "
                f"head_dim={self.head_dim}"
            )
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ModelError(f"{len(self.windows)} layer_types for {self.num_layers} layers")


# The place of each linear that may have adapters in the parameters.
LINEAR_PATHS: dict[str, tuple[str, ...]] = {
    **{name: ("layers", "attention", name) for name in "qkvo"},
    **{name: ("layers", "mlp", name) for name in ("gate", "up", "down")},
    **{f"vision/{name}": ("vision", "layers", name) for name in ("qkv", "o")},
    **{f"vision/{name}": ("vision", "layers", "mlp", name) for name in ("gate", "up", "down")},
    **{f"vision/merger/{name}": ("vision", "merger", name) for name in ("up", "down")},
}


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The adapters of one linear, in each layer; rank 0 is a layer without one.

    A linear outside layers, such as the merger's, counts as one layer.
    """

    linear: str  # see LINEAR_PATHS
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Lora:
    """The linears with low-rank adapters, their rank and factor; static and hashable.

    The output of a linear becomes ``x W + s (x A) B``, with s = alpha / rank, or alpha / sqrt(rank)
    for rank-stabilised adapters. Sources: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732.
    """

    adapted: tuple[Adapted, ...]
    rslora: bool = False

    @classmethod
    def uniform(
        cls,
        config: DecoderConfig,
        linears: tuple[str, ...],
        *,
        rank: int,
        alpha: float,
        rslora: bool,
    ) -> "Lora":
        """Adapters of one rank on the named linears of every layer."""

        def count(name: str) -> int:
            if "layers" not in LINEAR_PATHS[name]:
                return 1
            tower = config.vision if name.startswith("vision/") else None
            return (tower or config).num_layers

        each = [Adapted(name, (rank,) * count(name), (alpha,) * count(name)) for name in linears]
        return cls(tuple(each), rslora)

    def rank(self, linear: str) -> int:
        """The largest rank of a linear in any layer; 0 if it has no adapter."""
        return max((max(one.ranks) for one in self.adapted if one.linear == linear), default=0)

    def scales(self, one: Adapted) -> list[float]:
        """s of each layer, 0 without an adapter."""
        return [
            alpha / (math.sqrt(rank) if self.rslora else rank) if rank else 0.0
            for rank, alpha in zip(one.ranks, one.alphas, strict=True)
        ]
