"""Checkpoints: which stay, what comes back, damage and full disks; no model is needed."""

import dataclasses
import errno
import gc
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from echorl_jax.config import CheckpointConfig, Config, ConfigError, EchoConfig
from echorl_jax.errors import RunStopped, UserError
from echorl_jax.parallel import make_mesh
from echorl_jax.training.checkpoints import Checkpoints, Restored, read_params
from echorl_jax.training.faults import Faults
from echorl_jax.training.inputs import checksums, digest
from echorl_jax.training.optimizer import TrainState

# When one of several reads or writes fails, Orbax leaves the others behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """Collects Orbax's garbage within this file, where its complaints are ignored."""
    yield
    gc.collect()


def state_at(step: int, *, rows: int = 16) -> TrainState:
    """A state whose values nobody else has."""
    draw = np.random.default_rng(step).normal
    params = {"a": {"kernel": jnp.asarray(draw(size=(rows, 8)), jnp.float32)}}
    moments = {"m": jnp.asarray(draw(size=(rows, 8)), jnp.bfloat16), "n": jnp.int32(step)}
    return TrainState(params, moments, jnp.int32(step), jnp.int32(0))


def configured(**values: int | str) -> Config:
    return dataclasses.replace(Config(), checkpoint=CheckpointConfig(**values))


def opened(workdir: Path, config: Config | None = None, inject: str = "") -> Checkpoints:
    return Checkpoints.open(workdir, config or configured(), Faults.parse(inject, workdir))


def save(to: Checkpoints, step: int, *, rows: int = 16) -> None:
    to.save(
        step,
        state_at(step, rows=rows),
        data_position={"at": step},
        metrics_lines=step,
        history={"step_entropies": [[step / 3]]},
    )


def log(workdir: Path, step: int, **metrics: float | str | None) -> None:
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")


def saved(workdir: Path, steps: int, config: Config | None = None, scores=(None,) * 99) -> None:
    """A run of some steps; those that have a score were evaluated after they were saved."""
    workdir.mkdir(exist_ok=True)
    checkpoints = opened(workdir, config)
    for step, score in enumerate(scores[:steps], start=1):
        save(checkpoints, step)
        if score is not None:
            log(workdir, step, **{"eval/failed": 0.0, "eval/x/pass@1": score, "reward/mean": 1.0})
    checkpoints.close()


def restored(workdir: Path, config: Config | None = None) -> tuple[Restored | None, list[str]]:
    lines: list[str] = []
    checkpoints = opened(workdir, config)
    found = checkpoints.restore(state_at(0), lines.append)
    checkpoints.close()
    return found, lines


def steps_in(workdir: Path) -> list[int]:
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


def equal(a: TrainState, b: TrainState) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_the_newest_the_best_and_every_kth_stay(tmp_path: Path) -> None:
    scores = (0.1, 0.9, 0.3, None, 0.2, 0.4, 0.5, 0.6)
    saved(tmp_path, 8, configured(keep=2, keep_best=1, keep_every=5), scores)
    assert steps_in(tmp_path) == [2, 5, 7, 8]
    saved(tmp_path / "plain", 4, configured(keep=1, keep_best=0), scores)
    assert steps_in(tmp_path / "plain") == [4]
    step, params = read_params(tmp_path, "best", state_at(0).params)
    assert step == 2 and equal(params, state_at(2).params)
    assert read_params(tmp_path, "latest", state_at(0).params)[0] == 8
    with pytest.raises(UserError, match="no checkpoint '3'; there: 2, 5, 7, 8"):
        read_params(tmp_path, "3", state_at(0).params)


def test_the_best_survives_a_restart(tmp_path: Path) -> None:
    config = configured(keep=1)
    saved(tmp_path, 3, config, (0.9, 0.1, 0.2))
    assert steps_in(tmp_path) == [1, 3]
    checkpoints = opened(tmp_path, config)
    save(checkpoints, 4)
    checkpoints.close()
    assert steps_in(tmp_path) == [1, 4]


def best(workdir: Path) -> int:
    return read_params(workdir, "best", state_at(0).params)[0]


def test_the_best_is_the_mean_over_sources_or_the_reward(tmp_path: Path) -> None:
    """By hand: the means over x and y are 0.4, 0.5 and (only x was measured) 0.3."""
    saved(tmp_path, 4, configured(keep=4))
    assert best(tmp_path) == 4
    for step, reward in enumerate((0.7, 0.2, 0.7, 0.1), start=1):
        log(tmp_path, step, **{"reward/mean": reward})
    assert best(tmp_path) == 3
    for step, x, y in ((1, 0.8, 0.0), (2, 0.4, 0.6), (3, 0.3, None)):
        log(tmp_path, step, **{"eval/failed": 0.0, "eval/x/pass@1": x, "eval/y/pass@1": y})
    log(tmp_path, 4, **{"eval/failed": 1.0, "reward/mean": 0.9})
    assert best(tmp_path) == 2
    log(tmp_path, 2, **{"eval/failed": 0.0, "eval/x/pass@1": "high"})
    assert best(tmp_path) == 1
    (tmp_path / "metrics.jsonl").write_bytes(b"\x00\xff\n" * 3)
    assert best(tmp_path) == 4


def test_all_comes_back(tmp_path: Path) -> None:
    assert restored(tmp_path)[0] is None
    saved(tmp_path, 3)
    found, lines = restored(tmp_path)
    assert found is not None and not lines and equal(found.state, state_at(3))
    assert found.data_position == {"at": 3} and found.metrics_lines == 3
    assert found.history == {"step_entropies": [[1.0]]}


def test_a_checkpoint_from_before_there_was_a_history_has_an_empty_one(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "checkpoints" / "1" / "notes" / "metadata"
    notes = json.loads(file.read_text())
    del notes["history"], notes["digest"]
    file.write_text(json.dumps({**notes, "digest": digest(notes)}))
    found, lines = restored(tmp_path)
    assert found is not None and found.history == {} and not lines


def test_another_mesh_gets_the_same_values(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])

    def spread(leaf):
        spec = PartitionSpec("fsdp", "tensor") if leaf.ndim == 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    like = jax.tree.map(spread, state_at(0))
    sharding = like.params["a"]["kernel"].sharding
    found = opened(tmp_path).restore(like, print)
    assert found is not None and equal(found.state, state_at(1))
    assert found.state.params["a"]["kernel"].sharding == sharding
    assert checksums(found.state) == checksums(state_at(1))


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("two")
    saved(workdir, 2)
    return workdir


OTHER = {"empty": b"", "garbage": bytes(range(128, 256)), "text": b'"words"', "object": b"{}"}


def damage(path: Path, how: str) -> None:
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif how in OTHER:
        path.write_bytes(OTHER[how])
    else:
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 2, min(len(content) // 2 + 3, len(content))):
            content[place] ^= 0x55
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "remove", "truncate", *OTHER])
def test_any_damage_to_the_newest_costs_it_alone(two_saved: Path, tmp_path: Path, how: str) -> None:
    """Whichever file it is: the values are those saved last, or the ones before with a warning."""
    newest = two_saved / "checkpoints" / "2"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    lost = []
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(two_saved, workdir)
        damage(workdir / "checkpoints" / "2" / file, how)
        if how == "text" and file.name == "_CHECKPOINT_METADATA" and len(file.parts) == 1:
            with pytest.raises(UserError, match="checkpoints holds a damaged checkpoint: "):
                restored(workdir)
            continue
        found, lines = restored(workdir)
        assert found is not None
        step = int(found.state.step)
        assert equal(found.state, state_at(step)) and found.data_position == {"at": step}
        if step == 1:
            lost.append(file.parts[0])
            (line,) = lines
            assert "checkpoint 2 is damaged" in line and "\n" not in line
            assert steps_in(workdir) == [1] and (workdir / "set_aside" / "2-1").is_dir()
            again, quiet = restored(workdir)
            assert again is not None and int(again.state.step) == 1 and not quiet
    assert {"state", "notes"} <= set(lost)


def test_if_none_can_be_read_none_is_moved(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    for step in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "notes")
    with pytest.raises(UserError, match="no checkpoint in .* can be read; step 2") as error:
        restored(tmp_path)
    assert "\n" not in str(error.value) and steps_in(tmp_path) == [1, 2]


def test_resume_at_a_step_sets_later_ones_aside(tmp_path: Path) -> None:
    saved(tmp_path, 3, configured(keep=3))
    (tmp_path / "metrics.jsonl").write_text("history\n")
    found, lines = restored(tmp_path, configured(keep=3, resume="2"))
    assert found is not None and int(found.state.step) == 2
    assert steps_in(tmp_path) == [1, 2] and "later than resume" in lines[0]
    assert (tmp_path / "set_aside" / "metrics.jsonl-1").read_text() == "history\n"
    with pytest.raises(ConfigError, match="resume = 7: .* has no such step, but 1, 2"):
        restored(tmp_path, configured(resume="7"))


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    other = dataclasses.replace(Config(), echo=EchoConfig(coef=0.5), steps=7)
    with pytest.raises(ConfigError, match="config.echo.coef = 0.001, not 0.5"):
        restored(tmp_path, other)
    assert restored(tmp_path, dataclasses.replace(Config(), steps=7))[0] is not None


def test_an_error_in_the_background_is_raised(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, inject="disk_full@checkpoint:2")
    save(checkpoints, 1)
    save(checkpoints, 2)
    with pytest.raises(RunStopped, match="No space left on device.*; step 1 stays"):
        save(checkpoints, 3)
    found, lines = restored(tmp_path)
    assert found is not None and equal(found.state, state_at(1)) and not lines
    assert steps_in(tmp_path) == [1]


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RunStopped, match="checkpoints cannot be used"):
        opened(tmp_path)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Five MiB of tmpfs, and checkpoints of two and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        checkpoints = opened(disk)
        with pytest.raises(RunStopped) as error:
            for step in range(1, 9):
                save(checkpoints, step, rows=2**16)
            checkpoints.close()
        assert os.strerror(errno.ENOSPC) in str(error.value) and "\n" not in str(error.value)
        assert "step 1 stays" in str(error.value)
        like = state_at(0, rows=2**16)
        found = opened(disk).restore(like, print)
        assert found is not None and equal(found.state, state_at(1, rows=2**16))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_checksums_see_every_bit_and_no_sharding() -> None:
    """Against the sum written out in NumPy."""
    values = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    words = values.view(np.uint32).ravel().astype(object)
    expected = sum(int(w) * (2 * i + 1) for i, w in enumerate(words)) % 2**32
    (found,) = checksums([jnp.asarray(values)]).values()
    assert found == expected
    for place in range(values.size):
        changed = values.copy().view(np.uint32)
        changed.reshape(-1)[place] ^= np.uint32(1 << (place % 32))
        assert checksums([jnp.asarray(changed.view(np.float32))]) != {"[0]": found}


@pytest.mark.parametrize("content", [b'{"score": 0.5}', *OTHER.values()])
def test_checkpoints_of_versions_that_wrote_a_score_are_read(
    two_saved: Path, tmp_path: Path, content: bytes
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(two_saved, workdir)
    for step in "12":
        score = workdir / "checkpoints" / step / "metrics" / "metrics"
        score.parent.mkdir()
        score.write_bytes(content)
    log(workdir, 1, **{"eval/failed": 0.0, "eval/x/pass@1": 0.9})
    found, lines = restored(workdir)
    assert found is not None and equal(found.state, state_at(2)) and not lines
    assert best(workdir) == 1
    checkpoints = opened(workdir, configured(keep=1))
    save(checkpoints, 3)
    checkpoints.close()
    assert steps_in(workdir) == [1, 3]


def test_a_power_cut_cannot_tear_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file that Python writes is on the disk when its checkpoint gets its final name."""
    on_disk: dict[int, int] = {}  # inode -> bytes
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        on_disk[found.st_ino] = found.st_size

    monkeypatch.setattr(os, "fsync", record)
    saved(tmp_path, 1)
    checkpoint = tmp_path / "checkpoints" / "1"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert {"metadata", "manifest.ocdbt"} <= {path.name for path in files}
    # Orbax adds the time of the commit to this one later; a checkpoint is whole without it.
    late = ("_CHECKPOINT_METADATA", "commit_success.txt")
    for path in (path for path in files if path.name not in late):
        assert on_disk.get(path.stat().st_ino) == path.stat().st_size, path
    assert checkpoint.parent.stat().st_ino in on_disk
