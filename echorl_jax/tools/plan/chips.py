"""What accelerators can hold and do: the figures that a plan is measured against."""

import dataclasses
import time

import jax
import jax.numpy as jnp

from echorl_jax.config import ConfigError
from echorl_jax.parallel import Platform, platform_of
from echorl_jax.rollout.memory import device_bytes

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. Peaks are the makers' figures, dense, without sparsity."""

    name: str
    memory_bytes: int
    flops_per_second: float  # bfloat16 matrix products
    bytes_per_second: float  # device memory
    # All links to other chips together, in one direction; None where they are not known.
    link_bytes_per_second: float | None = None
    libtpu_name: str = ""  # accelerator type as libtpu counts it, with {} for its number
    cores: int = 1  # that the number counts
    platform: Platform = "tpu"


# Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e system pages); NVIDIA's data sheets. Both give
# links in both directions together (ICI 400, 1,200, 800 GB/s; NVLink 600, 900): half of it is here.
TPUS = {
    "v5e": Chip("TPU v5e", 16 * GB, 197e12, 819e9, 200e9, "v5litepod-{}"),
    "v5p": Chip("TPU v5p", 95 * GB, 459e12, 2765e9, 600e9, "v5p-{}", cores=2),
    "v6e": Chip("TPU v6e", 32 * GB, 918e12, 1640e9, 400e9, "v6e-{}"),
}
GPUS = {
    "a100": Chip("A100 80 GB", 80 * GB, 312e12, 2039e9, 300e9, platform="gpu"),
    "h100": Chip("H100 80 GB", 80 * GB, 989e12, 3350e9, 450e9, platform="gpu"),
    "h200": Chip("H200 141 GB", 141 * GB, 989e12, 4800e9, 450e9, platform="gpu"),
}


def parse_topology(text: str) -> tuple[Chip, int]:
    """``v5p:2x2x2`` as the chip and their number; ``h100:8`` likewise.

    Raises:
      ConfigError: an unknown chip or a shape that is none.

    >>> chip, count = parse_topology("v5e:4x4")
    >>> chip.name, count
    ('TPU v5e', 16)
    """
    name, _, shape = text.partition(":")
    known = TPUS | GPUS
    sides = shape.split("x")
    if name not in known or not all(side.isdigit() and int(side) for side in sides):
        raise ConfigError(
            f"--topology={text}: must be CHIP:SHAPE such as v5p:2x2x2, v5e:4x4 or h100:8, with "
            f"CHIP one of {', '.join(known)}"
        )
    count = 1
    for side in sides:
        count *= int(side)
    return known[name], count


def local_chip() -> Chip:
    """This machine's device; of an unknown one the peaks are measured, in a second."""
    device, limit = jax.local_devices()[0], device_bytes()
    for word, chip in (TPUS | GPUS).items():
        kind = device.device_kind.lower()
        if word in kind or (word == "v5e" and "v5 lite" in kind):
            return dataclasses.replace(chip, memory_bytes=limit)
    flops, speed = _measure()
    name = f"{device.device_kind} (peaks measured)"
    return Chip(name, limit, flops, speed, platform=platform_of(None))


def _measure() -> tuple[float, float]:
    """Operations and bytes per second of one large product and one large sum, the best of three."""
    side, size = 1024, 1 << 25
    x = jnp.ones((side, side), jnp.float32)
    y = jnp.ones(size, jnp.float32)
    product = jax.jit(lambda a: a @ a)
    total = jax.jit(lambda a: a + 1.0)
    return 2 * side**3 / _best(product, x), 2 * 4 * size / _best(total, y)


def _best(function, argument) -> float:
    function(argument).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        function(argument).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
