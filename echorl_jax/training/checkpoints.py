"""Checkpoints through Orbax: what is saved, which are kept, and which one a run goes on from.

A checkpoint holds the training state and notes: the data position, the history of prompts and
entropies, the position in metrics.jsonl, the config keys that change the mathematics with their
hash, and a checksum of every array. Reading one back verifies all of them. Orbax commits a
directory by renaming it, so a write that was interrupted leaves nothing that looks like a
checkpoint.
"""

import asyncio
import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from echorl_jax.config import Config, ConfigError
from echorl_jax.errors import MOST, RunStopped, UserError, storage_reason
from echorl_jax.files import read_steps, sync, sync_tree
from echorl_jax.parallel import any_process, is_first, wait_for_all
from echorl_jax.training.faults import Faults
from echorl_jax.training.inputs import checksums, digest
from echorl_jax.training.logs import hide_closed_loop_errors
from echorl_jax.training.optimizer import TrainState
from echorl_jax.training.workdir import copy_aside, deciding_keys, first_difference, set_aside
from echorl_jax.types import PyTree

# Orbax logs every save and directory; the run's lines say what a user needs.
logging.getLogger("absl").setLevel(logging.CRITICAL)

DIRECTORY = "checkpoints"


class DamagedError(ValueError):
    """A checkpoint whose content is not what was saved."""


class SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint in progress: its files are on the disk before it gets its final name.

    Orbax leaves the writing of its JSON files to the system, and a power cut after the renaming
    would tear them.
    """

    async def finalize(self) -> None:
        """Renames the directory, once it is safe to."""
        await asyncio.to_thread(sync_tree, Path(self.get()))
        await super().finalize()
        await asyncio.to_thread(sync, Path(self.get_final()).parent)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, without the scores that earlier versions wrote into checkpoints."""

    def metrics(self, step: int) -> None:
        """None: checkpoints are ranked by metrics.jsonl."""


def _open_manager(directory: Path, options: ocp.CheckpointManagerOptions) -> _Manager:
    """Opens a directory of checkpoints.

    Raises:
      RunStopped: it cannot be read or written.
      UserError: Orbax cannot make sense of what is there.
    """
    try:
        return _Manager(directory, options=options)
    except OSError as error:
        raise RunStopped(f"{directory} cannot be used: {_first_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{directory} holds a damaged checkpoint: {_first_line(error)}") from error


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint."""

    state: TrainState
    data_position: dict[str, Any]
    metrics_lines: int  # of metrics.jsonl when it was saved
    inputs: dict[str, str]  # what the run read at its start, see training/inputs.py
    history: dict[str, Any]  # see training/history.py


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run under ``workdir/checkpoints``; saving is asynchronous.

    Every process of a multi-process run makes the same calls.
    """

    workdir: Path
    config: Config
    manager: ocp.CheckpointManager

    @classmethod
    def open(cls, workdir: Path, config: Config, faults: Faults) -> "Checkpoints":
        """Opens or creates the directory; a write that was interrupted is cleared away.

        The newest, the best and every k-th checkpoint stay, as ``config.checkpoint`` says.

        Raises:
          RunStopped: the directory cannot be written.
        """
        hide_closed_loop_errors()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_kept(workdir, config),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            temporary_path_class=faults.checkpoint_path(SyncedPath),
        )
        directory = (workdir / DIRECTORY).resolve()
        try:
            if is_first():
                directory.mkdir(exist_ok=True)
        except OSError as error:
            raise RunStopped(f"{directory} cannot be used: {_first_line(error)}") from error
        return cls(workdir, config, _open_manager(directory, options))

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        data_position: dict[str, Any],
        metrics_lines: int,
        inputs: Mapping[str, str] | None = None,
        history: Mapping[str, Any] | None = None,
    ) -> None:
        """Copies the state to the host and writes it in the background; a saved step is kept.

        Args:
          inputs: digests of what the run reads, compared when it goes on.
          history: of prompts and entropies, as JSON can hold it.

        Raises:
          RunStopped: this checkpoint or the one before could not be written.
        """
        if step in self.manager.all_steps():
            return
        decide = deciding_keys(self.config)
        notes = {
            "data": data_position,
            "metrics_lines": metrics_lines,
            "inputs": dict(inputs or {}),
            "history": dict(history or {}),
            "config": decide,
            "config_hash": digest(decide),
            "checksums": checksums(state),
        }
        with self._write_errors():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    notes=ocp.args.JsonSave({**notes, "digest": digest(notes)}),
                ),
            )

    def raise_errors(self) -> None:
        """Raises what went wrong in the background, as soon as it is known.

        Raises:
          RunStopped: a checkpoint could not be written.
        """
        with self._write_errors():
            self.manager.check_for_errors()

    def restore(self, like: TrainState, warn: Callable[[str], None]) -> Restored | None:
        """The checkpoint that ``config.checkpoint.resume`` asks for; None in a new workdir.

        With ``auto`` a damaged one is passed over for the one before. Only then, when another is
        found good, it is set aside, so that a failure to read costs nothing.

        Args:
          like: the state's shapes and shardings, on this mesh whatever the saved one was; given
            away if there is a checkpoint.
          warn: takes a line for each checkpoint that is passed over.

        Raises:
          UserError: there is no such step, none can be read, or one is of another config.
        """
        resume, steps = self.config.checkpoint.resume, sorted(self.manager.all_steps())
        wanted = [int(resume)] if resume.isdecimal() else steps[::-1]
        if wanted and wanted[0] not in steps:
            raise ConfigError(
                f"config.checkpoint.resume = {resume}: {self.manager.directory} has no such step, "
                f"but {', '.join(map(str, steps)) or 'none'}"
            )
        if not wanted:
            checksums(like)  # compiles them, so that the first save does not
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for leaf in jax.tree.leaves(like):
            leaf.delete()  # two states at once may not fit
        reasons: dict[int, str] = {}
        for step in wanted:
            try:
                restored, reason = self._read(step, abstract), ""
            except UserError:
                raise
            except Exception as error:  # whatever a reader makes of damaged bytes
                restored, reason = None, _first_line(error)
            if not any_process(restored is None) and restored is not None:
                self._set_aside([later for later in steps if later > step], reasons, warn)
                return restored
            reasons[step] = reason or "another process could not read it"
        newest = max(reasons)
        raise UserError(
            f"no checkpoint in {self.manager.directory} can be read; step {newest}: "
            f"{reasons[newest]} (take another --workdir to start again)"
        )

    def _read(self, step: int, like: TrainState) -> Restored:
        notes = read_notes(self.manager, step)
        decide = deciding_keys(self.config)
        other = notes["config_hash"] != digest(decide)
        if other and (found := first_difference(notes["config"], decide)):
            key, old, new = found
            raise ConfigError(
                f"checkpoint {step} in {self.workdir} is of a run with config.{key} = {old!r}, not "
                f"{new!r}; take another --workdir or the same config"
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        state = self.manager.restore(step, args=args)["state"]
        _require_same(notes["checksums"], checksums(state))
        # Checkpoints of earlier versions have no digests and no history.
        inputs, history = notes.get("inputs", {}), notes.get("history", {})
        return Restored(state, notes["data"], notes["metrics_lines"], inputs, history)

    def _set_aside(
        self, steps: list[int], damaged: Mapping[int, str], warn: Callable[[str], None]
    ) -> None:
        for step in steps:
            if is_first():
                moved = set_aside(self.workdir, Path(self.manager.directory) / str(step))
                why = f"damaged ({damaged[step]})" if step in damaged else "later than resume"
                warn(f"warning: checkpoint {step} is {why}; moved to {moved}")
        if is_first() and set(steps) - set(damaged):
            copy_aside(self.workdir, self.workdir / "metrics.jsonl")
        if steps:
            wait_for_all("set aside")
            self.manager.reload()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Says in one line what a write failed of, with the checkpoint that is still there."""
        try:
            yield
        except Exception as error:  # a full disk looks different in each library underneath
            good = max(self.manager.all_steps(read=True), default=None)
            stays = "there is none before" if good is None else f"step {good} stays"
            raise RunStopped(
                f"{self.manager.directory}: a checkpoint cannot be written: "
                f"{_first_line(error)}; {stays}"
            ) from error

    def close(self) -> None:
        """Waits for the write in progress.

        Raises:
          RunStopped: it failed.
        """
        with self._write_errors():
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        self.manager.close()


def read_notes(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Reads and verifies the files beside the state.

    Raises:
      DamagedError: it is not what was written.
    """
    args = ocp.args.Composite(notes=ocp.args.JsonRestore())
    notes = dict(manager.restore(step, args=args)["notes"])
    if notes.pop("digest", None) != digest(notes):
        raise DamagedError("its notes are not what was saved")
    return notes


def read_params(workdir: Path, step: str, like: PyTree) -> tuple[int, PyTree]:
    """The parameters of a checkpoint, while a run may be writing others.

    Args:
      step: "latest", "best" or a number.
      like: shapes and shardings.

    Returns:
      The step and the parameters.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    options = ocp.CheckpointManagerOptions(read_only=True)
    with _open_manager((workdir / DIRECTORY).resolve(), options) as manager:
        steps, latest = manager.all_steps(), manager.latest_step()
        found = {"latest": latest, "best": next(iter(_ranked(workdir, steps)), latest)}.get(step)
        found = int(step) if step.isdecimal() else found
        if found is None or found not in steps:
            have = ", ".join(map(str, sorted(steps))) or "none"
            raise UserError(f"{manager.directory} has no checkpoint {step!r}; there: {have}")
        try:
            notes = read_notes(manager, found)
            args = ocp.args.PyTreeRestore(
                item={"params": like},
                restore_args=ocp.checkpoint_utils.construct_restore_args({"params": like}),
                partial_restore=True,
            )
            params = manager.restore(found, args=ocp.args.Composite(state=args))["state"]["params"]
            saved = {k: v for k, v in notes["checksums"].items() if k.startswith(".params")}
            _require_same(saved, {f".params{k}": v for k, v in checksums(params).items()})
        except Exception as error:  # whatever a reader makes of damaged bytes
            reason = _first_line(error)
            raise UserError(f"checkpoint {found} in {workdir} is damaged: {reason}") from error
    return found, params


def read_weights(directory: Path, like: PyTree) -> PyTree:
    """Bare weights that Orbax has written, such as those of a dump or of ``echorl convert``.

    Raises:
      UserError: they cannot be read.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(directory.resolve(), like)
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged bytes
        raise UserError(f"{directory} cannot be read: {_first_line(error)}") from error


def _ranked(workdir: Path, steps: Iterable[int]) -> list[int]:
    """Those of the steps that have a score in metrics.jsonl, the best first, of equals the newer.

    The score is the mean pass@1 of the evaluation; in a run without evaluations, ``reward/mean``.
    """
    file = workdir / "metrics.jsonl"
    lines = {line["step"]: line for line in read_steps(file)} if file.exists() else {}
    evaluated = any("eval/failed" in line for line in lines.values())
    scores = {}
    for step in steps:
        values = [
            value
            for name, value in lines.get(step, {}).items()
            if isinstance(value, int | float)
            and (re.fullmatch("eval/.*/pass@1", name) if evaluated else name == "reward/mean")
        ]
        if values:
            scores[step] = fmean(values)
    return sorted(scores, key=lambda step: (scores[step], step), reverse=True)


@dataclasses.dataclass(frozen=True)
class _Best(policies.PreservationPolicy):
    """Keeps the best checkpoints by the scores that are logged when the next one is saved."""

    workdir: Path
    count: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer for each checkpoint."""
        steps = [info.step for info in checkpoints]
        best = _ranked(self.workdir, steps)[: self.count]
        return [step in best for step in steps]


def _kept(workdir: Path, config: Config) -> policies.PreservationPolicy:
    keep = config.checkpoint
    kept = [policies.LatestN(keep.keep), _Best(workdir, keep.keep_best)]
    if keep.keep_every:
        kept.append(policies.EveryNSteps(keep.keep_every))
    return policies.AnyPreservationPolicy(kept)


def _require_same(saved: Mapping[str, int], found: Mapping[str, int]) -> None:
    wrong = [name for name in {**saved, **found} if saved.get(name) != found.get(name)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DamagedError(f"state{wrong[0]}{more} is not what was saved")


def _first_line(error: BaseException) -> str:
    """The reason in one line: that of the system if the error comes from a file."""
    lines = str(error).strip().splitlines()
    return storage_reason(error) or (lines[0] if lines else type(error).__name__)[:MOST]
