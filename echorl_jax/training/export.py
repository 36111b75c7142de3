"""What a finished run leaves for others: the model in Hugging Face format."""

import shutil
from pathlib import Path

from echorl_jax.models import save_model
from echorl_jax.parallel import is_first
from echorl_jax.training.setup import Setup
from echorl_jax.types import PyTree


def export_model(workdir: Path, setup: Setup, params: PyTree) -> None:
    """Writes ``workdir/export``, a directory that ``transformers`` loads; replaced as a whole.

    Every process of a multi-process run calls this; the first one writes.
    """
    fresh, final = workdir / "export.partial", workdir / "export"
    if is_first():
        shutil.rmtree(fresh, ignore_errors=True)
    save_model(fresh, setup.model, params, setup.tokenizer)
    if is_first():
        shutil.rmtree(final, ignore_errors=True)
        fresh.rename(final)
