"""``echorl analyze``: runs the studies that its options allow, and puts them into the report."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echorl_jax.data import load_rows
from echorl_jax.errors import UserError
from echorl_jax.evaluation.evaluate import MOST_SAMPLES
from echorl_jax.rewards import GraderPool
from echorl_jax.tools.report import golden_entropy, step_deletion
from echorl_jax.tools.report.golden_entropy import entropy_profiles, profile_rows
from echorl_jax.tools.report.page import write_report
from echorl_jax.tools.report.policy import Policy
from echorl_jax.tools.report.runs import read_run, write_jsonl
from echorl_jax.tools.report.step_deletion import deletion_curve, deletion_rows
from echorl_jax.tools.report.studies import DELETION, FOLDER, TRAJECTORIES, write_studies

STUDIES = ("run", "entropy", "deletion")


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What to study; the fields are the command's options."""

    workdir: Path
    studies: tuple[str, ...] = ()  # those that the options allow unless given
    compare: tuple[Path, ...] = ()
    model: str | None = None
    data: str | None = None
    rollouts: Path | None = None
    limit: int = 0
    solutions: step_deletion.Solver = "policy"
    deletions: tuple[int, ...] = (0, 1, 2)
    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 1024
    max_prompt_tokens: int = 2048
    delimiter_ids: tuple[int, ...] = ()
    template: str = "chat"
    grader: str = "auto"
    dtype: str = "bfloat16"
    batch: int = 64
    workers: int = 2
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Where the rows go."""
        return self.workdir / FOLDER


def analyze(options: Analysis) -> list[Path]:
    """Writes each study's rows and a report with their sections; returns the files.

    Raises:
      UserError: an option that is missing or out of its range, a file that cannot be read.
    """
    _check(options)
    studies = options.studies or tuple(_allowed(options))
    if not studies:
        raise UserError(
            f"{options.workdir} holds no run, and there is neither --rollouts nor --model with "
            "--data: nothing to study"
        )
    options.workdir.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    if "run" in studies:
        files += write_studies(options.workdir, compare=options.compare)
    if "entropy" in studies and options.model is None:
        files += _stored_entropy(options)
    elif "entropy" in studies:
        with _policy(options) as policy:
            files += _entropy(options, policy)
    if "deletion" in studies:
        with _policy(options) as policy:
            files += _deletion(options, policy)
    return [*files, write_report(options.workdir, compare=options.compare)]


def _allowed(options: Analysis) -> Iterator[str]:
    """The studies that the options are enough for."""
    if _holds_run(options.workdir):
        yield "run"
    asked = options.model is not None and options.data is not None
    if asked or (options.rollouts is not None and options.model is None):
        yield "entropy"
    if asked and options.rollouts is None:
        yield "deletion"


def _holds_run(workdir: Path) -> bool:
    return workdir.is_dir() and bool(read_run(workdir).metrics)


def _check(options: Analysis) -> None:
    for study in options.studies:
        if study not in STUDIES:
            raise UserError(f"unknown study {study!r}: one of {', '.join(STUDIES)}")
    if "run" in options.studies and not _holds_run(options.workdir):
        raise UserError(f"{options.workdir} holds no run: no readable metrics.jsonl there")
    for name in ("samples", "max_new_tokens", "max_prompt_tokens"):
        if vars(options)[name] < 1:
            raise UserError(f"--{name} must be at least 1")
    if options.samples > MOST_SAMPLES:
        raise UserError(f"--samples={options.samples}: at most {MOST_SAMPLES}")
    if options.limit < 0 or min(options.deletions, default=-1) < 0:
        raise UserError("--limit and --deletions must not be negative, and --deletions not empty")
    if options.model is None and (options.data is not None or "deletion" in options.studies):
        raise UserError("--model is missing: whose entropy is it to be?")
    if options.model is not None and options.data is None:
        raise UserError("--data is missing: the rows with prompts and expert trajectories")
    if "entropy" in options.studies and options.model is None and options.rollouts is None:
        raise UserError("entropy needs --model and --data, or --rollouts with stored entropies")


@contextmanager
def _policy(options: Analysis) -> Iterator[Policy]:
    with GraderPool(options.grader, workers=options.workers) as grader:
        yield Policy.load(
            str(options.model),
            dtype=options.dtype,
            delimiter_ids=options.delimiter_ids,
            grader=grader,
            template=options.template,
            temperature=options.temperature,
            max_prompt_tokens=options.max_prompt_tokens,
            max_new_tokens=options.max_new_tokens,
            rows_at_once=options.batch,
            seed=options.seed,
        )


def _rows(options: Analysis) -> Sequence[Mapping[str, Any]]:
    return list(itertools.islice(load_rows(str(options.data)), options.limit or None))


def _stored_entropy(options: Analysis) -> list[Path]:
    assert options.rollouts is not None
    rows = golden_entropy.stored_rows(options.rollouts, limit=options.limit)
    return _write_entropy(options, rows, f"Rollouts of {options.rollouts.name}.")


def _entropy(options: Analysis, policy: Policy) -> list[Path]:
    expert, used = golden_entropy.expert_rows(policy, _rows(options))
    if options.rollouts is None:
        own = golden_entropy.policy_rows(policy, used)
    else:
        own = golden_entropy.rescored_rows(policy, options.rollouts, limit=options.limit)
    return _write_entropy(options, [*expert, *own], _about(options))


def _write_entropy(options: Analysis, rows: list[dict[str, Any]], about: str) -> list[Path]:
    profiles = [row | {"about": about} for row in profile_rows(entropy_profiles(rows))]
    for profile in profiles:
        print(
            f"{profile['source']}: {profile['trajectories']} trajectories, "
            f"token entropy {_interval(profile, 'token')}, "
            f"step entropy {_interval(profile, 'step')}, "
            f"highest step {profile['peak_mean']:.3f} nats"
        )
    return [
        write_jsonl(options.folder / TRAJECTORIES, profiles),
        write_jsonl(options.folder / "step_entropy.jsonl", golden_entropy.step_rows(rows)),
    ]


def _deletion(options: Analysis, policy: Policy) -> list[Path]:
    rows = _rows(options)
    solutions = step_deletion.find_solutions(
        policy, rows, solver=options.solutions, samples=options.samples
    )
    outcomes = step_deletion.deletion_outcomes(policy, rows, solutions, counts=options.deletions)
    used = len({row["row"] for row in outcomes})
    about = (
        f"{_about(options)} {used} solutions by the {options.solutions} with at least "
        f"{max(options.deletions)} steps; {len(solutions) - used} shorter ones are left out."
    )
    points = deletion_curve(outcomes)
    for point in points:
        print(
            f"{point.deleted} deleted, {point.order}: {point.success:.1%} right "
            f"[{point.low:.1%}, {point.high:.1%}] of {point.trials}"
        )
    curve = [row | {"about": about} for row in deletion_rows(points)]
    return [
        write_jsonl(options.folder / DELETION, curve),
        write_jsonl(options.folder / "deletion_outcomes.jsonl", outcomes),
    ]


def _about(options: Analysis) -> str:
    model, data = Path(str(options.model)).name, Path(str(options.data)).name
    return f"Model {model}, rows of {data}, temperature {options.temperature:g}."


def _interval(profile: dict[str, Any], what: str) -> str:
    low, high = profile[f"{what}_low"], profile[f"{what}_high"]
    return f"{profile[f'{what}_mean']:.3f} [{low:.3f}, {high:.3f}]"
