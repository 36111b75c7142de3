"""The grading pool: order, guards, recovery."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hostile_graders import obey

from echorl_jax.config import ConfigError
from echorl_jax.rewards import GraderPool, PoolError, judge
from echorl_jax.rewards import pool as pool_module


@pytest.fixture(scope="module")
def obedient():
    with GraderPool("hostile_graders:obey", workers=2, timeout_s=1.0, memory_mb=100) as made:
        yield made


def test_verdicts_come_in_order(obedient):
    responses = [f"response {n}" for n in range(300)]
    verdicts = obedient.grade(responses, [{"number": n} for n in range(300)])
    assert [v.reason for v in verdicts] == [f"response {n} {n}" for n in range(300)]


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("hang", "no verdict within 1 s"),
        ("hang in C", "no verdict within 1 s"),
        ("sleep", "no verdict within 1 s"),
        ("leave a child", "no verdict within 1 s"),
        ("die", "the grading process died"),
        ("segfault", "the grading process died"),
        ("allocate", "the grader raised MemoryError"),
        ("leak", "the grader raised MemoryError"),
        ("recurse", "the grader raised RecursionError"),
        ("exit", "the grader raised SystemExit"),
        ("raise", "the grader raised ValueError: no such luckluck"),
        ("nan", "the grader raised ValueError"),
    ],
)
def test_a_bad_item_costs_only_itself(obedient, response, reason):
    verdicts = obedient.grade(["first", response, "\x00\ud800", "last"], [{}] * 4)
    assert [v.score for v in verdicts] == [0.5, 0.0, 0.5, 0.5]
    assert verdicts[1].reason.startswith(reason) and not verdicts[1].correct


def test_metrics_come_through_the_process(obedient):
    (verdict,) = obedient.grade(["metrics"], [{}])
    assert verdict == judge(obey, "metrics", {}) and len(verdict.metrics) == 17
    assert verdict.metrics["00".ljust(40, "x")] == -(0.1**300) / 3
    assert verdict.metrics["dropped_metrics"] == 4


def test_a_group_is_one_item_of_its_process():
    """Groups of three; the last group's function call fails for want of its column."""
    rows = [{"number": n // 3} for n in range(6)] + [{}] * 3
    rows = [{"prompt": [], "reward_model": {"ground_truth": ""}, **row} for row in rows]
    tokens = [[0] * n for n in (3, 2, 4, 1, 2, 3, 1, 1, 1)]
    with GraderPool("hostile_graders:trl_shortest", workers=2) as pool:
        assert pool.grouped
        verdicts = pool.submit(["x"] * 9, rows, tokens, group_size=3).result()
    assert [v.correct for v in verdicts] == [n in (1, 3) for n in range(9)]
    assert [v.reason.startswith("the grader raised TypeError") for v in verdicts[5:]] == [
        False,
        *[True] * 3,
    ]


def test_many_bad_items_in_a_row(obedient):
    responses = ["die", "hang", "segfault", "die", "die", "die", "die", "die", "fine"]
    verdicts = obedient.grade(responses, [{}] * len(responses))
    assert [v.correct for v in verdicts] == [False] * 8 + [True]


def test_a_process_that_dies_between_rounds_is_replaced(obedient):
    (verdict,) = obedient.grade(["pid"], [{}])
    os.kill(int(verdict.reason), 9)
    time.sleep(0.1)
    assert all(v.correct for v in obedient.grade(["fine"] * 4, [{}] * 4))


def test_long_responses_and_rows_reach_the_process(obedient):
    (verdict,) = obedient.grade(["x" * 2_000_000], [{"number": 1, "text": "y" * 2_000_000}])
    assert verdict.correct


def test_grading_processes_do_not_import_jax(obedient):
    (verdict,) = obedient.grade(["modules"], [{}])
    assert verdict.reason == "False"


def test_a_hanging_item_does_not_delay_others(obedient):
    """One of two processes hangs; what is handed in later goes through the other."""
    slow = obedient.submit(["sleep", "fine"], [{}] * 2)
    later = [obedient.submit([f"later {n}"], [{"number": n}]) for n in range(20)]
    assert [job.result()[0].reason for job in later] == [f"later {n} {n}" for n in range(20)]
    assert not slow.done()
    assert [verdict.correct for verdict in slow.result()] == [False, True]


def test_waiting_in_the_queue_costs_no_time():
    """Each takes 0.3 s of a limit of 1 s; the last one's turn comes after 1.5 s."""
    with GraderPool("hostile_graders:slow", workers=1, timeout_s=1.0) as pool:
        jobs = [pool.submit([f"{n}"], [{}]) for n in range(6)]
        assert [job.result()[0].reason for job in jobs] == [f"{n}" for n in range(6)]


def test_an_empty_list_has_no_verdicts(obedient):
    assert obedient.grade([], []) == []
    with pytest.raises(ValueError, match="1 responses for 0 rows"):
        obedient.grade(["one"], [])


def test_processes_are_recycled(monkeypatch):
    monkeypatch.setattr(pool_module, "MAX_ITEMS", 3)
    with GraderPool("hostile_graders:obey", workers=1) as recycling:
        verdicts = recycling.grade(["pid"] * 8, [{}] * 8)
    pids = [v.reason for v in verdicts]
    assert [len(set(pids[a:b])) for a, b in [(0, 3), (3, 6), (6, 8), (0, 8)]] == [1, 1, 1, 3]


@pytest.fixture
def interruptible():
    # A shell starts commands in the background with SIGINT ignored, and Python keeps that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_caller_leaves_no_stale_verdicts(obedient):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        obedient.grade(["sleep"] * 50, [{}] * 50)
    verdicts = obedient.grade(["fresh"] * 4, [{"number": n} for n in range(4)])
    assert [v.reason for v in verdicts] == [f"fresh {n}" for n in range(4)]


def test_closing_ends_what_is_under_way():
    pool = GraderPool("hostile_graders:obey", workers=1, timeout_s=100.0)
    waiting = pool.submit(["sleep", "fine"], [{}] * 2)
    pool.close()
    with pytest.raises(PoolError, match="closed"):
        waiting.result()


def test_a_grader_without_bounds_never_runs_in_this_process():
    with GraderPool("hostile_graders:obey", workers=0, timeout_s=1.0) as guarded:
        verdicts = guarded.grade(["pid", "hang", "raise", "die", "fine"], [{}] * 5)
    assert verdicts[0].reason != str(os.getpid())
    assert [v.correct for v in verdicts] == [True, False, False, False, True]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bounded_graders_need_no_process():
    row = {"reward_model": {"ground_truth": "B"}}
    before = children(os.getpid())
    with GraderPool("choice", workers=0) as here:
        assert here.grade(["B", "A or B"], [row] * 2)[0].correct
        assert children(os.getpid()) == before


def test_any_number_of_idle_processes_may_be_killed_at_once():
    with GraderPool("hostile_graders:obey", workers=4, timeout_s=10.0) as pool:
        for _ in range(2):
            pids = {verdict.reason for verdict in pool.grade(["slow pid"] * 8, [{}] * 8)}
            assert len(pids) == 4
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
            assert all(verdict.correct for verdict in pool.grade(["fine"] * 8, [{}] * 8))


def test_a_frozen_process_and_a_large_item_cost_that_item_alone():
    """The item is larger than the socket's buffer, so that sending it has to stop half-way."""
    with GraderPool("hostile_graders:obey", workers=2, timeout_s=2.0) as pool:
        pids = {verdict.reason for verdict in pool.grade(["slow pid"] * 4, [{}] * 4)}
        os.kill(int(min(pids)), signal.SIGSTOP)
        large = pool.submit(["x" * 5_000_000] * 2, [{}] * 2)
        assert pool.submit(["fine"] * 20, [{}] * 20).result(timeout=60)[0].correct
        verdicts = large.result(timeout=60)
    assert sorted(verdict.correct for verdict in verdicts) == [False, True]
    assert any(verdict.reason == "no verdict within 2 s" for verdict in verdicts)


OWNER = """
import os, sys, threading
from echorl_jax.rewards import GraderPool
pool = GraderPool("hostile_graders:obey", workers=1, timeout_s=1000.0)
print(pool.grade(["pid"], [{}])[0].reason, flush=True)
pool.submit([sys.argv[1]], [{}])
threading.Event().wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
@pytest.mark.parametrize("does", ["hang", "hang in C", "sleep", "leave a child"])
def test_grading_processes_die_with_a_killed_owner(does):
    path = {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, "-c", OWNER, does]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | path)
    assert owner.stdout is not None
    grader = int(owner.stdout.readline())
    time.sleep(1.0)  # until it does what it should
    group = [grader, *children(grader)]
    assert len(group) == 1 + (does == "leave a child")
    owner.kill()
    owner.communicate()
    end = time.monotonic() + 5
    while any(alive(process) for process in group) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(process) for process in group)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for each in lists for child in each.read_text().split())


def test_an_unknown_grader_is_an_error_at_the_start():
    with pytest.raises(ConfigError, match="did you mean countdown"):
        GraderPool("contdown", workers=2)


def test_a_process_that_cannot_start_is_an_error_not_a_verdict(tmp_path, monkeypatch):
    # Importable here, but not in a process of its own.
    module = tmp_path / "only_here.py"
    module.write_text("def grade(response, row):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with GraderPool("only_here:grade", workers=0):
        pass
    module.write_text("raise ImportError('gone')\n")
    with GraderPool("only_here:grade", workers=1) as broken:
        with pytest.raises(PoolError, match="cannot start: grader .only_here:grade.: .*gone"):
            broken.grade(["x"], [{}])


def test_processes_that_die_at_the_start_are_an_error_not_a_loop(tmp_path, monkeypatch):
    module = tmp_path / "deadly.py"
    module.write_text("def grade(response, row):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with GraderPool("deadly:grade", workers=0):
        pass
    module.write_text("import os\nos._exit(7)\n")
    with GraderPool("deadly:grade", workers=1) as broken:
        with pytest.raises(PoolError, match="do not start"):
            broken.grade(["x"], [{}])


def test_a_closed_pool_refuses_work():
    closed = GraderPool("countdown", workers=1)
    closed.close()
    closed.close()
    with pytest.raises(PoolError, match="closed"):
        closed.grade(["1"], [{}])


def test_a_script_without_main_guard_or_close_ends_by_itself(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from echorl_jax.rewards import GraderPool\n"
        "print('run')\n"
        "pool = GraderPool('countdown', workers=2)\n"
        "row = {'reward_model': {'ground_truth': {'numbers': [2, 3], 'target': 6}}}\n"
        "print(pool.grade(['2*3=6'], [row])[0].correct)\n"
    )
    run = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert (run.stdout, run.stderr, run.returncode) == ("run\nTrue\n", "", 0)


def test_workers_of_a_killed_pool_end_without_output():
    """With a verdict on its way that nobody reads, the socket is reset instead of closed."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "echorl_jax.rewards.grading_process", str(theirs.fileno())]
    worker = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    theirs.close()
    with Connection(ours.detach()) as connection:
        connection.send((sys.path, "hostile_graders:obey", {}, 100, ""))
        assert connection.poll(60)  # it is ready, which stays unread
    assert worker.communicate(timeout=60)[1] == b""
    assert worker.returncode == 0
