"""Weights between Hugging Face directories, Orbax checkpoints and the export of a run."""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from echorl_jax.config_file import from_dict
from echorl_jax.data import Template, load_tokenizer
from echorl_jax.data.tokens import keep_template
from echorl_jax.errors import UserError, writing
from echorl_jax.files import model_path, read_json, replace_directory, replace_json
from echorl_jax.models import (
    Decoder,
    claim_repository,
    load_decoder,
    load_model,
    local_directory,
    push,
    save_adapter,
    save_model,
    split_params,
)
from echorl_jax.models import merge as merge_params
from echorl_jax.parallel import is_first
from echorl_jax.training.card import write_card
from echorl_jax.training.checkpoints import DIRECTORY, read_params, read_weights
from echorl_jax.training.logs import hide_closed_loop_errors
from echorl_jax.training.setup import (
    Setup,
    configured_model,
    load_policy,
    model_options,
)
from echorl_jax.types import PyTree

# Settings beside the weights that a trained model keeps from the one that it began as.
KEPT = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    "chat_template.json",
)


def export_model(workdir: Path, setup: Setup, params: PyTree, step: int) -> Path:
    """Writes ``workdir/export``, a directory that ``transformers`` loads; replaced as a whole.

    A model with adapters gives ``export/adapter``, and itself only with ``checkpoint.merge``.
    Every process of a multi-process run calls this; the first one writes.

    Returns:
      The directory of the model, or of the adapter where there is no other.
    """
    config = setup.config
    base = model_path(config.model.path, config.model.revision)
    fresh, final = workdir / "export.partial", workdir / "export"
    if is_first():
        shutil.rmtree(fresh, ignore_errors=True)
    whole = setup.model.lora is None or config.checkpoint.merge
    if whole:
        tokenizer = keep_template(setup.tokenizer, Template.of(config.data))
        _save_like(base, fresh, setup.model, params, tokenizer)
    if setup.model.lora is not None:
        save_adapter(fresh / "adapter", setup.model, params, base=config.model.path)
    name = "." if whole else "adapter"
    if is_first():
        write_card(fresh / name, workdir, config, step, base=config.model.path)
        replace_directory(fresh, final)
    return final / name


def _save_like(source: str, out: Path, model: Decoder, params: PyTree, tokenizer: Any) -> None:
    """Writes a model with the tokenizer and the settings of the one that it began as."""
    save_model(out, model, params, tokenizer)
    if not is_first():
        return
    origin, settings = local_directory(source), "generation_config.json"
    for name in KEPT:
        if (origin / name).exists():
            shutil.copy(origin / name, out / name)
    if (origin / settings).exists():
        replace_json(out / settings, {**read_json(out / settings), **read_json(origin / settings)})


# Inside a converted directory: the weights, and all that is not weights as it came.
WEIGHTS, ORIGINAL = "params", "huggingface"


def convert(
    model: str,
    out: Path,
    *,
    step: str = "latest",
    adapter: str = "",
    merge: bool = False,
    push_to: str = "",
) -> str:
    """Converts in the direction that ``model`` asks for; returns a line on what was written.

    Args:
      model: a Hugging Face directory, one that was converted, or the workdir of a run.
      out: where to.
      step: of a workdir: "latest", "best" or a number.
      adapter: PEFT directory to add to a Hugging Face directory; "" is none.
      merge: whether a workdir with adapters gives the merged model, not its PEFT directory.
      push_to: OWNER/NAME, the repository of the Hugging Face Hub that gets a copy; "" is none.

    Raises:
      UserError: no such model, ``out`` exists, or it could not be pushed.
    """
    if out.exists():
        raise UserError(f"{out} exists already")
    source, fresh = Path(model_path(model)), out.with_name(f"{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    if push_to:
        if not (adapter or (source / WEIGHTS).is_dir() or (source / DIRECTORY).is_dir()):
            raise UserError(f"--push: {model} would become an Orbax checkpoint, no Hub directory")
        claim_repository(push_to)
    with writing(out):
        if adapter:
            written = _merged(source, model, adapter, fresh)
        elif (source / WEIGHTS).is_dir():
            written = _to_hugging_face(source, fresh)
        elif (source / DIRECTORY).is_dir():
            written = _from_workdir(source, fresh, step, merge=merge)
        else:
            written = _to_orbax(source, model, fresh)
        fresh.rename(out)
    pushed = f"; {push(out, push_to, message=written)}" if push_to else ""
    return f"{out}: {written}{pushed}"


def _to_orbax(source: Path, model: str, out: Path) -> str:
    path = str(source) if source.is_dir() else model
    decoder, params = load_model(path, param_dtype="float32")
    out.mkdir(parents=True)  # fails here, not in a thread of Orbax's
    hide_closed_loop_errors()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((out / WEIGHTS).resolve(), params)
    (out / ORIGINAL).mkdir()
    for file in source.glob("*"):
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, out / ORIGINAL)
    return f"Orbax checkpoint of {_count(params)} parameters"


def _to_hugging_face(source: Path, out: Path) -> str:
    decoder = load_decoder(str(source / ORIGINAL))
    params = read_weights(source / WEIGHTS, decoder.param_shapes())
    original = str(source / ORIGINAL)
    _save_like(original, out, decoder, params, load_tokenizer(original))
    return f"Hugging Face directory of {_count(params)} parameters"


def _merged(source: Path, model: str, adapter: str, out: Path) -> str:
    path = str(source) if source.is_dir() else model
    decoder, params = load_model(path, adapter=adapter)
    _save_like(path, out, decoder, params, load_tokenizer(path))
    return f"Hugging Face directory with {adapter} merged"


def _from_workdir(workdir: Path, out: Path, step: str, *, merge: bool) -> str:
    file = workdir / "config.json"
    try:
        config = from_dict(read_json(file))
    except (OSError, UserError) as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from error
    base = model_path(config.model.path, config.model.revision)
    decoder = configured_model(config, load_decoder(base, **model_options(config)))
    here = SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        split_params(decoder, decoder.param_shapes())[1],
    )
    found, params = read_params(workdir, step, like)
    if decoder.lora is not None and not merge:
        save_adapter(out, decoder, params, base=config.model.path)
        write_card(out, workdir, config, found, base=config.model.path)
        return f"PEFT directory of {_count(params)} parameters after step {found}"
    if decoder.lora is not None:
        _, whole = load_policy(config, None)
        params = merge_params(split_params(decoder, whole)[0], params)
    tokenizer = keep_template(load_tokenizer(base), Template.of(config.data))
    _save_like(base, out, decoder, params, tokenizer)
    write_card(out, workdir, config, found, base=config.model.path)
    return f"Hugging Face directory of {_count(params)} parameters after step {found}"


def _count(params) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
