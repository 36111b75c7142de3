"""``echorl analyze``: runs the studies that its options allow, and puts them into the report."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from echorl_jax.data import load_rows
from echorl_jax.environment import MOST_SAMPLES
from echorl_jax.errors import UserError
from echorl_jax.files import write_jsonl
from echorl_jax.tools.report import golden_entropy, step_deletion
from echorl_jax.tools.report.entropy_decay import entropy_collapse, entropy_law
from echorl_jax.tools.report.page import write_report
from echorl_jax.tools.report.policy import Analysis, Policy
from echorl_jax.tools.report.runs import read_run, read_runs, study_file
from echorl_jax.tools.report.viewer import all_clips

STUDIES = ("run", "entropy", "deletion")
Row = dict[str, Any]


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
        assert options.rollouts is not None
        rows = golden_entropy.stored_rows(options.rollouts, limit=options.limit)
        files += _write_entropy(options, rows, f"Rollouts of {options.rollouts.name}.")
    elif {"entropy", "deletion"} & set(studies):
        with Policy.load(options) as policy:
            files += _entropy(policy) if "entropy" in studies else []
            files += _deletion(policy) if "deletion" in studies else []
    return [*files, write_report(options.workdir, compare=options.compare)]


def write_studies(workdir: Path, *, compare: tuple[Path, ...] = ()) -> list[Path]:
    """Writes the studies that need only a run's files; returns the written files.

    Args:
      workdir: the run; its folder ``analysis`` gets entropy collapse, entropy law and clips.
      compare: other runs, each of which gets a row of collapse and law.

    Raises:
      ConfigError: a given working directory does not exist.
    """
    runs = read_runs([workdir, *compare])
    studies = {
        "collapse": map(entropy_collapse, runs),
        "entropy_law": map(entropy_law, runs),
        "clips": all_clips(runs[0]),
    }
    return _write(workdir, {name: [row for row in rows if row] for name, rows in studies.items()})


def _allowed(options: Analysis) -> Iterator[str]:
    """The studies that the options are sufficient for."""
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
        raise UserError("--model is missing: it gives the entropies and continues the solutions")
    if options.model is not None and options.data is None:
        raise UserError("--data is missing: the rows with prompts and expert trajectories")
    if "entropy" in options.studies and options.model is None and options.rollouts is None:
        raise UserError("entropy needs --model and --data, or --rollouts with stored entropies")


def _rows(options: Analysis) -> Sequence[Mapping[str, Any]]:
    return list(itertools.islice(load_rows(str(options.data)), options.limit or None))


def _entropy(policy: Policy) -> list[Path]:
    options = policy.options
    rows, used = golden_entropy.expert_rows(policy, _rows(options))
    if options.rollouts is None:
        rows += golden_entropy.policy_rows(policy, used)
    else:
        rows += golden_entropy.rescored_rows(policy, options.rollouts, limit=options.limit)
    return _write_entropy(options, rows, _about(options))


def _write_entropy(options: Analysis, rows: list[Row], about: str) -> list[Path]:
    profiles = [row | {"about": about} for row in golden_entropy.entropy_profiles(rows)]
    for profile in profiles:
        token, step = (
            golden_entropy.mean_with_interval(profile, what, "{:.3f}".format)
            for what in ("token", "step")
        )
        print(
            f"{profile['source']}: {profile['trajectories']} trajectories, token entropy {token}, "
            f"step entropy {step}, highest step {profile['peak_mean']:.3f} nats"
        )
    steps = golden_entropy.step_rows(rows)
    return _write(options.workdir, {"trajectories": profiles, "step_entropy": steps})


def _deletion(policy: Policy) -> list[Path]:
    options, rows = policy.options, _rows(policy.options)
    solutions = step_deletion.find_solutions(policy, rows)
    outcomes = step_deletion.deletion_outcomes(policy, rows, solutions)
    used = len({row["row"] for row in outcomes})
    about = (
        f"{_about(options)} {used} solutions by the {options.solutions} with at least "
        f"{max(options.deletions)} steps; {len(solutions) - used} shorter ones are left out."
    )
    curve = [point | {"about": about} for point in step_deletion.deletion_curve(outcomes)]
    for p in curve:
        interval = f"[{p['low']:.1%}, {p['high']:.1%}] of {p['trials']}"
        print(f"{p['deleted']} deleted, {p['order']}: {p['success']:.1%} right {interval}")
    return _write(options.workdir, {"deletion": curve, "deletion_outcomes": outcomes})


def _write(workdir: Path, studies: dict[str, list[Row]]) -> list[Path]:
    return [write_jsonl(study_file(workdir, name), rows) for name, rows in studies.items()]


def _about(options: Analysis) -> str:
    model, data = Path(str(options.model)).name, Path(str(options.data)).name
    return f"Model {model}, rows of {data}, temperature {options.temperature:g}."
