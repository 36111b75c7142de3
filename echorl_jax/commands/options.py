"""Lists every config key with its default and meaning, or those whose name contains a word.

examples:
  echorl options
  echorl options echo
  echorl options --from=verl
  echorl options --from=trl batch
"""

import argparse

from echorl_jax.other_names import PROJECTS, other_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("word", nargs="?", default="", help="list only keys that contain this word")
    parser.add_argument(
        "--from",
        dest="project",
        choices=PROJECTS,
        help="list the names of another project instead, with ours and what differs",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the list."""
    if arguments.project:
        for line in other_names():
            if line.project == arguments.project and arguments.word in ", ".join(line.names):
                print(f"{', '.join(line.names)}\n    {line.meaning}")
        return 0
    from echorl_jax.config_file import describe_options

    for key, default, meaning in describe_options():
        if arguments.word in key:
            print(f"--config.{key}={default}\n    {meaning}")
    return 0
