"""A config's step on a mesh, as the run and its plan see it: rows, micro-batches, bytes held."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from echorl_jax.config import Config, ConfigError
from echorl_jax.core import Objective
from echorl_jax.models import Decoder
from echorl_jax.parallel import Platform, local_bytes
from echorl_jax.rollout import RolloutMemory, choose_slots, rollout_memory
from echorl_jax.rollout.memory import shares_weights
from echorl_jax.training.micro_batches import Bounds, micro_batch_shapes

# Part of a device's memory that may be filled: the rest is the runtime's, and fragmentation's.
USABLE = 0.95
# Part of the room left that slots may take: when work runs out, they are copied to half as many
# while the old ones are still there, and the decode loop has temporaries of its own.
_SLOT_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes on one device, whichever program runs; the sampler's weights only while it samples."""

    master: int
    moments: int
    sampler: int
    reference: int

    @property
    def always(self) -> int:
        return self.master + self.moments + self.reference


@dataclasses.dataclass(frozen=True)
class Job:
    """One way to run a config's step."""

    config: Config
    model: Decoder
    objective: Objective
    mesh: Mesh | AbstractMesh
    slots: int
    platform: Platform

    @property
    def shards(self) -> int:
        """Devices that rows are split over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def group_size(self) -> int:
        """Rows of a prompt that are sampled."""
        return self.config.rollout.group_size - self.objective.expert_rows

    @property
    def sampled_rows(self) -> int:
        """Rows of a round of sampling."""
        return self.config.rollout.prompts_per_step * self.group_size

    @property
    def rows(self) -> int:
        """Rows that a step of one round learns from."""
        if self.objective.supervised:
            return self.config.optim.sft_rows_per_step
        return self.config.rollout.prompts_per_step * self.config.rollout.group_size

    @property
    def most_rows(self) -> int:
        """Rows that a step learns from when it takes every round that it may."""
        rounds = self.config.objective.max_rounds if self.objective.dynamic_sampling else 1
        return self.rows * rounds

    @property
    def mini_batches(self) -> int:
        """Parts of a step's rows with an update each; demonstrations make one update."""
        return 1 if self.objective.supervised else self.config.objective.mini_batches

    @property
    def scoring_passes(self) -> int:
        """Forward passes over the step's rows before it learns: old policy, reference policy."""
        old = self.config.objective.old_logprobs == "trainer" and not self.objective.supervised
        return int(old) + int(self.objective.kl_coef != 0)

    @property
    def bounds(self) -> Bounds:
        """What every micro-batch keeps to."""
        return run_bounds(self.config, self.mesh)

    @property
    def micro_batch_shapes(self) -> list[tuple[int, int]]:
        """Every (rows, length) that a step may meet, the largest first."""
        rows = max(self.most_rows // self.mini_batches, 1)
        return micro_batch_shapes(rows, self.bounds)

    @property
    def micro_batch(self) -> tuple[int, int]:
        """The largest micro-batch: rows on all devices, and their length."""
        return self.micro_batch_shapes[0]

    @property
    def held(self) -> Held:
        """Weights and moments, from shapes and the sharding table alone."""
        first_moment = 2 if self.config.optim.moment_dtype == "bfloat16" else 4
        return held_bytes(
            self.model,
            self.mesh,
            moment_bytes=first_moment + 4,
            reference=self.objective.kl_coef != 0,
            shares_weights=shares_weights(
                self.model, devices=self.mesh.size, platform=self.platform
            ),
        )

    @property
    def rollout_memory(self) -> RolloutMemory:
        """What sampling adds."""
        rollout = self.config.rollout
        return rollout_memory(
            self.model,
            slots=self.slots,
            prompts=rollout.prompts_per_step,
            group_size=self.group_size,
            prompt_tokens=self.config.data.max_prompt_tokens,
            max_new_tokens=rollout.max_new_tokens,
            kv_dtype=rollout.kv_dtype,
            mesh=self.mesh,
        )


def run_bounds(config: Config, mesh: Mesh | AbstractMesh) -> Bounds:
    """The bounds of a run's micro-batches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return Bounds(
        longest=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        token_budget=config.optim.micro_batch_tokens * shards,
        row_multiple=shards,
    )


def held_bytes(
    model: Decoder,
    mesh: Mesh | AbstractMesh,
    *,
    moment_bytes: int,
    reference: bool,
    shares_weights: bool,
) -> Held:
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
    return Held(
        master=master,
        moments=master * moment_bytes // width,
        sampler=0 if shares_weights else local_bytes(axes, narrow, mesh, "rollout"),
        reference=local_bytes(axes, narrow, mesh, "train") if reference else 0,
    )


def with_slots(job: Job, *, device_bytes: int) -> Job:
    """The job with ``config.rollout.slots``, or for 0 all rows of a round if they fit beside what
    is held, else as many as do.

    Args:
      job: with any number of slots.
      device_bytes: memory of one device.

    Raises:
      ConfigError: not even one slot for each device fits.
    """
    config, rollout = job.config, job.config.rollout
    if rollout.slots:
        return dataclasses.replace(job, slots=rollout.slots)
    held, least = job.held, dataclasses.replace(job, slots=job.shards).rollout_memory
    used = held.always + held.sampler + least.prompts + least.outputs + least.logits
    room = int(USABLE * device_bytes) - used
    try:
        slots = choose_slots(
            job.model,
            rows=job.sampled_rows,
            prompt_tokens=config.data.max_prompt_tokens,
            max_new_tokens=rollout.max_new_tokens,
            kv_dtype=rollout.kv_dtype,
            mesh=job.mesh,
            slot_bytes=max(0, int(_SLOT_SHARE * room)),
        )
    except ValueError as error:
        raise ConfigError(
            f"config.rollout.max_new_tokens = {rollout.max_new_tokens}: {error}; weights, "
            f"optimizer and prompts take {used / 1e9:.2f} of {device_bytes / 1e9:.2f} GB; "
            "`echorl plan` says what to change"
        ) from error
    return dataclasses.replace(job, slots=slots)
