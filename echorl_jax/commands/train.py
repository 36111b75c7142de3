"""Trains a policy with verifiable rewards; EchoRL is on unless config.echo.enabled is false.

A run whose workdir has a checkpoint is resumed. The workdir receives config.json, metrics.jsonl (a
line per step), checkpoints/, samples/, tensorboard/, report.html and export/ (Hugging Face format;
with LoRA a PEFT adapter).

examples:
  echorl train --config=configs/countdown.py --workdir=runs/first
  echorl train --config=configs/countdown.py --workdir=runs/plain --config.echo.enabled=false
  echorl train --config=configs/countdown.py --workdir=runs/own --config.data.train=rows.parquet

The same command on several hosts or in several processes is one run: see docs/launch.md.
`echorl options` lists every key.
"""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path

from echorl_jax.commands import add_config, join, location, read_config
from echorl_jax.remote import Mirror, mirrored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options; any config key may be set with ``--config.KEY=VALUE``."""
    add_config(parser)
    workdir = "directory of the run's files, also s3:// or gs://"
    parser.add_argument("--workdir", required=True, type=location, metavar="DIR", help=workdir)


def run(arguments: argparse.Namespace) -> int:
    """Loads the config, trains, and writes the report."""
    config = read_config(arguments)
    if (code := join(config, arguments)) is not None:
        return code
    from echorl_jax.training.loop import train

    with mirrored(arguments.workdir) as mirror:
        train(config, mirror.directory, mirror=mirror)
        finish(mirror, report=config.log.report)
    return 0


def finish(mirror: Mirror, *, report: bool) -> None:
    """Prints the result of the run and the paths of its files; writes the report. Once per run."""
    from echorl_jax.parallel import is_first
    from echorl_jax.tools.report.headline import headline
    from echorl_jax.tools.report.page import write_report
    from echorl_jax.tools.report.runs import read_run

    if not is_first():
        return
    workdir = mirror.directory
    print(headline(read_run(workdir)))
    lines = [f"report:  {write_report(workdir)}"] if report else []
    lines += _exported(workdir)
    lines += [f"metrics: {workdir / 'metrics.jsonl'}, samples: {workdir / 'samples'}"]
    for line in lines:
        print(line.replace(str(workdir), mirror.url))


def _exported(workdir: Path) -> Iterator[str]:
    """Lines on what ``export/`` holds: a model, an adapter or both; none without it."""
    from echorl_jax.files import read_json

    export, settings = workdir / "export", workdir / "export" / "adapter" / "adapter_config.json"
    whole = (export / "config.json").exists()
    if whole:
        yield f"model:   {export} (Hugging Face format)"
    if settings.exists():
        base = read_json(settings)["base_model_name_or_path"]
        used = shlex.join([f"--model={base}", f"--adapter={settings.parent}"])
        yield f"adapter: {settings.parent} (PEFT format); use it as echorl evaluate {used}"
    if settings.exists() and not whole:
        merge = shlex.join(["--merge", f"--model={workdir}"])
        yield (
            f"         whole model: echorl convert {merge} --out=DIR; every run writes it with "
            "--config.checkpoint.merge=true"
        )
