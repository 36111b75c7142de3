"""Several processes, one program: joining them, sharing host work, placing host arrays.

All processes run the same code on the same host values, so that they make the same calls in the
same order. What only one of them knows (verdicts on its rows, a signal) is exchanged here. Alone, a
process joins nothing and exchanges nothing.
"""

import collections
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from echorl_jax.errors import UserError
from echorl_jax.types import HostArray, PyTree

# The longest error line that processes exchange, in UTF-8.
LINE_BYTES = 1000


def join_processes(
    coordinator: str,
    *,
    processes: int,
    process: int,
    local_devices: Sequence[int] | None = None,
    start_timeout_s: float,
    lost_after_s: float,
) -> None:
    """Makes the devices of all processes visible to each; before any other use of JAX.

    Collectives between CPU processes go through gloo.

    Args:
      coordinator: host:port of process 0, where JAX's own service will listen.
      processes: how many there are.
      process: this one.
      local_devices: the accelerators of the host that are this process's; all unless given.
      start_timeout_s: for the others to join.
      lost_after_s: when a supervisor declares a process lost. JAX's own watch, which aborts, is
        slower, so that the supervisor has the first word.

    Raises:
      UserError: the processes have different numbers of devices, so that no mesh is regular.
    """
    # It would catch SIGTERM; a run agrees on its last step by itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        local_device_ids=local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=round(start_timeout_s) + 1,
        heartbeat_timeout_seconds=round(2 * lost_after_s) + 10,
        shutdown_timeout_seconds=round(2 * lost_after_s) + 10,
    )
    counts = collections.Counter(device.process_index for device in jax.devices())
    for number in range(processes):
        if counts[number] != counts[0]:
            raise UserError(
                f"process {number} has {counts[number]} local device(s), but process 0 has "
                f"{counts[0]}: all processes need the same number"
            )


def is_first() -> bool:
    """True if this process is the one that writes files."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """True if the flag is set on any process; the same answer on all."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def smallest(value: int) -> int:
    """The least of the processes' values; the same answer on all."""
    if jax.process_count() == 1:
        return value
    return int(np.min(multihost_utils.process_allgather(np.array(value, np.int32))))


def from_first(value: int) -> int:
    """Process 0's value; the same answer on all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.array(value, np.int32))[0])


def on_first(work: Callable[[], int]) -> int:
    """A result that process 0 alone computes; the same on all processes.

    Raises:
      UserError: on all, what process 0 has raised.
    """
    value, failure = 0, ""
    if is_first():
        try:
            value = work()
        except UserError as error:
            failure = str(error)
    told = texts_from_shares([failure], jax.process_count(), most_bytes=LINE_BYTES)[0]
    if told:
        raise UserError(told)
    return from_first(value)


def require_same(values: Mapping[str, str]) -> None:
    """Checks that each process has the same text, such as a digest, under each name.

    Raises:
      UserError: on all, the first name and process whose text is not that of process 0.
    """
    for name, value in values.items():
        texts = texts_from_shares([value], jax.process_count(), most_bytes=LINE_BYTES)
        for number, text in enumerate(texts):
            if text != texts[0]:
                raise UserError(f"process {number} has other {name} than process 0")


def own_share(count: int) -> slice:
    """This process's contiguous part of ``count`` things.

    >>> own_share(6)
    slice(0, 6, None)
    """
    return _share(count, jax.process_index(), jax.process_count())


def from_shares(own: HostArray, count: int) -> HostArray:
    """All ``count`` rows, of which each process has those of its :func:`own_share`.

    Args:
      own: ``[share, ...]``.
      count: rows over all processes.

    Returns:
      ``[count, ...]``, the same on every process.
    """
    processes = jax.process_count()
    if processes == 1:
        return own
    most = -(-count // processes)
    padded = np.zeros((most, *own.shape[1:]), own.dtype)
    padded[: len(own)] = own
    found = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, *own.shape[1:])
    return found[:count]


def texts_from_shares(own: Sequence[str], count: int, *, most_bytes: int) -> list[str]:
    """:func:`from_shares` for texts, each cut to ``most_bytes`` of UTF-8 on its way."""
    if jax.process_count() == 1:
        return list(own)
    rows = np.zeros((len(own), most_bytes), np.uint8)
    for row, text in zip(rows, own, strict=True):
        data = text.encode()[:most_bytes]
        row[: len(data)] = np.frombuffer(data, np.uint8)
    found = from_shares(rows, count)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in found]


def _share(count: int, process: int, processes: int) -> slice:
    most = -(-count // processes)
    return slice(min(process * most, count), min((process + 1) * most, count))


def place_whole(tree: PyTree, mesh: Mesh) -> PyTree:
    """Host values, the same on every process, whole on every device of the mesh."""
    return _place(tree, NamedSharding(mesh, PartitionSpec()))


def place_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Host arrays, the same on every process, with rows spread over ``data`` and ``fsdp``."""
    return _place(tree, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))


def _place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Each process puts its own devices' parts: nothing is sent, compared or waited for."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf: HostArray) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)
