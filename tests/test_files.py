"""Files are replaced as a whole, torn ends are left out, and a directory has one writer."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from echorl_jax import files
from echorl_jax.errors import RunStopped, UserError
from echorl_jax.files import sole_writer

HOLD = """
import sys
from pathlib import Path
from echorl_jax.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(file) as fresh:
        fresh.write("half of the n")
        fresh.flush()
        raise ZeroDivisionError
    assert file.read_text() == "old"
    files.replace_text(file, "new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["scores.json"]


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / "secret.partial").write_text("of an earlier start, with other permissions")
    files.replace_text(tmp_path / "secret", "hidden", mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_torn_and_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(
        b'{"step": 1}\n{"step": 2\n{"eval": 3}\n{"st\xffep": 4}\n[5]\n\n{"step": 6}\n{"st'
    )
    broken: list[int] = []
    assert list(files.read_jsonl(file, broken)) == [{"step": 1}, {"eval": 3}, {"step": 6}]
    assert broken == [2, 4, 5, 8]
    assert [line["step"] for line in files.read_steps(file)] == [1, 6]
    assert files.cut_torn_line(file) == 7 and file.read_bytes().endswith(b'{"step": 6}\n')
    assert list(files.read_steps(tmp_path / "none.jsonl")) == []


def test_a_directory_has_one_writer_until_it_dies(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], **pipes) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        message = f"{tmp_path}: process {other.pid} on {platform.node()} is writing there$"
        with pytest.raises(UserError, match=message), sole_writer(tmp_path):
            pass
        other.kill()
        other.wait()
        with sole_writer(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with sole_writer(tmp_path):
        pass


def test_another_machine_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "FREED_WITHIN_S", 0.5)
    # A new machine may have the name of a lost one.
    holder = f"process 7 on {platform.node()}"
    with sole_writer(tmp_path / "new"):
        (tmp_path / "new" / ".lock").write_text(f"{holder}\nanother boot\n")
        with pytest.raises(RunStopped, match=f"{holder} is writing there; if .* remove .*lock$"):
            with sole_writer(tmp_path / "new"):
                pass
    assert f"waiting for {holder}, which holds it" in capsys.readouterr().err
    with sole_writer(tmp_path / "new"):
        pass


def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_writer(tmp_path), sole_writer(tmp_path):
        pass
