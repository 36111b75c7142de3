"""The flags that a process gets for XLA."""

import os
import re
import subprocess
import sys

import pytest

from echorl_jax import xla

COPY = """
from echorl_jax import xla
xla.set_flags()
import jax, jax.numpy as jnp
jax.jit(lambda x, i: x[i])(jnp.zeros((4, 64, 2, 32, 32)), 1)
"""


def test_copies_of_short_blocks_are_vectorised(tmp_path):
    """In LLVM's code for copying blocks of 32 positions. Without the flag x86 copies float by
    float; if XLA stops doing that, the flag can go.
    """
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_dump_emitter_re=.*"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", COPY], check=True, env=environment)
    (file,) = tmp_path.glob("*lambda*slice*with-opt.ll")
    code = file.read_text()
    assert re.search(r"load <\d+ x float>", code)
    assert "load float" not in code


@pytest.mark.parametrize("given", ["", "--xla_dump_to=x", "--xla_backend_extra_options=mine=1"])
def test_flags_of_the_user_stay(given, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", given)
    xla.set_flags()
    xla.set_flags()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[: len(given.split())] == given.split()
    assert sum("xla_backend_extra_options" in flag for flag in flags) == 1
    assert ("mine=1" in given) == (flags == given.split())
