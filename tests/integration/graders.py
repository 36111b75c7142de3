"""Graders for runs whose policy knows nothing: rewards that differ between its responses."""

from collections.abc import Mapping
from typing import Any


def even_length(response: str, row: Mapping[str, Any]) -> float:
    """1 for an even number of characters."""
    return float(len(response) % 2 == 0)
