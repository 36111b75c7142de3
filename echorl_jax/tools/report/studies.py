"""The studies that need only a run's files, written as JSON lines beside the run.

Two more studies need a model; whoever runs it writes their rows to the names in
:data:`TRAJECTORIES` and :data:`DELETION`, and the report shows them.
"""

from pathlib import Path

from echorl_jax.tools.report.entropy_decay import collapse_rows, law_rows
from echorl_jax.tools.report.runs import Run, integer, read_jsonl, read_runs, write_jsonl
from echorl_jax.tools.report.viewer import Clip, clip_of, clip_rows

FOLDER = "analysis"
TRAJECTORIES = "trajectories.jsonl"
DELETION = "deletion.jsonl"


def write_studies(workdir: Path, *, compare: tuple[Path, ...] = ()) -> list[Path]:
    """Writes entropy collapse, entropy law and clip places of a run; returns the files.

    Args:
      workdir: the run; its folder ``analysis`` gets the files.
      compare: other runs, whose collapse and law are written too, one row a run.

    Raises:
      ConfigError: a given working directory does not exist.
    """
    runs = read_runs([Path(workdir), *compare])
    folder = Path(workdir) / FOLDER
    return [
        write_jsonl(folder / "collapse.jsonl", collapse_rows(runs)),
        write_jsonl(folder / "entropy_law.jsonl", law_rows(runs)),
        write_jsonl(folder / "clips.jsonl", clip_rows(all_clips(runs[0]))),
    ]


def all_clips(run: Run) -> list[Clip]:
    """The clips in every samples file of a run, in order of steps."""
    found = []
    for step, path in run.sample_files():
        for row in read_jsonl(path):
            logged = integer(row.get("step"))
            clip = clip_of(row | {"step": step if logged is None else logged})
            found += [clip] if clip is not None else []
    return found
