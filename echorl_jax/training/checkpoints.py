"""Checkpoints through Orbax: the training state, the data position, and whose config it was."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from echorl_jax.training.optimizer import TrainState

# Orbax tells of every save and directory; a run's own lines say what a user needs.
logging.getLogger("absl").setLevel(logging.WARNING)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run under ``workdir/checkpoints``; saving is asynchronous."""

    manager: ocp.CheckpointManager

    @classmethod
    def open(cls, workdir: Path, *, keep: int) -> "Checkpoints":
        """Opens or creates the directory; the ``keep`` newest checkpoints stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        return cls(ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options))

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, data_position: dict[str, Any]) -> None:
        """Copies the state to the host and writes it in the background; a saved step is kept."""
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position)
            ),
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint into the shapes and shardings of ``like``, on this mesh or another."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits for the write in progress."""
        self.manager.wait_until_finished()
        self.manager.close()
