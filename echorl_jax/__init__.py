"""EchoRL in JAX: the method as pure functions, and everything needed to train with it.

    import echorl_jax as echo

    clips = echo.mine_echo_clips(token_entropy, step_ids, correct, group, ...)
    loss = echo.echo_loss(logprobs, clips).mean()

``dir(echorl_jax)`` lists the method and what a trainer of your own needs around it. The other
public names of ``core``, ``types``, ``models``, ``rollout``, ``parallel``, ``rewards`` and ``data``
are here too. A module is loaded when one of its names is first used: importing the package is free.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echorl_jax.core import *  # noqa: F403
    from echorl_jax.data import *  # noqa: F403
    from echorl_jax.models import *  # noqa: F403
    from echorl_jax.parallel import *  # noqa: F403
    from echorl_jax.rewards import *  # noqa: F403
    from echorl_jax.rollout import *  # noqa: F403
    from echorl_jax.types import *  # noqa: F403

__version__ = "0.1.0"

_MODULES = ("core", "types", "models", "rollout", "parallel", "rewards", "data")
# The public names outside ``core`` and ``types`` that dir() lists.
_AROUND = (
    "generate",
    "load_adapter",
    "load_grader",
    "load_model",
    "load_tokenizer",
    "make_mesh",
    "newline_delimiters",
    "save_adapter",
    "save_model",
    "score",
)


def __getattr__(name: str) -> Any:
    if importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    if not name.startswith("_"):
        for module in _MODULES:
            found = importlib.import_module(f"{__name__}.{module}")
            if name in found.__all__:
                return vars(found)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    core, types = (importlib.import_module(f"{__name__}.{name}") for name in ("core", "types"))
    return sorted({"__version__", *core.__all__, *types.__all__, *_AROUND})
