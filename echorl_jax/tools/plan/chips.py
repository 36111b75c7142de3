"""Memory and peak speeds of accelerators."""

import dataclasses
import math
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
    libtpu_name: str = ""  # accelerator type for libtpu, with {} for the number of cores
    cores: int = 1
    platform: Platform = "tpu"


# Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e system pages); NVIDIA's data sheets. Both give
# links in both directions together (ICI 400, 1,200, 800 GB/s; NVLink 600, 900): half of it is here.
TPUS = {
    "v5e": Chip("TPU v5e", 16 * GB, 197e12, 819e9, 200e9, "v5litepod-{}"),
    "v5p": Chip("TPU v5p", 95 * GB, 459e12, 2765e9, 600e9, "v5p-{}", cores=2),
    "v6e": Chip("TPU v6e", 32 * GB, 918e12, 1640e9, 400e9, "v6e-{}"),
}
# T4 has no bfloat16: its peak is that of float32, in which it has to compute.
GPUS = {
    "t4": Chip("T4 16 GB", 16 * GB, 8.1e12, 320e9, platform="gpu"),
    "l4": Chip("L4 24 GB", 24 * GB, 121e12, 300e9, platform="gpu"),
    "rtx4090": Chip("RTX 4090 24 GB", 24 * GB, 165e12, 1008e9, platform="gpu"),
    "a100": Chip("A100 80 GB", 80 * GB, 312e12, 2039e9, 300e9, platform="gpu"),
    "h100": Chip("H100 80 GB", 80 * GB, 989e12, 3350e9, 450e9, platform="gpu"),
    "h200": Chip("H200 141 GB", 141 * GB, 989e12, 4800e9, 450e9, platform="gpu"),
}


def parse_topology(text: str) -> tuple[Chip, int]:
    """Reads ``v5p:2x2x2`` or ``h100:8`` as the chip and the number of chips.

    Raises:
      ConfigError: an unknown chip or a malformed shape.

    >>> chip, count = parse_topology("v5e:4x4")
    >>> chip.name, count
    ('TPU v5e', 16)
    """
    name, _, shape = text.partition(":")
    known, sides = TPUS | GPUS, shape.split("x")
    if name not in known or not all(side.isdigit() and int(side) for side in sides):
        raise ConfigError(
            f"--topology={text}: must be CHIP:SHAPE such as v5p:2x2x2, v5e:4x4 or h100:8, with "
            f"CHIP one of {', '.join(known)}"
        )
    return known[name], math.prod(map(int, sides))


def local_chip() -> Chip:
    """This machine's device; the peaks of an unknown one are measured, which takes a second."""
    kind, limit = jax.local_devices()[0].device_kind, device_bytes()
    for word, chip in (TPUS | GPUS).items():
        if word in kind.lower().replace("v5 lite", "v5e"):
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
