"""Real processes that meet, agree, and end together; the children do no more than a test needs."""

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.several import LIMITS, Run, gone, number_in

# Writes its number into the file that it is given, then waits.
WAIT = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
# The training process's part: follows its supervisor, then does as told.
WORKER = "from echorl_jax.cluster import assignment, follow_supervisor, tell; given = assignment();"


def test_all_know_their_place_and_end_well(run: Callable[..., Run], tmp_path: Path) -> None:
    trio = run(processes=3)
    write = (
        WORKER + "import sys; print(given.processes, given.process, given.coordinator,"
        " file=open(sys.argv[1], 'w'))"
    )
    for process in (2, 0, 1):
        trio.start(process, write, str(tmp_path / str(process)), facts={"seed": 1})
    assert trio.ends() == [(0, "")] * 3
    said = [(tmp_path / str(process)).read_text().split() for process in range(3)]
    assert [words[:2] for words in said] == [["3", "0"], ["3", "1"], ["3", "2"]]
    assert len({words[2] for words in said}) == 1 and said[0][2].startswith("127.0.0.1:")


def test_a_disagreement_ends_all_before_anything_starts(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    pair = run()
    for process, seed in ((0, 0), (1, 7)):
        facts = {"echorl-jax version": "1", "config.seed": seed}
        pair.start(process, WAIT, str(tmp_path / str(process)), facts=facts)
    host = socket.gethostname()
    line = f"process 1 of 2 on {host} has config.seed = 7, but process 0 of 2 on {host} has 0"
    assert all(code == 2 and said.startswith(line) for code, said in pair.ends())
    assert not list(tmp_path.iterdir())


def test_an_absent_process_is_named(run: Callable[..., Run]) -> None:
    trio = run(processes=3)
    limits = {**LIMITS, "start_timeout_s": 1.5}
    for process in (0, 2):
        trio.start(process, "pass", limits=limits)
    for code, said in trio.ends():
        assert code == 1 and "process 1 of 3 did not come within 1.5 s" in said, said
        assert "here: 0 on " in said and "2 on " in said


def test_without_process_0_the_others_say_so(run: Callable[..., Run]) -> None:
    pair = run()
    pair.start(1, "pass", limits={**LIMITS, "start_timeout_s": 1.0})
    ((code, said),) = pair.ends()
    assert code == 1
    assert f"found no process 0 at 127.0.0.1:{pair.port} within 1 s" in said


def test_two_that_claim_one_place(run: Callable[..., Run]) -> None:
    trio = run(processes=3)
    for process in (0, 1, 1):
        trio.start(process, "pass")
    for code, said in trio.ends():
        assert code == 2 and "process 1 on" in said and "is already there on" in said, said


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_training_process_ends_all(
    run: Callable[..., Run], tmp_path: Path, victim: int
) -> None:
    pair = run()
    for process in (0, 1):
        pair.start(process, WAIT, str(tmp_path / str(process)))
    numbers = [number_in(tmp_path / str(process)) for process in (0, 1)]
    os.kill(numbers[victim], signal.SIGKILL)
    for code, said in pair.ends(within_s=8):
        assert code == 1
        assert said.startswith(f"process {victim} of 2 on ") and said.endswith("SIGKILL"), said
    assert gone(numbers[1 - victim])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_supervisor_takes_all_along(
    run: Callable[..., Run], tmp_path: Path, victim: int
) -> None:
    pair = run()
    wait = WORKER + "follow_supervisor(given);" + WAIT
    for process in (0, 1):
        pair.start(process, wait, str(tmp_path / str(process)))
    numbers = [number_in(tmp_path / str(process)) for process in (0, 1)]
    pair.started[victim].kill()
    code, said = pair.ends(within_s=8)[1 - victim]
    assert code == 1 and said.startswith(f"process {victim} of 2") and said.endswith("is gone")
    assert gone(numbers[0]) and gone(numbers[1])


def test_a_frozen_process_is_lost_after_a_while(run: Callable[..., Run], tmp_path: Path) -> None:
    """A stopped process is like a host without network: connections stay open and silent."""
    pair = run()
    for process in (0, 1):
        pair.start(process, WAIT, str(tmp_path / str(process)))
    number = number_in(tmp_path / "1")
    number_in(tmp_path / "0")
    pair.started[1].send_signal(signal.SIGSTOP)
    _, said = pair.started[0].communicate(timeout=15)
    assert pair.started[0].returncode == 1
    assert "process 1 of 2" in said and "has been silent for 3 s" in said
    os.kill(number, signal.SIGKILL)


def fails(line: str, *, certain: bool, code: int) -> str:
    return WORKER + f"tell({line!r}, certain={certain}); import os; os._exit({code})"


def test_last_words_reach_everybody(run: Callable[..., Run], tmp_path: Path) -> None:
    pair = run()
    pair.start(0, WAIT, str(tmp_path / "0"))
    pair.start(1, fails("row 3 of train.parquet: no prompt", certain=True, code=2))
    for code, said in pair.ends(within_s=8):
        assert code == 2 and said.endswith(": row 3 of train.parquet: no prompt")


def test_a_consequence_waits_for_its_cause(run: Callable[..., Run]) -> None:
    """Process 0 fails first, talking to process 1; a second later it turns out why."""
    pair = run()
    pair.start(0, fails("JaxRuntimeError: connection closed", certain=False, code=1))
    pair.start(1, "import time; time.sleep(1);" + fails("disk full", certain=True, code=1))
    for code, said in pair.ends(within_s=8):
        assert code == 1 and said.startswith("process 1 of 2") and said.endswith("disk full")


def test_a_failure_without_another_cause_is_told(run: Callable[..., Run], tmp_path: Path) -> None:
    pair = run()
    pair.start(0, WAIT, str(tmp_path / "0"))
    pair.start(1, "raise SystemExit(9)")
    for code, said in pair.ends(within_s=12):
        assert code == 1
        assert said.endswith("its training process ended with exit code 9")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_training_process_once(
    run: Callable[..., Run], tmp_path: Path, number: signal.Signals
) -> None:
    pair = run()
    count = (
        "import os, signal, sys, time; seen = [];"
        f"signal.signal({int(number)}, lambda *_: seen.append(1));"
        "open(sys.argv[1], 'w').write(str(os.getpid()));"
        "\nwhile not seen: time.sleep(0.02)"
        "\ntime.sleep(0.3); sys.exit(0 if len(seen) == 1 else 5)"
    )
    for process in (0, 1):
        pair.start(process, count, str(tmp_path / str(process)))
    for process in (0, 1):
        number_in(tmp_path / str(process))
        pair.started[process].send_signal(number)
    assert [code for code, _ in pair.ends()] == [0, 0]


def test_who_comes_late_is_sent_away(run: Callable[..., Run], tmp_path: Path) -> None:
    pair = run()
    wait = (
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()))"
        "\nwhile not os.path.exists(sys.argv[2]): time.sleep(0.02)"
    )
    for process in (0, 1):
        pair.start(process, wait, str(tmp_path / str(process)), str(tmp_path / "go"))
    for process in (0, 1):
        number_in(tmp_path / str(process))
    late = pair.start(1, "pass")
    assert late.wait(timeout=30) == 2
    (tmp_path / "go").touch()
    *good, (_, said) = pair.ends()
    assert good == [(0, "")] * 2
    assert said == "all processes of this run have come already"


def test_strangers_before_and_during_a_run_do_no_harm(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    pair = run()
    sent: Sequence[bytes] = (b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b"{}\n", b"\xff" * 100 + b"\n")
    sent = (*sent, b'{"process": 1}\n', b"")

    def knock() -> None:
        for data in sent:
            with socket.create_connection(("127.0.0.1", pair.port)) as stranger:
                stranger.sendall(data)

    wait = (
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()))"
        "\nwhile not os.path.exists(sys.argv[2]): time.sleep(0.02)"
    )
    pair.start(0, wait, str(tmp_path / "0"), str(tmp_path / "go"))
    deadline = time.monotonic() + 20
    while True:
        try:
            knock()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    pair.start(1, wait, str(tmp_path / "1"), str(tmp_path / "go"))
    for process in (0, 1):
        number_in(tmp_path / str(process))
    knock()
    time.sleep(0.5)
    (tmp_path / "go").touch()
    assert pair.ends() == [(0, "")] * 2


def test_a_process_with_another_secret_does_not_join(run: Callable[..., Run]) -> None:
    pair = run()
    limits = {**LIMITS, "start_timeout_s": 2.0}
    pair.start(0, "pass", limits=limits)
    pair.start(1, "pass", limits=limits, environment={"ECHORL_SECRET": "another"})
    (first, missing), (second, refused) = pair.ends()
    assert (first, second) == (1, 1) and "process 1 of 2 did not come within 2 s" in missing
    assert "process 1 of 2 was refused" in refused or "found no process 0" in refused, refused


def test_the_secret_may_be_a_file_of_the_directory_in_common(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    """A process with a secret from another place is refused at once; the rest is one run."""
    pair, file = run(), {"ECHORL_SECRET": "", "ECHORL_TEST_DIRECTORY": str(tmp_path / "run")}
    pair.start(0, "pass", environment=file)
    other = pair.start(1, "pass")
    _, said = other.communicate(timeout=30)
    assert other.returncode == 2
    assert f"has its secret from ECHORL_SECRET, but process 0 from {tmp_path}/run/.secret" in said
    assert (tmp_path / "run" / ".secret").stat().st_mode & 0o777 == 0o600
    pair.start(1, "pass", environment=file)
    pair.started.remove(other)
    assert pair.ends() == [(0, "")] * 2


def test_what_a_process_says_stays_one_line(run: Callable[..., Run], tmp_path: Path) -> None:
    pair = run()
    pair.start(0, WAIT, str(tmp_path / "0"))
    pair.start(1, fails("two\nlines \x1b[31mred\r" + "x" * 5000, certain=True, code=1))
    for process in pair.started:
        _, said = process.communicate(timeout=30)
        assert ": two lines [31mred xxx" in said and said.count("\n") == 1 and len(said) < 1100


def test_a_frozen_training_process_is_named(run: Callable[..., Run], tmp_path: Path) -> None:
    """The healthy one waits for it and fails first; the cause is told all the same."""
    pair, work = run(), WORKER + "follow_supervisor(given);"
    pair.start(0, work + "import time; time.sleep(4);" + fails("lost", certain=False, code=1))
    pair.start(1, work + WAIT, str(tmp_path / "1"))
    number = number_in(tmp_path / "1")
    os.kill(number, signal.SIGSTOP)
    for code, said in pair.ends(within_s=30):
        assert code == 1 and said.startswith("process 1 of 2"), said
        assert "its training process is frozen: no sign of life for 3 s" in said
    assert gone(number)
