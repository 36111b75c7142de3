"""Programs kept in the workdir are found again, and nowhere else is touched."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from echorl_jax.training.warmup import keep_compiled


@pytest.fixture
def hits() -> Iterator[list[str]]:
    """Cache hits of JAX; every program is cached, however fast it compiles."""
    found: list[str] = []

    def note(event: str, **_: object) -> None:
        if event.endswith("compilation_cache/cache_hits"):
            found.append(event)

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (None, 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.monitoring.register_event_listener(note)
    yield found
    jax.monitoring.unregister_event_listener(note)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compute() -> float:
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((3, 3))).sum())


def test_a_restart_finds_what_was_compiled(tmp_path: Path, hits: list[str]) -> None:
    compute()  # what was compiled before does not decide
    with keep_compiled(tmp_path, "on"):
        first = compute()
        assert list((tmp_path / "compiled").iterdir()) and not hits
    with keep_compiled(tmp_path, "on"):
        assert compute() == first
    assert hits
    hits.clear()
    assert compute() == first and not hits  # outside no cache is left


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_programs_of_a_cpu_are_kept_on_demand_only(tmp_path: Path, hits, choice) -> None:
    with keep_compiled(tmp_path, choice):
        compute()
    assert not (tmp_path / "compiled").exists()


def test_a_cache_of_the_users_own_stays(tmp_path: Path, hits, monkeypatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    try:
        with keep_compiled(tmp_path, "auto"):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    with keep_compiled(tmp_path, "auto"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    assert jax.config.jax_compilation_cache_dir is None
