"""Plans a config for chips: memory, least time of a step, and other settings if it does not fit."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from packaging.requirements import Requirement

from echorl_jax.config import Config, ConfigError
from echorl_jax.files import model_path
from echorl_jax.models import Decoder
from echorl_jax.models.published import architecture
from echorl_jax.parallel import AXES, ShardingError, make_mesh
from echorl_jax.tools.plan.chips import GB, Chip, local_chip, parse_topology
from echorl_jax.tools.plan.memory_table import (
    PROGRAMS,
    SAMPLING,
    Memory,
    compile_programs,
    estimate,
)
from echorl_jax.tools.plan.roofline import SHARES, Lengths, exchanges, step_phases
from echorl_jax.training.capacity import USABLE, with_slots
from echorl_jax.training.setup import (
    Setup,
    configured_model,
    configured_objective,
    model_options,
    static_setup,
)

Say = Callable[[str], None]
Changes = dict[str, Any]  # config keys with other values than asked for


@dataclasses.dataclass(frozen=True)
class Target:
    """The chips that a plan is made for."""

    chip: Chip
    count: int
    devices: Any  # real or described ones to compile for; None: estimate by formula
    attention: str | None  # the attention kernel; None keeps the config's
    compiler: str = ""  # libtpu and its version, where it compiles

    @property
    def usable_bytes(self) -> int:
        return int(USABLE * self.chip.memory_bytes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run the config, with its figures."""

    setup: Setup
    target: Target
    changes: Changes
    memory: list[Memory]
    seconds: dict[str, float]  # by phase, at the chip's peaks
    lengths: Lengths

    @property
    def too_large(self) -> list[str]:
        """Programs that need more than the chip has."""
        return [m.program for m in self.memory if m.total > self.target.usable_bytes]

    @property
    def fits(self) -> bool:
        return not self.too_large

    @property
    def peak_bytes(self) -> int:
        return max(m.total for m in self.memory)

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def likely_seconds(self) -> float:
        """An estimate: phases at measured shares of the peak, and communication not hidden."""
        phases = sum(seconds / SHARES[name][0] for name, seconds in self.seconds.items())
        sent = (e.seconds(self.target.chip) or 0.0 for e in exchanges(self.setup, self.lengths))
        return phases + sum(sent)


def make_plan(
    config: Config,
    topology: str,
    *,
    lengths: Lengths | None = None,
    tries: int,
    say: Say,
    formula: bool = False,
    memory_gb: float = 0.0,
) -> list[Plan]:
    """Plans the config and, while that does not fit, changed ones.

    Args:
      topology: as :func:`~echorl_jax.tools.plan.chips.parse_topology` reads; "" is this machine.
      lengths: mean lengths for the times; the longest allowed where 0 or not given.
      tries: changed configs to compile, at most.
      say: receives lines of progress.
      formula: estimate, do not compile.
      memory_gb: of a chip, in place of what the topology's has; 0 keeps that.

    Returns:
      The plans in the order tried: the first is of the unchanged config, the last is the best.

    Raises:
      ConfigError: a topology, model or mesh that cannot be, or no libtpu for a TPU.
    """
    target = find_target(topology, formula=formula)
    if warning := unpinned(target.compiler):
        say(warning)
    if memory_gb:
        chip = dataclasses.replace(target.chip, memory_bytes=round(memory_gb * GB))
        target = dataclasses.replace(target, chip=chip)
    prompt, completion = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    given = lengths or Lengths(0, 0)
    image = given.image or min(config.data.max_image_tokens, given.prompt or prompt)
    lengths = Lengths(given.prompt or prompt, given.completion or completion, image)
    plans = [_plan(config, {}, target, lengths, say=say)]
    if warning := plans[0].setup.model.config.warn_of_positions(prompt, completion):
        say(warning)
    if plans[0].fits or not tries:
        return plans
    for changes in candidates(config, target, lengths)[:tries]:
        say(f"{', '.join(plans[-1].too_large)} too large; trying {describe(changes)}")
        plans.append(_plan(config, changes, target, lengths, before=plans[-1], say=say))
        if plans[-1].fits:
            break
    return plans


def find_target(topology: str, *, formula: bool = False) -> Target:
    """The chips of a ``--topology``, described by libtpu where it can compile for them.

    Raises:
      ConfigError: the topology is malformed, or libtpu is missing or does not know it.
    """
    if not topology:
        devices = jax.devices()
        return Target(local_chip(), len(devices), None if formula else devices, None)
    given = parse_topology(topology)
    if formula or not given.chip.libtpu_name:
        return Target(given.chip, given.count, None, "xla")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(given.name, "tpu").devices
    except Exception as error:  # a missing plugin raises one of several types
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--topology={topology}: libtpu does not describe {given.name} ({reason}); it has to "
            f"be installed (pip install 'jax[tpu]=={jax.__version__}') and to know that shape"
        ) from error
    compiler = f"libtpu {metadata.version('libtpu')}"
    return Target(given.chip, given.count, devices, "splash", compiler)


def unpinned(compiler: str) -> str:
    """A warning if this is not the libtpu that JAX asks for; "" if it is, or there is none.

    >>> unpinned("libtpu 0.0.1").partition(";")[0]
    'warning: libtpu 0.0.1 compiles these programs'
    """
    wanted = [r for r in map(Requirement, metadata.requires("jax") or []) if r.name == "libtpu"]
    version = compiler.removeprefix("libtpu ")
    if not compiler or not wanted or wanted[0].specifier.contains(version, prereleases=True):
        return ""
    return (
        f"warning: {compiler} compiles these programs; jax {jax.__version__} runs with libtpu"
        f"{wanted[0].specifier}, which may need other memory (pip install "
        f"'jax[tpu]=={jax.__version__}')"
    )


def _plan(
    config: Config,
    changes: Changes,
    target: Target,
    lengths: Lengths,
    *,
    before: Plan | None = None,
    say: Say = print,
) -> Plan:
    """Plans a changed config; takes the sampler's programs from ``before`` if they are the same."""
    setup = plan_setup(changed(config, changes), target)
    supervised = setup.objective.supervised
    left_out = set() if setup.scoring_passes else {"score"}
    if setup.model.config.vision is None:
        left_out.add("encode")
    if not setup.trains_tower:
        left_out.add("tower")
    if supervised:
        left_out |= {*SAMPLING, "score"}
    wanted = [name for name in PROGRAMS if name not in left_out]
    if target.devices is None:
        memory = estimate(setup)
    else:
        # Sampling depends only on the mesh and the slots.
        same = before and (before.setup.mesh, before.setup.slots) == (setup.mesh, setup.slots)
        known = [m for m in before.memory if m.program in SAMPLING] if before and same else []
        missing = [name for name in wanted if name not in [m.program for m in known]]
        memory = [*known, *compile_programs(setup, names=missing, say=say)]
    seconds = {phase.name: phase.seconds(target.chip) for phase in step_phases(setup, lengths)}
    if supervised:
        seconds = {name: seconds[name] for name in wanted if name in seconds}
    return Plan(setup, target, changes, memory, seconds, lengths)


def plan_setup(config: Config, target: Target) -> Setup:
    """The config on the target's mesh, with slots that fit.

    Raises:
      ConfigError: the mesh does not suit the chips or the model.
    """
    options = model_options(config)
    options["attention"] = target.attention or config.model.attention
    base = Decoder(architecture(model_path(config.model.path)), **options)
    model = configured_model(config, base)
    objective, mesh = configured_objective(config), _mesh(config, target)
    setup = static_setup(config, mesh, model, objective, platform=target.chip.platform)
    # If one slot per device does not fit, the plan shows how much too large it is.
    with suppress(ConfigError):
        setup = with_slots(setup, device_bytes=target.chip.memory_bytes)
    return dataclasses.replace(setup, slots=max(setup.slots // setup.shards, 1) * setup.shards)


def _mesh(config: Config, target: Target) -> Mesh | AbstractMesh:
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if target.devices is not None:
        return make_mesh(*sizes, devices=target.devices)
    known = math.prod(size for size in sizes if size != -1)
    shape = tuple(target.count // known if size == -1 else size for size in sizes)
    if math.prod(shape) != target.count:
        raise ShardingError(f"mesh {shape} does not fit {target.count} device(s)")
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def candidates(config: Config, target: Target, lengths: Lengths) -> list[Changes]:
    """Changes that fit by formula, the fastest first; the smallest if none does.

    Meshes with every split over ``tensor`` that the model allows, layers recomputed or not, and
    micro-batches halved down to a row on each device. The times leave out communication, so each
    doubling of ``tensor`` adds a twentieth to them.
    """
    target = dataclasses.replace(target, devices=None)
    found = []
    for changes in _variants(config, target):
        plan = _plan(config, changes, target, lengths)
        tensor = plan.setup.mesh.shape["tensor"]
        budget = plan.setup.config.optim.micro_batch_tokens
        rank = plan.step_seconds * (1 + 0.05 * math.log2(tensor)), -budget, len(changes)
        found.append((not plan.fits, rank if plan.fits else (plan.peak_bytes, 0, 0), changes))
    found.sort(key=lambda entry: entry[:2])
    fitting = [changes for large, _, changes in found if not large]
    return fitting or [changes for _, _, changes in found[:1]]


def _variants(config: Config, target: Target) -> Iterator[Changes]:
    setup = plan_setup(config, target)
    shape, given = setup.model.config, dict(setup.mesh.shape)
    budget = config.optim.micro_batch_tokens
    cuts: list[Changes] = [{}]
    while (budget := budget // 2) >= setup.bounds.longest:
        cuts.append({"optim.micro_batch_tokens": budget})
    remats: list[Changes] = [{}]
    if config.model.remat != "layer":
        remats.append({"model.remat": "layer"})
    for tensor in (2**power for power in range(target.count.bit_length())):
        mesh = {"data": 1, "fsdp": target.count // tensor, "tensor": tensor}
        split = (target.count, shape.num_heads, shape.intermediate_size)
        if any(size % tensor for size in split) or shape.hidden_size % mesh["fsdp"]:
            continue
        moved = {} if mesh == given else {f"mesh.{axis}": n for axis, n in mesh.items()}
        yield from (c for remat in remats for cut in cuts if (c := moved | remat | cut))


def changed(config: Config, changes: Changes) -> Config:
    """The config with dotted keys replaced."""
    for key, value in changes.items():
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def describe(changes: Changes) -> str:
    """The changes as options of a command line."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())
