"""Memory of one device during a run or a plan, and the number of slots that fits into it."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from echorl_jax.config import ConfigError
from echorl_jax.models import Decoder
from echorl_jax.parallel import local_bytes
from echorl_jax.rollout import RolloutMemory, choose_slots, rollout_memory
from echorl_jax.rollout.memory import shares_weights
from echorl_jax.training.setup import Setup

# Share of a device's memory that may be filled; the runtime and fragmentation take the rest.
USABLE = 0.95
# Share of the remaining memory that slots may take. When work runs out, they are copied to half as
# many while the old ones still exist, and the decode loop has temporaries.
_SLOT_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class PersistentMemory:
    """Bytes on one device that every program of a run finds in use.

    The sampler's weights exist only while it samples.
    """

    master: int
    moments: int
    sampler: int
    reference: int

    @property
    def always(self) -> int:
        """Bytes in use during the whole step."""
        return self.master + self.moments + self.reference


def persistent_memory(setup: Setup) -> PersistentMemory:
    """Weights and moments on one device, from shapes and the sharding table alone."""
    first_moment = 2 if setup.config.optim.moment_dtype == "bfloat16" else 4
    return weight_memory(
        setup.model,
        setup.mesh,
        moment_bytes=first_moment + 4,
        reference=setup.objective.kl_coef != 0,
        shares_weights=shares_weights(
            setup.model, devices=setup.mesh.size, platform=setup.platform
        ),
    )


def weight_memory(
    model: Decoder,
    mesh: Mesh | AbstractMesh,
    *,
    moment_bytes: int,
    reference: bool,
    shares_weights: bool,
) -> PersistentMemory:
    """Weights and moments on one device.

    Args:
      model: the decoder.
      mesh: its axes.
      moment_bytes: of both moments of one parameter.
      reference: whether a KL term keeps a copy in the compute type.
      shares_weights: whether the sampler reads the master weights themselves.
    """
    axes, shapes = model.param_axes(), model.param_shapes()
    narrow = jax.eval_shape(model.cast, shapes)
    master = local_bytes(axes, shapes, mesh, "train")
    width = jnp.dtype(model.param_dtype).itemsize
    return PersistentMemory(
        master=master,
        moments=master * moment_bytes // width,
        sampler=0 if shares_weights else local_bytes(axes, narrow, mesh, "rollout"),
        reference=local_bytes(axes, narrow, mesh, "train") if reference else 0,
    )


def sampling_memory(setup: Setup) -> RolloutMemory:
    """Bytes that sampling adds on one device."""
    rollout = setup.config.rollout
    return rollout_memory(
        setup.model,
        slots=setup.slots,
        prompts=rollout.prompts_per_step,
        group_size=setup.sampled_group_size,
        prompt_tokens=setup.config.data.max_prompt_tokens,
        max_new_tokens=rollout.max_new_tokens,
        kv_dtype=rollout.kv_dtype,
        mesh=setup.mesh,
    )


def with_slots(setup: Setup, *, device_bytes: int) -> Setup:
    """The setup with ``config.rollout.slots``; for 0 with a slot for each row of a round if they
    fit beside the persistent memory, else with as many as do.

    Args:
      setup: with any number of slots.
      device_bytes: memory of one device.

    Raises:
      ConfigError: not even one slot for each device fits.
    """
    config, rollout = setup.config, setup.config.rollout
    if rollout.slots:
        return dataclasses.replace(setup, slots=rollout.slots)
    persistent = persistent_memory(setup)
    least = sampling_memory(dataclasses.replace(setup, slots=setup.shards))
    used = persistent.always + persistent.sampler + least.prompts + least.outputs + least.logits
    room = int(USABLE * device_bytes) - used
    try:
        slots = choose_slots(
            setup.model,
            rows=setup.sampled_rows,
            prompt_tokens=config.data.max_prompt_tokens,
            max_new_tokens=rollout.max_new_tokens,
            kv_dtype=rollout.kv_dtype,
            mesh=setup.mesh,
            slot_bytes=max(0, int(_SLOT_SHARE * room)),
        )
    except ValueError as error:
        raise ConfigError(
            f"config.rollout.max_new_tokens = {rollout.max_new_tokens}: {error}; weights, "
            f"optimizer and prompts take {used / 1e9:.2f} of {device_bytes / 1e9:.2f} GB; "
            "`echorl plan` says what to change"
        ) from error
    return dataclasses.replace(setup, slots=slots)
