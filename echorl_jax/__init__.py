"""EchoRL in JAX: the method as pure functions, and everything needed to train with it."""

__version__ = "0.1.0"
