"""How many rows are decoded at once: as many as fit beside a run's own state."""

from echorl_jax.config import Config, ConfigError
from echorl_jax.core import Objective
from echorl_jax.models import Decoder
from echorl_jax.rollout import choose_slots, rollout_memory
from echorl_jax.training.chips import USABLE
from echorl_jax.training.programs import Held

# Part of the room left that slots may take: when work runs out, they are copied to half as many
# while the old ones are still there, and the decode loop has temporaries of its own.
_SHARE = 0.6


def fitting_slots(
    config: Config,
    model: Decoder,
    objective: Objective,
    mesh,
    held: Held,
    *,
    device_bytes: int,
) -> int:
    """``config.rollout.slots``, or for 0 all rows of a step if they fit, else as many as do.

    Args:
      config, model, objective: of the run.
      mesh: its axes.
      held: weights and moments on one device.
      device_bytes: its memory.

    Raises:
      ConfigError: not even one slot for each device fits.
    """
    rollout = config.rollout
    if rollout.slots:
        return rollout.slots
    group = rollout.group_size - objective.expert_rows
    sizes = {
        "prompt_tokens": config.data.max_prompt_tokens,
        "max_new_tokens": rollout.max_new_tokens,
        "kv_dtype": rollout.kv_dtype,
        "mesh": mesh,
    }
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    fixed = rollout_memory(
        model, slots=shards, prompts=rollout.prompts_per_step, group_size=group, **sizes
    )
    used = held.always + held.sampler + fixed.prompts + fixed.outputs + fixed.logits
    room = int(USABLE * device_bytes) - used
    try:
        return choose_slots(
            model,
            rows=rollout.prompts_per_step * group,
            slot_bytes=max(0, int(_SHARE * room)),
            **sizes,
        )
    except ValueError as error:
        raise ConfigError(
            f"config.rollout.max_new_tokens = {rollout.max_new_tokens}: {error}; weights, "
            f"optimizer and prompts take {used / 1e9:.2f} of {device_bytes / 1e9:.2f} GB; "
            "`echorl plan` says what to change"
        ) from error
