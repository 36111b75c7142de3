"""Custom functions by import path."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from echorl_jax.config import ConfigError
from echorl_jax.errors import one_line


def load_custom(path: str, what: str) -> Any:
    """The object that ``package.module:name`` or ``FILE.py:name`` names.

    Args:
      path: the import path.
      what: the use of the object, for the error.

    Raises:
      ConfigError: no such module, file or name, or a module that fails when it is imported.

    >>> load_custom("math:ceil", "rounding")(0.5)
    1
    """
    name, _, attribute = path.rpartition(":")
    if not name or not attribute:
        raise ConfigError(f"{what} {path!r}: must be package.module:function or FILE.py:function")
    try:
        module = _load_file(name) if name.endswith(".py") else importlib.import_module(name)
    # The module is the user's program: anything can go wrong in it.
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what} {path!r}: cannot import {name}: {one_line(error)}") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{what} {path!r}: {name} has no {attribute}")
    return getattr(module, attribute)


def _load_file(name: str) -> ModuleType:
    """The module of a Python file, which is loaded once and finds modules in its own folder."""
    file = Path(name).expanduser().resolve()
    if str(file) not in sys.modules:
        spec = importlib.util.spec_from_file_location(str(file), file)
        assert spec is not None and spec.loader is not None  # a name that ends in .py has them
        module = importlib.util.module_from_spec(spec)
        sys.modules[str(file)] = module
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[str(file)]
            raise
    return sys.modules[str(file)]


def accepted(
    parameters: Mapping[str, inspect.Parameter], offered: Mapping[str, Any]
) -> dict[str, Any]:
    """The offered arguments that a function with these parameters takes.

    >>> parameters = inspect.signature(lambda graded, step=0: graded).parameters
    >>> accepted(parameters, {"graded": 1, "clips": 2})
    {'graded': 1}
    """
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in parameters}
