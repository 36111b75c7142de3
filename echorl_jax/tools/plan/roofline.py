"""Operations, bytes and exchanges of a training step by formula, and their least times on a chip.

The compiler's count does not help: it counts the body of a loop once, and layers, micro-batches and
tokens are loops. Grading is not counted, so the times are lower bounds.

Exchanges between chips are reported beside the times and not added to them, because the share that
computation hides is unknown. They are those that grow with weights or tokens under the sharding
table; latency, vocabulary sums, the embedding and the compiler's merging are not counted. A chip is
assumed to use all its links at once.
"""

import dataclasses
import math

import jax

from echorl_jax.choices import KVDtype
from echorl_jax.models import Decoder, split_params
from echorl_jax.parallel import local_bytes
from echorl_jax.rollout.memory import position_bytes
from echorl_jax.tools.plan.chips import Chip
from echorl_jax.training.setup import Setup
from echorl_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Mean tokens of a row. They decide the time; memory depends on the largest lengths."""

    prompt: float
    completion: float
    image: float = 0.0  # image tokens of a prompt, counted as those of one image


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a step on one chip."""

    name: str
    flops: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / chip.flops_per_second, self.bytes / chip.bytes_per_second)


# The share of the chip's peak that each phase was measured to reach, and where. Other chips and
# models reach other shares. The sampler's 39% of a copy's 4.26 TB/s are 35% of the H200's 4.8.
_MAXTEXT = 0.5, "MaxText, pre-training on v5e: 46 to 67% (its README for configs/v5e)"
_SAMPLER = "EchoRL's sampler, Qwen2.5-Math-1.5B, 64 slots on an H200 (docs/performance.md)"
SHARES = {
    "encode": _MAXTEXT,
    "prefill": _MAXTEXT,
    "decode": (0.35, _SAMPLER),
    "score": _MAXTEXT,
    "accumulate": _MAXTEXT,
    "tower": _MAXTEXT,
    "apply": (0.78, "JAX's copy of 4 GB on an H200 (docs/performance.md)"),
}


def layer_weights(model: Decoder) -> int:
    """Weights in the matrices of all layers, without adapters."""
    return _kernel_weights(model.layers(model.param_shapes()))


def _kernel_weights(shapes: PyTree) -> int:
    return sum(
        math.prod(shape.shape)
        for path, shape in jax.tree_util.tree_leaves_with_path(shapes)
        if path[-1].key == "kernel"
    )


@dataclasses.dataclass(frozen=True)
class DecodeStepCost:
    """Work of writing one token for each of M slots, on all devices together."""

    matrix_flops: int  # products with weights
    attention_flops: int  # scores and weighted values
    weight_bytes: int  # each weight is read once
    cache_bytes: int  # each key and value attended to is read once, new ones are written

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.attention_flops

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    def seconds(self, *, flops_per_second: float, bytes_per_second: float) -> float:
        """Least time on hardware with these peaks: the slower of the two."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def decode_step_cost(
    model: Decoder,
    *,
    slots: int,
    prompt_tokens: float,
    completion_tokens: float,
    group_size: int = 1,
    kv_dtype: KVDtype | None = None,
) -> DecodeStepCost:
    """Counts one decode step at a mean context length.

    With W weights in matrices, head included, L layers, H query heads of size K and c positions in
    the context: ``2 M W`` and ``4 M L H K c`` operations. Bytes: W weights, and for each
    slot its completion and 1 / ``group_size`` of its prompt.

    Args:
      slots: M.
      prompt_tokens: mean prompt length.
      completion_tokens: mean number of tokens so far.
      group_size: slots that read a prompt together: G with a slot for each row, else 1.
      kv_dtype: type of the cache; the model's unless given.
    """
    config = model.config
    weights = layer_weights(model) + config.hidden_size * config.vocab_size
    context = prompt_tokens + completion_tokens
    heads = config.num_layers * config.num_heads * config.head_dim
    read = prompt_tokens / group_size + completion_tokens
    return DecodeStepCost(
        matrix_flops=2 * slots * weights,
        attention_flops=round(4 * slots * heads * context),
        weight_bytes=_matrix_bytes(model),
        cache_bytes=round(slots * (read + 1) * position_bytes(model, kv_dtype)),
    )


def _matrix_bytes(model: Decoder) -> int:
    """Bytes of the layers' matrices and the head, as the sampler stores them."""
    stored = jax.eval_shape(model.cast, model.param_shapes())
    head = stored["embed"]["table"] if model.config.tied_embeddings else stored["head"]["kernel"]
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.layers(stored))
        if path[-1].key == "kernel"
    ]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in (*kernels, head))


def forward_flops(model: Decoder, *, length: float, targets: float) -> float:
    """Operations of one row's forward pass.

    With W weights in the layers' matrices, L layers, H heads of size K and n tokens:
    ``2 W n + 2 L H K n^2`` (a causal mask leaves half of ``4 L H K n^2``), and ``2 D V`` for each
    of the ``targets``, the only positions with logits.
    """
    config = model.config
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * length**2
    head = 2 * config.hidden_size * config.vocab_size * targets
    return 2 * layer_weights(model) * length + attention + head


def tower_flops(model: Decoder, *, tokens: float) -> float:
    """Operations of the vision tower's forward pass for one image of n tokens.

    With W weights in the matrices that see each of the ``p = merge^2 n`` patches, V in those of the
    merger, which see each token, and H heads of size K: ``2 W p + 2 V n``, and ``4 H K p s`` in
    each layer, where s is p if the layer sees the whole image, else the patches of a window.
    """
    config = model.config.vision
    assert config is not None
    parts = {part: _kernel_weights(tree) for part, tree in model.param_shapes()["vision"].items()}
    patches = config.merge**2 * tokens
    inside = config.num_layers - len(config.full_layers)
    seen = len(config.full_layers) * patches + inside * min(patches, config.window_patches)
    matrices = (parts["patch"] + parts["layers"]) * patches + parts["merger"] * tokens
    return 2 * matrices + 4 * config.hidden_size * patches * seen


def _tower_phases(setup: Setup, lengths: Lengths) -> list[Phase]:
    """Features for the sampler and the update, and the tower's gradient, once for each image."""
    if setup.model.config.vision is None:
        return []
    supervised, objective = setup.objective.supervised, setup.config.objective
    images = setup.rows if supervised else setup.config.rollout.prompts_per_step
    one = tower_flops(setup.model, tokens=lengths.image) * images / setup.mesh.size
    # For the sampler, the first update and the reference; later updates have another tower.
    passes = 1.0 if supervised else 2.0 + (setup.objective.kl_coef != 0)
    if not setup.trains_tower:
        return [Phase("encode", passes * one, 0.0)]
    passes += objective.epochs - 1 / setup.mini_batches
    # Forward again (twice where layers are recomputed), then two passes, one with adapters.
    backward = 1 + (setup.model.remat != "none") + (2 if setup.model.lora is None else 1)
    tower = Phase("tower", backward * one * objective.epochs, 0.0)
    return [Phase("encode", passes * one, 0.0), tower]


def step_phases(setup: Setup, lengths: Lengths) -> list[Phase]:
    """Images, sampling, scoring if the config asks for it, and learning from all rows."""
    chips, epochs, rows = setup.mesh.size, setup.config.objective.epochs, setup.rows
    length, prompts = lengths.prompt + lengths.completion, setup.config.rollout.prompts_per_step
    prefill = forward_flops(setup.model, length=lengths.prompt, targets=0) * prompts
    whole = forward_flops(setup.model, length=length, targets=lengths.completion)
    layers = forward_flops(setup.model, length=length, targets=0)
    # Backward costs two forward passes; logits are always computed again, layers as remat says.
    learn = 3 * whole + (whole - layers) + (layers if setup.model.remat == "layer" else 0)
    if setup.model.lora is not None:
        # Frozen matrices have no gradient: one product less, of the three of each.
        learn -= 2 * layer_weights(setup.model) * length
        learn -= (
            2 * setup.model.config.hidden_size * setup.model.config.vocab_size * lengths.completion
        )
    score = whole * rows * setup.scoring_passes
    trained = split_params(setup.model, setup.model.param_shapes())[1]
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))
    # Parameters, both moments: read and written; gradient: read. Float32.
    state = 28 * params * setup.mini_batches * epochs / (chips / setup.mesh.shape["data"])
    phases = [
        *_tower_phases(setup, lengths),
        Phase("prefill", prefill / chips, 0.0),
        _decode(setup, lengths),
        Phase("score", score / chips, 0.0),
        Phase("accumulate", learn * rows * epochs / chips, 0.0),
        Phase("apply", 0.0, state),
    ]
    return [phase for phase in phases if phase.name != "score" or score]


def busy_slots(setup: Setup, lengths: Lengths) -> float:
    """Slots that can be busy at once: all, or those whose rows, half written, fill the pages."""
    if not setup.page_tokens:
        return setup.slots
    fit = setup.shards * setup.page_tokens / max(lengths.completion / 2, 1.0)
    return min(setup.slots, fit)


def decode_steps(setup: Setup, lengths: Lengths) -> float:
    """Decode steps in a training step: N rows of c tokens in M busy slots take N c / M."""
    return setup.sampled_rows * lengths.completion / busy_slots(setup, lengths)


def _decode(setup: Setup, lengths: Lengths) -> Phase:
    # Rows of a group lie side by side in the ring, with a slot for each row.
    together = setup.slots >= setup.sampled_rows and not setup.page_tokens
    cost = decode_step_cost(
        setup.model,
        slots=round(busy_slots(setup, lengths)),
        prompt_tokens=lengths.prompt,
        completion_tokens=lengths.completion / 2,
        group_size=setup.sampled_group_size if together else 1,
        kv_dtype=setup.config.rollout.kv_dtype,
    )
    steps, chips = decode_steps(setup, lengths), setup.mesh.size
    # Weights are split over tensor only: each group of chips reads them all.
    read = cost.weight_bytes / setup.mesh.shape["tensor"] + cost.cache_bytes / chips
    return Phase("decode", cost.flops * steps / chips, read * steps)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Bytes that one chip sends along one mesh axis in a phase of a step."""

    phase: str
    axis: str
    bytes: float

    def seconds(self, chip: Chip) -> float | None:
        """Time at the speed of the chip's links; None where unknown."""
        speed = chip.link_bytes_per_second
        return None if speed is None else self.bytes / speed


def gathered(whole: float, chips: int) -> float:
    """Bytes that a chip sends to gather an array of ``whole`` bytes, or to reduce and scatter it.

    On a ring each chip forwards all shards but one: ``(n - 1) / n`` of the whole.

    >>> gathered(80.0, 4)
    60.0
    """
    return whole * (chips - 1) / chips


def exchanges(setup: Setup, lengths: Lengths) -> list[Exchange]:
    """Bytes that a chip sends in a step with rows of these mean lengths; none over an axis of 1.

    With W bytes of weights in the compute type, split over ``tensor`` only, and A bytes of hidden
    states of the tokens on a chip (an all-reduce is a reduce and scatter, then a gather):

    * ``weights``: the sampler's copy is gathered over ``fsdp`` once, W.
    * ``prefill``, ``decode``, each decode step: two all-reduces of A in a layer over ``tensor``.
    * ``score``: W gathered over ``fsdp`` for each micro-batch, two all-reduces in a layer.
    * ``accumulate``, each micro-batch: W gathered over ``fsdp`` forward and backward, gradients
      reduced and scattered; the shard of a chip all-reduced over ``data``; two all-reduces in a
      layer over ``tensor`` forward, two backward, two where layers are recomputed.
    """
    config, mesh, shards = setup.config, setup.mesh.shape, setup.shards
    weights = _weight_bytes(setup)
    gather = gathered(weights, mesh["fsdp"])
    prompts = config.rollout.prompts_per_step * lengths.prompt
    tokens = setup.rows * (lengths.prompt + lengths.completion)
    layers = _layers(setup, tokens / shards)
    parts, passes, epochs = setup.mini_batches, setup.scoring_passes, config.objective.epochs
    micro = parts * math.ceil(tokens / parts / math.prod(setup.micro_batch))
    reduce = 2 * gathered(weights / mesh["fsdp"], mesh["data"])
    busy = busy_slots(setup, lengths)
    decode = _layers(setup, busy / shards) * decode_steps(setup, lengths)
    times = 3 if setup.model.remat == "layer" else 2
    sampling = [
        Exchange("weights", "fsdp", gather),
        Exchange("prefill", "tensor", _layers(setup, prompts / shards)),
        Exchange("decode", "tensor", decode),
    ]
    learning = [
        Exchange("score", "fsdp", passes * micro * gather),
        Exchange("score", "tensor", passes * layers),
        Exchange("accumulate", "fsdp", 3 * micro * epochs * gather),
        Exchange("accumulate", "data", micro * epochs * reduce),
        Exchange("accumulate", "tensor", times * epochs * layers),
    ]
    found = learning if setup.objective.supervised else sampling + learning
    return [exchange for exchange in found if exchange.bytes]


def _weight_bytes(setup: Setup) -> int:
    """Bytes of all weights in the compute type, split over ``tensor`` only."""
    narrow = jax.eval_shape(setup.model.cast, setup.model.param_shapes())
    return local_bytes(setup.model.param_axes(), narrow, setup.mesh, "rollout")


def _layers(setup: Setup, tokens: float) -> float:
    """Bytes of one pass through all layers: an all-reduce after attention and one after the MLP."""
    size = 2 if setup.model.dtype == "bfloat16" else 4
    shape = setup.model.config
    one = 2 * gathered(tokens * shape.hidden_size * size, setup.mesh.shape["tensor"])
    return 2 * shape.num_layers * one
