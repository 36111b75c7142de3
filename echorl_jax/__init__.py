"""EchoRL in JAX: the method as pure functions, and everything needed to train with it.

    import echorl_jax as echo

    clips = echo.mine_echo_clips(token_entropy, step_ids, correct, group, ...)
    loss = echo.echo_loss(logprobs, clips).mean()

All public names of ``core``, ``types``, ``models``, ``rollout``, ``parallel`` and ``rewards`` are
here too. A module is loaded when one of its names is first used: importing the package is free.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echorl_jax.core import *  # noqa: F403
    from echorl_jax.models import *  # noqa: F403
    from echorl_jax.parallel import *  # noqa: F403
    from echorl_jax.rewards import *  # noqa: F403
    from echorl_jax.rollout import *  # noqa: F403
    from echorl_jax.types import *  # noqa: F403

__version__ = "0.1.0"

_MODULES = ("core", "types", "models", "rollout", "parallel", "rewards")


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
    public = (importlib.import_module(f"{__name__}.{module}").__all__ for module in _MODULES)
    return sorted({"__version__", *(name for names in public for name in names)})
