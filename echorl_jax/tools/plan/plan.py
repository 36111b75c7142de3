"""Whether a config fits its chips, how long a step takes at least, and what to change if not."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from echorl_jax.config import Config, ConfigError
from echorl_jax.data.tokens import model_path
from echorl_jax.models import Decoder
from echorl_jax.models.published import architecture
from echorl_jax.parallel import AXES, ShardingError, make_mesh
from echorl_jax.tools.plan.chips import GPUS, Chip, local_chip, parse_topology
from echorl_jax.tools.plan.memory_table import PROGRAMS, Memory, compile_programs, estimate
from echorl_jax.tools.plan.roofline import Lengths, step_phases
from echorl_jax.training.capacity import USABLE, persistent_memory, with_slots
from echorl_jax.training.setup import Setup, configured_objective, static_setup

Say = Callable[[str], None]
_SAMPLING = ("prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a plan is made for."""

    chip: Chip
    count: int
    devices: Any  # described or real ones to compile for; None where a formula has to do
    attention: str | None  # the kernel there; None keeps the config's

    @property
    def usable_bytes(self) -> int:
        return int(USABLE * self.chip.memory_bytes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run the config, with its figures."""

    setup: Setup
    target: Target
    changes: dict[str, Any]  # config keys that differ from what was asked
    memory: list[Memory]
    seconds: dict[str, float]  # by phase, at the chip's peaks
    lengths: Lengths

    @property
    def fits(self) -> bool:
        return not self.too_large

    @property
    def too_large(self) -> list[str]:
        """Programs that need more than the chip has."""
        return [m.program for m in self.memory if m.total > self.target.usable_bytes]

    @property
    def peak_bytes(self) -> int:
        return max(m.total for m in self.memory)

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def make_plan(
    config: Config,
    topology: str,
    *,
    lengths: Lengths | None,
    tries: int,
    say: Say,
    formula: bool = False,
) -> list[Plan]:
    """The plan for the config as it is and, while that does not fit, for changed ones.

    Args:
      config: validated options.
      topology: ``v5p:2x2x2``, ``h100:8``; "" is this machine.
      lengths: mean lengths for the times; the longest allowed unless given.
      tries: changed configs to compile, at most.
      say: told about progress.
      formula: estimate, do not compile.

    Returns:
      The plans in the order tried: the first is the config's own, the last the best.

    Raises:
      ConfigError: a topology, model or mesh that cannot be, or no libtpu for a TPU.
    """
    target = find_target(topology, formula=formula)
    lengths = lengths or Lengths(config.data.max_prompt_tokens, config.rollout.max_new_tokens)
    plans = [_plan(config, {}, target, lengths, known={}, say=say)]
    prompt, completion = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    if warning := plans[0].setup.model.config.warn_of_positions(prompt, completion):
        say(warning)
    if plans[0].fits or not tries:
        return plans
    for changes in candidates(config, target, lengths)[:tries]:
        say(f"{', '.join(plans[-1].too_large)} too large; trying {describe(changes)}")
        known = _same_sampling(plans[-1], changed(config, changes))
        plans.append(_plan(config, changes, target, lengths, known=known, say=say))
        if plans[-1].fits:
            break
    return plans


def _same_sampling(plan: Plan, config: Config) -> dict[str, Memory]:
    """What need not be compiled again: sampling depends on the mesh and the slots alone."""
    setup = plan_setup(config, plan.target)
    if setup.mesh != plan.setup.mesh or setup.slots != plan.setup.slots:
        return {}
    return {m.program: m for m in plan.memory if m.program in _SAMPLING}


def find_target(topology: str, *, formula: bool = False) -> Target:
    """The chips of a ``--topology``, described by libtpu where they are TPUs."""
    if not topology:
        devices = jax.devices()
        return Target(local_chip(), len(devices), None if formula else devices, None)
    chip, count = parse_topology(topology)
    if formula or topology.partition(":")[0] in GPUS:
        return Target(chip, count, None, "xla")
    return Target(chip, count, _described(topology), "splash")


def _described(topology: str) -> Any:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # a missing plugin shows as any of several
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--topology={topology}: libtpu does not describe it ({reason}); it has to be "
            "installed (pip install 'echorl-jax[tpu]') and to know that shape"
        ) from error


def _plan(
    config: Config,
    changes: dict[str, Any],
    target: Target,
    lengths: Lengths,
    *,
    known: dict[str, Memory],
    say: Say,
) -> Plan:
    setup = plan_setup(changed(config, changes), target)
    if target.devices is None:
        memory = estimate(setup)
    else:
        wanted = PROGRAMS if setup.scoring_passes else tuple(n for n in PROGRAMS if n != "score")
        if setup.objective.supervised:
            wanted = ("accumulate", "apply")
        missing = tuple(name for name in wanted if name not in known)
        fresh = compile_programs(setup, names=missing, say=say)
        by_name = known | {m.program: m for m in fresh}
        memory = [by_name[name] for name in wanted if name in by_name]
    phases = step_phases(setup, lengths)
    seconds = {phase.name: phase.seconds(target.chip) for phase in phases}
    if setup.objective.supervised:
        seconds = {name: seconds[name] for name in ("accumulate", "apply")}
    return Plan(setup, target, changes, memory, seconds, lengths)


def plan_setup(config: Config, target: Target) -> Setup:
    """The config on the target's mesh, with slots that fit.

    Raises:
      ConfigError: the mesh does not suit the chips or the model.
    """
    model = Decoder(
        architecture(model_path(config.model.path)),
        dtype=config.model.dtype,
        remat=config.model.remat,
        attention=target.attention or config.model.attention,  # pyright: ignore[reportArgumentType]
    )
    objective = configured_objective(config)
    mesh = _mesh(config, target)
    setup = static_setup(config, mesh, model, objective, platform=target.chip.platform)
    slots = setup.shards
    # Without room for one slot on each device the plan shows by how much it is too large.
    with suppress(ConfigError):
        slots = with_slots(setup, device_bytes=target.chip.memory_bytes).slots
    return dataclasses.replace(setup, slots=max(slots // setup.shards, 1) * setup.shards)


def _mesh(config: Config, target: Target) -> Mesh | AbstractMesh:
    sizes = config.mesh
    if target.devices is not None:
        return make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices=target.devices)
    known = math.prod(n for n in (sizes.data, sizes.fsdp, sizes.tensor) if n != -1)
    shape = tuple(target.count // known if n == -1 else n for n in vars(sizes).values())[:3]
    if math.prod(shape) != target.count:
        raise ShardingError(f"mesh {shape} does not fit {target.count} device(s)")
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def candidates(config: Config, target: Target, lengths: Lengths) -> list[dict[str, Any]]:
    """Changed keys that fit by formula, the fastest first; the smallest if none does.

    Meshes with every split over ``tensor`` that the model allows, layers recomputed or not, and
    micro-batches halved down to a row on each device. Communication is not in the times, so a
    doubling of ``tensor`` counts as a twentieth of them.
    """
    target = dataclasses.replace(target, devices=None)
    found = []
    for changes in _variants(config, target):
        plan = _plan(changed(config, changes), changes, target, lengths, known={}, say=print)
        tensor = plan.setup.mesh.shape["tensor"]
        budget = plan.setup.config.optim.micro_batch_tokens
        rank = plan.step_seconds * (1 + 0.05 * math.log2(tensor)), -budget, len(changes)
        found.append((not plan.fits, rank if plan.fits else (plan.peak_bytes, 0, 0), changes))
    found.sort(key=lambda entry: entry[:2])
    fitting = [changes for large, _, changes in found if not large]
    return fitting or [changes for _, _, changes in found[:1]]


def _variants(config: Config, target: Target) -> Iterator[dict[str, Any]]:
    own = plan_setup(config, target)
    shape, given = own.model.config, dict(own.mesh.shape)
    remats = dict.fromkeys((config.model.remat, "layer"))
    budgets, most = [], config.optim.micro_batch_tokens
    while not budgets or most >= own.bounds.longest:
        budgets.append(most)
        most //= 2
    for tensor in (2**power for power in range(target.count.bit_length())):
        if target.count % tensor or shape.num_heads % tensor or shape.intermediate_size % tensor:
            continue
        mesh = {"data": 1, "fsdp": target.count // tensor, "tensor": tensor}
        if shape.hidden_size % mesh["fsdp"]:
            continue
        moved = {} if mesh == given else {f"mesh.{axis}": n for axis, n in mesh.items()}
        for remat in remats:
            kept = {} if remat == config.model.remat else {"model.remat": remat}
            for budget in budgets:
                cut = {"optim.micro_batch_tokens": budget} if budget != budgets[0] else {}
                if moved or kept or cut:
                    yield moved | kept | cut


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The config with dotted keys replaced."""
    for key, value in changes.items():
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def describe(changes: dict[str, Any]) -> str:
    """The changes as options to type."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def chips_needed(plan: Plan) -> int:
    """Chips over which the state alone has to be split, by its bytes."""
    memory = persistent_memory(plan.setup)
    copies = plan.setup.mesh.shape["fsdp"] * plan.setup.mesh.shape["tensor"]
    return math.ceil((memory.always + memory.master) * copies / plan.target.usable_bytes)
