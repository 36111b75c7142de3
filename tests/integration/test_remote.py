"""Runs, evaluations and rows on buckets, against an emulator of S3 (moto) and of GCS."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from echorl_jax.config_file import to_dict
from echorl_jax.data import load_rows
from echorl_jax.errors import RunStopped, UserError
from echorl_jax.files import read_steps, replace_json
from echorl_jax.remote import mirrored
from tests.integration.conftest import small_config

ROWS = [{"problem": f"{n} + 1 = ?", "answer": str(n + 1)} for n in range(6)]


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The settings of an S3 emulator with the bucket ``bucket``."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    thread = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    thread.start()
    host, port = thread.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem(use_listings_cache=False).mkdir("bucket")
        yield settings
    thread.stop()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHORL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def echorl(cache: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command with a cache that is its alone, as on another machine."""
    settings = {"ECHORL_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "echorl_jax", *arguments]
    ran = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == code, ran.stderr
    return ran


def bucket_files(url: str) -> dict[str, bytes]:
    import s3fs

    fs, root = s3fs.S3FileSystem(use_listings_cache=False), url.removeprefix("s3://")
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def steady(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without times, memory and counts of compilations."""
    varying = ("time/", "memory/", "compile/")
    return [
        {k: v for k, v in line.items() if not k.startswith(varying) and "per_second" not in k}
        for line in lines
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_run_on_s3_is_killed_and_goes_on_elsewhere_bit_for_bit(
    s3: dict[str, str], tmp_path: Path
) -> None:
    saved = {"checkpoint": {"every": 1, "keep": 1, "keep_best": 0, "export": True}}
    config = tmp_path / "config.json"
    replace_json(config, to_dict(small_config(steps=3, **saved)))
    killed = "--config.debug.inject=kill@rollout:3"
    given = ("train", f"--config={config}")
    echorl(tmp_path / "a", *given, f"--workdir={tmp_path / 'whole'}")
    ran = echorl(tmp_path / "b", *given, "--workdir=s3://bucket/run", killed, code=-signal.SIGKILL)
    # Checkpoint 1 is there as a whole: the save of step 2 waits for it.
    left = json.loads(bucket_files("s3://bucket/run")["manifest.json"])["files"]
    assert {name.split("/")[1] for name in left if name.startswith("checkpoints/")} & {"1", "2"}
    # Another machine: nothing of the first one's local files is there.
    ran = echorl(tmp_path / "c", *given, "--workdir=s3://bucket/run")
    assert "model:   s3://bucket/run/export" in ran.stdout
    files = bucket_files("s3://bucket/run")
    whole = tmp_path / "whole"
    weights = "export/model.safetensors"
    assert files[weights] == (whole / weights).read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(files["metrics.jsonl"])
    resumed = list(read_steps(tmp_path / "metrics.jsonl"))
    assert steady(resumed) == steady(list(read_steps(whole / "metrics.jsonl")))
    assert files["samples/ledger.jsonl"] == (whole / "samples" / "ledger.jsonl").read_bytes()
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {"3"}
    assert b"<html" in files["report.html"]
    assert not any((tmp_path / "c" / "mirrors").glob("*/run"))
    told = echorl(tmp_path / "d", "report", "--workdir=s3://bucket/run")
    assert told.stdout == "report: s3://bucket/run/report.html\n"


@pytest.mark.filterwarnings("default")
def test_a_folder_of_two_writers_stops_the_first(
    s3: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "^s3://bucket/shared: another run has written there"
    with pytest.raises(RunStopped, match=told), mirrored("s3://bucket/shared") as first:
        (first.directory / "a.txt").write_text("1")
        first.upload()
        monkeypatch.setenv("ECHORL_CACHE", str(cache / "of another machine"))
        with mirrored("s3://bucket/shared") as second:
            assert (second.directory / "a.txt").read_text() == "1"
            (second.directory / "a.txt").write_text("2")
        (first.directory / "a.txt").write_text("3!")
    assert bucket_files("s3://bucket/shared")["a.txt"] == b"2"


@pytest.mark.filterwarnings("default")
def test_an_upload_that_is_cut_off_leaves_the_state_before(s3: dict[str, str], cache: Path) -> None:
    with mirrored("s3://bucket/cut") as mirror:
        for step in (1, 2):
            (mirror.directory / str(step)).mkdir()
            (mirror.directory / str(step) / "state").write_text("whole")
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    fs.pipe_file("bucket/cut/3/state", b"half of a checkpoint")  # without a manifest that lists it
    with mirrored("s3://bucket/cut") as mirror:
        assert sorted(path.name for path in mirror.directory.iterdir()) == ["1", "2"]
        (mirror.directory / "1" / "state").unlink()
    assert set(bucket_files("s3://bucket/cut")) == {"2/state", "3/state", "manifest.json"}


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An emulator of GCS with the bucket ``bucket``."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    # Else gcsfs asks a service for the kind of the bucket that the emulator does not have.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    emulator.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    yield
    emulator.stop()


@pytest.mark.filterwarnings("default")
def test_a_folder_on_gcs_is_mirrored(gs: None, cache: Path) -> None:
    for number in range(2):
        with mirrored("gs://bucket/run") as mirror:
            assert [path.name for path in mirror.directory.iterdir()] == ["old"] * number
            (mirror.directory / "old").unlink(missing_ok=True)
            (mirror.directory / ("new" if number else "old")).write_text(str(number))
    fs = fsspec.filesystem("gs")
    assert {path: fs.cat_file(path) for path in fs.find("bucket") if "json" not in path} == {
        "bucket/run/new": b"1"
    }


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_rows_are_read_from_buckets(kind: str, cache: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kind)
    fs = fsspec.filesystem(kind, use_listings_cache=False)
    texts = ["".join(json.dumps(row) + "\n" for row in part) for part in (ROWS[:4], ROWS[4:])]
    fs.pipe_file("bucket/rows/a.jsonl", texts[0].encode())
    fs.pipe_file("bucket/rows/b.jsonl.gz", gzip.compress(texts[1].encode()))
    fs.pipe_file("bucket/rows/notes.md", b"not rows")
    url = f"{kind}://bucket/rows"
    counts = {"": 6, "/a.jsonl": 4, "/*.gz": 2, "/a.jsonl?limit=3": 3}
    assert {place: len(load_rows(f"{url}{place}")) for place in counts} == counts
    rows = load_rows(url)
    assert [row["reward_model"]["ground_truth"] for row in rows] == list("123456")
    assert {row["data_source"] for row in rows} == {"rows"}
    fs.pipe_file("bucket/rows/a.jsonl", texts[1].encode())  # another file of the same name
    assert len(load_rows(f"{url}/a.jsonl")) == 2
    fs.pipe_file("bucket/rows/a.jsonl", b"{}\n")
    with pytest.raises(UserError, match=f"^{url}/a.jsonl, line 1"):
        load_rows(f"{url}/a.jsonl")
    with pytest.raises(UserError, match=f"^{url}/none.jsonl: no such file"):
        load_rows(f"{url}/none.jsonl")


@pytest.mark.filterwarnings("default")
def test_an_evaluation_is_written_to_a_bucket_and_not_made_twice(
    s3: dict[str, str], cache: Path, tmp_path: Path
) -> None:
    given = ("evaluate", "--model=builtin:countdown", "--data=countdown:split=eval&count=4")
    options = ("--max_new_tokens=8", "--out=s3://bucket/eval")
    assert "4 attempts, " in echorl(cache, *given, *options).stderr
    files = bucket_files("s3://bucket/eval")
    assert files["generations.jsonl"].count(b"\n") == 4 and "scores.json" in files
    again = echorl(tmp_path / "another", *given, *options)
    assert again.stderr == "" and "countdown" in again.stdout  # nothing was sampled
    assert bucket_files("s3://bucket/eval")["generations.jsonl"] == files["generations.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("report", "--workdir=nowhere://bucket/run"), "nowhere://bucket/run: "),
        (("report", "--workdir=runs", "--out=s3://bucket/a.html"), "--out=s3://bucket/a.html: "),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], expected: str, cache: Path) -> None:
    told = echorl(cache, *arguments, code=2).stderr
    assert told.startswith(f"echorl: {expected}") and len(told.splitlines()) == 1


def test_several_processes_are_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"COORDINATOR": "localhost:1", "PROCESSES": "2", "PROCESS_ID": "0"}.items():
        monkeypatch.setenv(f"ECHORL_{name}", value)
    config = tmp_path / "config.json"
    replace_json(config, to_dict(small_config()))
    given = ("train", f"--config={config}", "--workdir=s3://bucket/many")
    told = echorl(cache, *given, code=2).stderr
    assert told.startswith("echorl: s3://bucket/many: several processes write into one folder")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="^s3://a/b.jsonl needs a package: pip install 's3fs'$"):
        load_rows("s3://a/b.jsonl")


@pytest.mark.parametrize("name", ["../stolen.txt", "/stolen.txt", "a/../../stolen.txt"])
def test_a_manifest_cannot_name_files_outside_the_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ECHORL_CACHE", str(tmp_path / "cache"))
    bucket = fsspec.filesystem("memory")
    manifest = {"writer": "other", "files": {name: 3}}
    bucket.pipe_file("/run/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(UserError, match="lies outside the folder"), mirrored("memory://run"):
        pass
    assert not list(tmp_path.rglob("stolen.txt"))


def test_an_address_without_a_name_clears_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHORL_CACHE", str(tmp_path))
    kept = tmp_path / "mirrors" / "kept"
    kept.mkdir(parents=True)
    with pytest.raises(UserError, match="is no name of a folder"), mirrored("memory://runs/.."):
        pass
    assert kept.is_dir()
