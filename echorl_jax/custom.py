"""Custom functions by import path."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from echorl_jax.errors import UserError, one_line


def load_custom(path: str, what: str) -> Any:
    """The object that ``package.module:name`` names.

    Args:
      path: the import path.
      what: the use of the object, for the error.

    Raises:
      UserError: no such module or name, or a module that fails when it is imported.

    >>> load_custom("math:ceil", "rounding")(0.5)
    1
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    # The module is the user's program: anything can go wrong in it.
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} {path!r}: {one_line(error)}") from error


def accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """The offered arguments that the function's parameters name.

    >>> accepted(lambda graded, step=0: graded, {"graded": 1, "clips": 2})
    {'graded': 1}
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in parameters}
