"""Tells the caller which rows have ended, while the device goes on with the others."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from echorl_jax.parallel import constrain
from echorl_jax.rollout.loop import Output
from echorl_jax.types import Array, HostArray

# Rows of one fetch: one program for any number of them.
PIECE = 32

# Called with numbers of rows and their tokens, EOS included.
Finished = Callable[[Sequence[int], Sequence[HostArray]], None]


class Watch:
    """Follows a call of the sampler; does nothing unless somebody wants to be told.

    What has ended is read at the host's own looks. It is copied out before the next program takes
    the buffers, and handed over while that program runs.

    Args:
      finished: is told each row once, in any order.
      names: the caller's numbers of the rows that are not padding.
    """

    def __init__(self, finished: Finished | None, *, names: HostArray) -> None:
        self._finished = finished
        self._names = names
        self._known = np.zeros(len(names), bool)
        self._found: list[tuple[HostArray, Array, Array]] = []

    def ended(self, limit: Array, output: Output) -> Array | None:
        """Bool ``[N]``, to be read together with the status; ``limit`` is the queue's."""
        if self._finished is None:
            return None
        return _ended(limit, output.length, output.stopped)

    def copy(self, ended: HostArray | None, output: Output) -> None:
        """Starts to fetch what has ended since the last time."""
        if ended is None:
            return
        new = np.flatnonzero(ended[: len(self._known)] & ~self._known)
        self._known[new] = True
        for start in range(0, len(new), PIECE):
            rows: HostArray = new[start : start + PIECE]
            filled = np.resize(rows, PIECE).astype(np.int32)
            self._found.append((rows, *_pick(output.token, output.length, filled)))

    def tell(self) -> None:
        """Hands over what has been fetched."""
        for rows, *arrays in self._found:
            token, length = jax.device_get(arrays)
            completions = [token[i, : length[i]] for i in range(len(rows))]
            assert self._finished is not None
            self._finished(self._names[rows].tolist(), completions)
        self._found.clear()


@jax.jit
def _ended(limit: Array, length: Array, stopped: Array) -> Array:
    return constrain(stopped | (length >= limit), None)


@jax.jit
def _pick(token: Array, length: Array, rows: Array) -> tuple[Array, Array]:
    return constrain(token[rows], None, None), constrain(length[rows], None)
