"""The import path of :class:`DataError` for programs outside this package."""

from echorl_jax.data.rows import DataError

__all__ = ["DataError"]
