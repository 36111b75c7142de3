"""The one exception of this package."""

from echorl_jax.config import ConfigError


class DataError(ConfigError):
    """Rows or a tokenizer that cannot be used: one line with the file, the row and the column."""
