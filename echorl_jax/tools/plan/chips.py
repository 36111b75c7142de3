"""Memory and peak speeds of accelerators, by the names that clouds and data sheets give them."""

import dataclasses
import difflib
import math
import re
import time

import jax
import jax.numpy as jnp

from echorl_jax.config import ConfigError
from echorl_jax.parallel import Platform, platform_of
from echorl_jax.rollout.memory import device_bytes

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device with its manufacturer's peak speeds, dense, without sparsity."""

    name: str
    memory_bytes: int
    flops_per_second: float  # bfloat16 matrix products
    bytes_per_second: float  # device memory
    # All links to other chips together, in one direction; None where unknown.
    link_bytes_per_second: float | None = None
    libtpu_name: str = ""  # accelerator type, with {} for the number of cores
    cores: int = 1
    platform: Platform = "tpu"
    dimensions: int = 2  # of a slice's torus


# Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e system pages); NVIDIA's data sheets, and AWS
# for the A10G. They give links in both directions together (ICI 400, 1,200, 800 GB/s; NVLink 600,
# 900, 1,800): half of it is here.
# libtpu describes a v4 chip as two devices, which on the machine are one: no name of it here.
TPUS = {
    "v4": Chip("TPU v4", 32 * GB, 275e12, 1228e9, 300e9, cores=2, dimensions=3),
    "v5e": Chip("TPU v5e", 16 * GB, 197e12, 819e9, 200e9, "v5litepod-{}"),
    "v5p": Chip("TPU v5p", 95 * GB, 459e12, 2765e9, 600e9, "v5p-{}", cores=2, dimensions=3),
    "v6e": Chip("TPU v6e", 32 * GB, 918e12, 1640e9, 400e9, "v6e-{}"),
}
# T4 has no bfloat16: its peak is that of float32, in which it has to compute.
GPUS = {
    "t4": Chip("T4 16 GB", 16 * GB, 8.1e12, 320e9, platform="gpu"),
    "l40s": Chip("L40S 48 GB", 48 * GB, 362e12, 864e9, platform="gpu"),
    "l4": Chip("L4 24 GB", 24 * GB, 121e12, 300e9, platform="gpu"),
    "a10g": Chip("A10G 24 GB", 24 * GB, 70e12, 600e9, platform="gpu"),
    "rtx4090": Chip("RTX 4090 24 GB", 24 * GB, 165e12, 1008e9, platform="gpu"),
    "a100-40gb": Chip("A100 40 GB", 40 * GB, 312e12, 1555e9, 300e9, platform="gpu"),
    "a100": Chip("A100 80 GB", 80 * GB, 312e12, 2039e9, 300e9, platform="gpu"),
    "h100": Chip("H100 80 GB", 80 * GB, 989e12, 3350e9, 450e9, platform="gpu"),
    "h200": Chip("H200 141 GB", 141 * GB, 989e12, 4800e9, 450e9, platform="gpu"),
    "b200": Chip("B200 180 GB", 180 * GB, 2250e12, 7700e9, 900e9, platform="gpu"),
}
ALIASES = {"v5litepod": "v5e", "4090": "rtx4090", "a100-80gb": "a100"}
FORMS = "v5litepod-16, v6e-8, v5p-64, v5p:2x2x2, h100:8, 8xH100"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind; ``name`` is what libtpu calls the slice."""

    chip: Chip
    count: int
    name: str


def parse_topology(text: str) -> Topology:
    """Reads the names that clouds and JAX give slices and machines.

    Google's types count chips of v5e and v6e, and cores of v4 and v5p, two to a chip; such a slice
    has the shape that Google gives it by default.

    Raises:
      ConfigError: an unknown chip or a malformed shape.

    >>> topology = parse_topology("v5p-64")
    >>> topology.count, topology.name
    (32, 'v5p:2x4x4')
    >>> parse_topology("8xH100").count
    8
    """
    known, lower = TPUS | GPUS, text.lower()
    if found := re.fullmatch(r"([1-9]\d*)x(.+)", lower):
        shape, word = found.groups()
    elif found := re.fullmatch(r"(v\w+)-(\d+)", lower):
        word, shape = found[1], _default_shape(found[1], int(found[2]))
    else:
        word, colon, shape = lower.partition(":")
        shape = shape if colon or word.startswith("v") else "1"
    name, sides = ALIASES.get(word, word), shape.split("x")
    if name not in known:
        near = difflib.get_close_matches(word, [*known, *ALIASES], n=3, cutoff=0.5)
        raise ConfigError(
            f"--topology={text}: no chip is called {word[:40]!r}; known: "
            f"{', '.join(near or [*known])}; for another card give one as fast, and --memory_gb"
        )
    if not all(side.isdecimal() and int(side) for side in sides):
        raise ConfigError(f"--topology={text}: must be CHIP and a number or shape: {FORMS}")
    count = math.prod(map(int, sides))
    return Topology(known[name], count, f"{name}:{shape}")


def _default_shape(word: str, number: int) -> str:
    """Google's shape of a type such as v5p-64: sides are powers of two, the shorter ones first.

    >>> _default_shape("v6e", 8), _default_shape("v4", 8)
    ('2x4', '2x2x1')
    """
    chip = TPUS.get(ALIASES.get(word, word))
    chips = number // chip.cores if chip else 0
    if chip is None or chips * chip.cores != number or chips.bit_count() != 1:
        return ""
    power, axes = chips.bit_length() - 1, chip.dimensions
    sides = [2 ** ((power + axis) // axes) for axis in range(axes)]
    return "x".join(map(str, sorted(sides, key=lambda side: (side == 1, side))))


def local_chip() -> Chip:
    """This machine's device; the peaks of an unknown one are measured, which takes a second."""
    kind, limit = jax.local_devices()[0].device_kind, device_bytes()
    # JAX calls TPUs "TPU v5 lite" (v5e), "TPU v5" (v5p) and "TPU v6 lite" (v6e).
    spelt = re.sub("v5$", "v5p", kind.lower().replace(" lite", "e").replace(" ", ""))
    for word, chip in (TPUS | GPUS).items():
        if word in spelt:
            return dataclasses.replace(chip, memory_bytes=limit)
    side, size = 1024, 1 << 25
    product = _seconds(lambda a: a @ a, jnp.ones((side, side), jnp.float32))
    total = _seconds(lambda a: a + 1.0, jnp.ones(size, jnp.float32))
    flops, speed = 2 * side**3 / product, 2 * 4 * size / total
    return Chip(f"{kind} (peaks measured)", limit, flops, speed, platform=platform_of(None))


def _seconds(function, argument) -> float:
    """The shortest of three times."""
    compiled = jax.jit(function)
    compiled(argument).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        compiled(argument).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
