"""A package imports only packages on lower layers, never one on its own layer."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "echorl_jax"
LAYERS = {
    "choices": 0,
    "custom": 0,
    "errors": 0,
    "files": 0,
    "precision": 0,
    "remote": 0,
    "types": 0,
    "xla": 0,
    "config": 0,
    "other_names": 0,
    "config_file": 0,
    "core": 1,
    "parallel": 1,
    "cluster": 1,
    "models": 2,
    "data": 2,
    "rewards": 2,
    "rollout": 3,
    "environment": 4,
    "evaluation": 5,
    "training": 6,
    "tools": 7,
    "commands": 8,
    "cli": 8,
    "__main__": 8,
}
# These know nothing of the config, files of rows, or text.
PURE = ("core", "parallel", "cluster", "models", "rollout")


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "echorl_jax" and len(parts) > 1 and parts[1] in LAYERS:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_only_lower_layers(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in LAYERS, f"{own} has no layer"
    for other in imported_packages(path) - {own}:
        lower = LAYERS[other] < LAYERS[own]
        top = LAYERS[own] == LAYERS[other] == 8  # the program and its commands
        same_base = LAYERS[own] == LAYERS[other] == 0
        assert lower or top or same_base, f"{own} (layer {LAYERS[own]}) imports {other}"


@pytest.mark.parametrize("package", PURE)
def test_pure_packages_do_not_know_the_config(package: str) -> None:
    for path in (PACKAGE / package).rglob("*.py"):
        assert not imported_packages(path) & {"config", "config_file"}, path
