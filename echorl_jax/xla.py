"""Flags that XLA reads from the environment once, when JAX first compiles."""

import os

# XLA has loops of few turns written out before they are vectorised, and what comes of a loop of 32
# is scalar code: copying a cache block of 32 positions then takes half as long again.
_PLAIN_LOOPS = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling"


def set_flags() -> None:
    """Adds to ``XLA_FLAGS`` what makes this package's programs faster on CPU, if not there.

    ``echorl`` calls it. A program of your own may, before JAX compiles anything; small models are
    then sampled some 12% faster and compiled in less time (docs/performance.md), and everything
    else that the process compiles for CPU has plain loops too. Accelerators ignore the flag.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_PLAIN_LOOPS}".strip()
