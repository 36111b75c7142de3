"""The flags that a process gets for XLA."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from echorl_jax import xla

COPY = """
import sys
if sys.argv[1] == "plain":
    from echorl_jax import xla
    xla.set_flags()
import jax, jax.numpy as jnp
jax.jit(lambda x, i: x[i])(jnp.zeros((4, 64, 2, 32, 32)), 1)
"""


def code_of_a_copy(how: str, place: Path) -> str:
    """LLVM's code for copying blocks of 32 positions."""
    flags = f"--xla_dump_to={place} --xla_dump_hlo_as_text"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", COPY, how], check=True, env=environment)
    (file,) = place.glob("*lambda*slice*with-opt.ll")
    return file.read_text()


def test_copies_of_short_blocks_are_vectorised(tmp_path):
    """If the first fails, XLA has learnt it and the flag can go; if the second, it has forgotten
    the flag.
    """
    (tmp_path / "default").mkdir()
    (tmp_path / "plain").mkdir()
    assert not re.search(r"load <\d+ x float>", code_of_a_copy("default", tmp_path / "default"))
    code = code_of_a_copy("plain", tmp_path / "plain")
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
