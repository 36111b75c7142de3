"""Countdown as a TFDS data set, ``echorl_countdown``, for pipelines that read such.

``python -m echorl_jax.data.tfds_countdown --data_dir=DIR`` prepares it;
``tfds:echorl_countdown?data_dir=DIR`` reads it. Neither needs TensorFlow.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from echorl_jax.data.countdown_rows import CountdownRows
from echorl_jax.errors import require_package

ROWS = {"train": 8192, "eval": 1024}


def builder_class() -> type[Any]:
    """The builder; made on demand, because TFDS is optional.

    Raises:
      UserError: TFDS is not installed.
    """
    tfds = require_package("tensorflow_datasets", "tensorflow-datasets", "tfds:")

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
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in ROWS}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            return examples(split)

    return EchorlCountdown


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


def prepare(data_dir: str) -> None:
    """Writes the data set under ``data_dir`` as array_record files."""
    builder = builder_class()(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepare the TFDS data set echorl_countdown.")
    parser.add_argument("--data_dir", required=True)
    prepare(parser.parse_args().data_dir)
