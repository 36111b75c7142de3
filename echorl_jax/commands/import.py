"""Writes a config from a run script or a YAML or JSON config of verl, or from a config of TRL.

Every setting of the file is in the printed receipt: taken over, taken over with another meaning, or
not taken over. What the file leaves out has that project's default.

examples:
  echorl import run_grpo.sh --out=configs/mine.py
  echorl import recipes/config.yaml --out=configs/mine.py
  echorl train --config=configs/mine.py --workdir=runs/mine
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("file", type=Path, metavar="FILE", help=".sh, .yaml or .json")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.py", help="the config to write; must not exist"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the config and prints the receipt."""
    from echorl_jax.errors import UserError
    from echorl_jax.tools.import_config import config_text, import_file, receipt_text

    out = arguments.out
    if out is not None and out.exists():
        raise UserError(f"{out} exists; take another --out")
    found = import_file(arguments.file)
    print(receipt_text(found), end="")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(config_text(found, arguments.file))
        print(f"config: {out}; next: echorl check --config={out}")
    return 0
