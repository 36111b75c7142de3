"""Who may write into a directory, and when the lock of a process that died is free."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from echorl_jax import locks
from echorl_jax.errors import RunStopped, UserError
from echorl_jax.locks import sole_writer

HOLD = """
import sys
from pathlib import Path
from echorl_jax.locks import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


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
    monkeypatch.setattr(locks, "FREED_WITHIN_S", 0.5)
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
