"""Lists every config key with its default and meaning, or those whose name contains a word.

examples:
  echorl options
  echorl options echo
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("word", nargs="?", default="", help="list only keys that contain this word")


def run(arguments: argparse.Namespace) -> int:
    """Prints the list."""
    from echorl_jax.config_file import describe_options

    for key, default, meaning in describe_options():
        if arguments.word in key:
            print(f"--config.{key}={default}\n    {meaning}")
    return 0
