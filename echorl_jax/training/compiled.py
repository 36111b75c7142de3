"""Compiled programs: counted, and kept in the workdir, so that a restart need not compile them."""

import sys
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
    # The first compilation of a process decides whether JAX uses a cache, unless it is reset.
    compilation_cache.reset_cache()


class CompileCounter:
    """Counts XLA compilations in this process from its creation on."""

    def __init__(self) -> None:
        self.count = 0
        self._expected: int | None = None  # compilations up to this count are expected
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def surprised(self) -> bool:
        """True once, if anything was compiled since the first call, which ends the warm-up."""
        if self._expected is None:
            self._expected = self.count
        found = self.count > self._expected
        if found:
            self._expected = sys.maxsize
        return found

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Compilations inside do not count as surprises, such as those of the first evaluation."""
        before = self.count
        yield
        if self._expected is not None:
            self._expected += self.count - before
