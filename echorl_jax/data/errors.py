"""The exception of data: the readers, the templates and the stream raise it."""

from echorl_jax.config import ConfigError


class DataError(ConfigError):
    """Rows or a tokenizer that cannot be used: one line with the file, the row and the column."""
