"""The injection switch itself; what runs make of it is in tests/integration/test_faults.py."""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from echorl_jax.config import ConfigError
from echorl_jax.config_file import load_config
from echorl_jax.rewards import GraderPool, grading_failed
from echorl_jax.rewards.grading_process import fate
from echorl_jax.training.faults import FORMS, Faults
from echorl_jax.types import TrainBatch


def test_a_list_is_read(tmp_path: Path) -> None:
    faults = Faults.parse("kill@rollout:3, nan@5,nan@7,reward_hang@0.25,reward_leak@.5", tmp_path)
    assert faults.hits("nan", 5) and faults.hits("nan", 7) and not faults.hits("nan", 6)
    assert faults.hits("kill@rollout", 3) and not faults.hits("kill@update", 3)
    assert faults.rewards == {"hang": 0.25, "leak": 0.5}
    assert Faults.parse("", tmp_path) == Faults(frozenset(), {}, tmp_path / "injected.txt")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_typed(form: str, tmp_path: Path) -> None:
    typed = form.replace("STEP", "2").replace("SHARE", "1")
    assert typed in Faults.parse(typed, tmp_path).at_steps


@pytest.mark.parametrize(
    "text",
    [
        "kill@eating:3",
        "kill:3",
        "nan@0",
        "nan@x",
        "nan@1.5",
        "reward_hang@2",
        "disk_full@2",
        "nan@",
    ],
)
def test_a_wrong_fault_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.debug.inject") as error:
        Faults.parse(f"nan@3,{text}", tmp_path)
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


def test_shares_must_fit_and_need_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than 1"):
        Faults.parse("reward_hang@0.6,reward_crash@0.6", tmp_path)
    with pytest.raises(ConfigError, match="data.grader_workers = 0"):
        load_config("configs/countdown.py", {"debug.inject": "reward_hang@0.1"})


def test_what_ends_the_process_comes_once(tmp_path: Path) -> None:
    for expected in (True, False):
        faults = Faults.parse("disk_full@checkpoint:2,nan@2", tmp_path)
        assert faults.hits("disk_full@checkpoint", 2) is expected and faults.hits("nan", 2)
    assert (tmp_path / "injected.txt").read_text() == "disk_full@checkpoint:2\n"


def test_without_faults_orbax_is_as_it_comes(tmp_path: Path) -> None:
    plain = ocp.path.atomicity.AtomicRenameTemporaryPath
    assert Faults.parse("nan@3", tmp_path).checkpoint_path(plain) is plain
    failing = Faults.parse("kill@save:3", tmp_path).checkpoint_path(plain)
    assert failing is not plain and issubclass(failing, plain)


def test_one_row_is_spoiled(tmp_path: Path) -> None:
    weights = np.zeros((3, 4), np.float32)
    weights[1:] = 0.5
    row = np.zeros(3, np.float32)
    fields = dict.fromkeys(
        ["tokens", "prompt_length", "length", "loss_mask", "old_logprobs", "rollout_logprobs"], row
    )
    batch = TrainBatch(
        **fields, echo_weights=row, on_policy=row, token_weights=weights, advantages=row
    )
    faults = Faults.parse("nan@3", tmp_path)
    assert faults.spoil([batch], 2) == [batch]
    spoiled = faults.spoil([batch], 3)[0]
    assert np.flatnonzero(np.isnan(spoiled.advantages)).tolist() == [1]
    assert np.argwhere(np.isnan(spoiled.token_weights)).tolist() == [[1, 0]]
    assert np.isfinite(batch.token_weights).all()


def test_a_share_of_the_items_goes_wrong_and_nothing_else() -> None:
    rows = [{"reward_model": {"ground_truth": {"numbers": [2, 3], "target": 6}}}] * 60
    responses = [f"2*3={6 + number % 2}{' ' * number}" for number in range(60)]
    shares = {"hang": 0.1, "crash": 0.2, "leak": 0.1}
    with GraderPool("countdown", workers=0) as pool:
        right = pool.grade(responses, rows)
    with GraderPool("countdown", workers=2, timeout_s=1.0, memory_mb=300, faults=shares) as pool:
        verdicts = pool.grade(responses, rows)
    reasons = {"hang": "no verdict within", "crash": "process died", "leak": "MemoryError"}
    seen = dict.fromkeys(shares, 0)
    for verdict, truth, response, row in zip(verdicts, right, responses, rows, strict=True):
        place, due = fate(response, row), None
        for kind, bound in (("hang", 0.1), ("crash", 0.3), ("leak", 0.4)):
            due = due or (kind if place < bound else None)
        if due is None:
            assert verdict == truth
        else:
            seen[due] += 1
            assert (
                reasons[due] in verdict.reason
                and verdict.score == 0
                and grading_failed(verdict.reason)
            )
    assert all(seen.values()) and sum(seen.values()) < 40
