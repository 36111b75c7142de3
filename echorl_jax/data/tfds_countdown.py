"""Countdown as a TFDS data set, ``tfds:echorl_countdown``, for pipelines that read such.

Importing this module imports TFDS, which only a ``tfds:`` source needs; never TensorFlow.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from echorl_jax.data.countdown_rows import CountdownRows

ROWS = {"train": 8192, "eval": 1024}


class EchorlCountdown(tfds.core.GeneratorBasedBuilder):
    """Three numbers of 1 to 29, a target up to 400, and a solution of one step a line."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = {
            "question": tfds.features.Text(),
            "solution": tfds.features.Text(),
            "numbers": tfds.features.Sequence(np.int64),
            "target": np.int64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ROWS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        return examples(split)


def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Key and features of each problem of a split, ``train`` or ``eval``."""
    rows = CountdownRows(count=ROWS[split], split="eval" if split == "eval" else "train")
    for index in range(len(rows)):
        problem = rows.problem(index)
        yield (
            index,
            {
                "question": problem.question,
                "solution": problem.solution,
                "numbers": list(problem.numbers),
                "target": problem.target,
            },
        )


def prepare(data_dir: str | None = None) -> None:
    """Writes the data set as array_record files, unless it is there.

    Args:
      data_dir: the folder of TFDS data sets; None is TFDS's own.
    """
    EchorlCountdown(data_dir=data_dir, file_format="array_record").download_and_prepare()
