"""The wheel: what an environment without a clone gets."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources; setuptools leaves its files there."""
    directory = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("echorl_jax", "configs"):
        shutil.copytree(ROOT / name, directory / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    build = "wheel --quiet --no-deps --no-build-isolation --wheel-dir=dist ."
    subprocess.run([sys.executable, "-m", "pip", *build.split()], cwd=directory, check=True)
    (found,) = (directory / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, and the packages of this one."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=False)
    (packages,) = directory.glob("lib/python*/site-packages")
    known = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "known.pth").write_text("\n".join(known))
    install = f"--python={directory / 'bin' / 'python'} install --quiet --no-deps --no-index"
    pip = [sys.executable, "-m", "pip", *install.split(), str(wheel)]
    subprocess.run(pip, check=True, cwd=directory)
    return directory / "bin"


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_the_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "echorl_jax"
    files = {str(p.relative_to(ROOT)) for p in package.rglob("*") if p.is_file()}
    files |= {f"echorl_jax/assets/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    assert {name for name in files if "__pycache__" not in name} <= names


@pytest.mark.slow
def test_quickstart_trains_and_reports_without_a_clone(environment: Path, tmp_path: Path) -> None:
    def echorl(*words: str) -> str:
        done = subprocess.run(
            [environment / "echorl", *words],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    few = ["--config.steps=2", "--config.data.eval=countdown:split=eval&count=16"]
    told = echorl("quickstart", "runs/small", *few)
    run = tmp_path / "runs" / "small"
    assert "Held-out success" in told and "report --workdir=runs/small" in told
    assert (run / "report.html").exists() and (run / "export" / "model.safetensors").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    program = (
        "import echorl_jax; from echorl_jax.config_file import load_config\n"
        "print(echorl_jax.__file__)\n"
        "print(load_config('configs/paper.py:qwen2.5-math-7b,dapo').objective.name)"
    )
    done = subprocess.run(
        [environment / "python", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    file, objective = done.stdout.split()
    assert file.startswith(str(environment.parent)) and objective == "dapo"
