"""Models from and to a Hugging Face Hub, which here is a stand-in behind the same interface."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from echorl_jax.config import ConfigError
from echorl_jax.config_file import from_dict, to_dict
from echorl_jax.files import model_path, replace_json
from echorl_jax.models import load_model
from tests.hub_server import TOKEN, Hub, hub
from tests.integration.conftest import small_config

BUILTIN = Path(model_path("builtin:countdown"))
GENERATION = {"eos_token_id": 2, "temperature": 0.6, "top_p": 0.95}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as running:
        yield running


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a chat template and sampling settings that only a copy can give."""
    directory = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(BUILTIN, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    replace_json(directory / "generation_config.json", GENERATION)
    return directory


def echorl(
    server: Hub, home: Path, *arguments: str, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    """Runs a command against the stand-in, with a cache and a login that are its alone."""
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    return subprocess.run(
        [sys.executable, "-m", "echorl_jax", *arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=500,
    )


def train_config(tmp_path: Path, **sections: dict) -> str:
    """The path of a short run's config."""
    file = tmp_path / "config.json"
    replace_json(file, to_dict(small_config(**sections)))
    return str(file)


@pytest.fixture(scope="module")
def pushed_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path]]:
    """A run of three steps from revision v2 of a repository, pushed twice; and its hub."""
    place = tmp_path_factory.mktemp("pushed")
    with hub() as server:
        files = {file.name: file.read_bytes() for file in base.iterdir() if file.is_file()}
        server.repositories["them/base"] = {"main": {"README.md": b"empty"}, "v2": files}
        config = train_config(
            place,
            steps=3,
            model={"path": "them/base", "revision": "v2"},
            data={"template": "chat", "max_prompt_tokens": 64},
            checkpoint={"every": 3, "export": True, "export_every": 2, "push": "me/trained"},
        )
        run = place / "run"
        ran = echorl(server, place / "hf", "train", f"--config={config}", f"--workdir={run}")
        assert ran.returncode == 0, ran.stderr
        yield server, run


def test_a_run_takes_a_revision_and_pushes_its_model_with_a_card(
    pushed_run: tuple[Hub, Path],
) -> None:
    server, run = pushed_run
    assert server.messages[:2] == ["step 2", "step 3"] and "me/trained" in server.private
    pushed = server.repositories["me/trained"]["main"]
    for file in (run / "export").iterdir():
        assert pushed[file.name] == file.read_bytes()
    assert json.loads(pushed["generation_config.json"]).items() >= GENERATION.items()
    assert pushed["chat_template.jinja"].decode() == TEMPLATE
    _, head, text = pushed["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "them/base"
    assert f"echorl train --config={run.parent / 'config.json'} --workdir={run}" in text
    assert "(revision v2)" in text and "step 3 of 3" in text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| reward/mean | {last['reward/mean']:.4g} | 3 |" in text
    assert f"- training: `{small_config().data.train}`" in text
    assert '"checkpoint.push": "me/trained"' in text


def test_convert_pushes_a_checkpoint(pushed_run: tuple[Hub, Path], tmp_path: Path) -> None:
    (server, run), out = pushed_run, tmp_path / "out"
    home = run.parent / "hf"
    given = (f"--model={run}", f"--out={out}", "--push=me/again")
    wrong = echorl(server, home, "convert", *given, token="hf_wrong")
    assert wrong.returncode == 2 and not out.exists()
    assert wrong.stderr.startswith("echorl: me/again cannot be pushed to: ")
    assert len(wrong.stderr.splitlines()) == 1
    done = echorl(server, home, "convert", *given)
    assert done.returncode == 0, done.stderr
    assert f"{server.url}/me/again" in done.stdout
    pushed = server.repositories["me/again"]["main"]
    for name in ("model.safetensors", "generation_config.json", "chat_template.jinja", "README.md"):
        assert pushed[name] == (run / "export" / name).read_bytes() == (out / name).read_bytes()
    model, _ = load_model(out)
    assert model.config.eos_ids == (0, 2)  # of config.json, of generation_config.json


def test_a_push_that_cannot_be_made_is_told_before_the_model_loads(
    server: Hub, tmp_path: Path
) -> None:
    config = train_config(
        tmp_path, model={"path": "/no/such"}, checkpoint={"export": True, "push": "me/trained"}
    )
    arguments = ("train", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    ran = echorl(server, tmp_path / "hf", *arguments, token="hf_wrong")
    assert ran.returncode == 2
    assert ran.stderr.startswith("echorl: me/trained cannot be pushed to: ")


def test_an_unknown_revision_is_named(server: Hub, base: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in base.iterdir() if file.is_file()}
    server.repositories["them/base"] = {"main": files}
    given = ("--model=them/base@v9", f"--out={tmp_path / 'out'}")
    ran = echorl(server, tmp_path / "hf", "convert", *given)
    assert ran.returncode == 2 and "them/base@v9" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"checkpoint": {"push": "trained"}}, "config.checkpoint.push = 'trained': must be OWNER"),
        ({"checkpoint": {"push": "a/b", "export": False}}, 'must be "" without checkpoint.export'),
        ({"checkpoint": {"export_every": 3, "export": False}}, "must be 0 without"),
    ],
)
def test_wrong_settings_are_named(sections: dict, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(sections)
    assert expected in str(error.value)
