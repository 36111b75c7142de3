"""Compiled programs kept in the workdir, so that a restart does not compile them again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextmanager
def keep_compiled(directory: Path, choice: Literal["auto", "on", "off"]) -> Iterator[None]:
    """Inside, keeps programs that took a second or more to compile in ``directory / "compiled"``.

    Args:
      directory: the workdir.
      choice: auto keeps programs for accelerators, unless ``JAX_COMPILATION_CACHE_DIR`` or JAX's
        config already names a place; on keeps them whatever they are for. The programs of a CPU
        may not run on another, and compile fast.
    """
    before = jax.config.values["jax_compilation_cache_dir"]
    wanted = choice == "on" or (
        choice == "auto" and before is None and jax.default_backend() != "cpu"
    )
    if not wanted:
        yield
        return
    _use(str(directory / "compiled"))
    try:
        yield
    finally:
        _use(before)


def _use(place: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", place)
    # What JAX has compiled before decided for good whether there is a cache.
    compilation_cache.reset_cache()
