"""Finds the number of this process, the number of processes, and the address of process 0.

The sources in order; the first that has an answer counts:

1. ``ECHORL_COORDINATOR`` (host:port of process 0), ``ECHORL_PROCESSES`` and ``ECHORL_PROCESS_ID``.
   In an indexed Kubernetes job, ``JOB_COMPLETION_INDEX`` stands in for the last.
2. Slurm: a step of several tasks, as ``srun`` starts it.
3. A TPU slice of several hosts: the variables of GKE, or the metadata server of a TPU VM. That
   server is asked only where TPU chips and libtpu are present.

Otherwise the process is the only one.
"""

import dataclasses
import glob
import importlib.util
import re
import urllib.request
from collections.abc import Callable, Mapping

from echorl_jax.errors import UserError

# Default port of process 0; libtpu and JAX use 8470 to 8482.
PORT = 8491
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among several."""

    coordinator: str  # host:port of process 0, as all others reach it
    processes: int
    process: int
    # Accelerators of the host that this process uses; None takes all.
    local_devices: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_place(
    environment: Mapping[str, str], *, metadata: Callable[[str], str | None] | None = None
) -> Place | None:
    """The place that the environment describes; None for a run of one process.

    Args:
      environment: such as ``os.environ``.
      metadata: returns an attribute of the TPU VM; the metadata server where there are chips.

    Raises:
      UserError: variables that contradict each other, or some of them missing.

    >>> find_place({})
    >>> find_place({"ECHORL_COORDINATOR": "node1:9000", "ECHORL_PROCESSES": "2",
    ...             "ECHORL_PROCESS_ID": "1"})
    Place(coordinator='node1:9000', processes=2, process=1, local_devices=None)
    """
    if any(name in environment for name in _EXPLICIT):
        return _explicit(environment)
    if "SLURM_STEP_NUM_TASKS" in environment:
        return _slurm(environment)
    if hosts := environment.get("TPU_WORKER_HOSTNAMES"):
        if "," not in hosts:
            return None  # one host, whatever its number: `echorl plan` sets the name alone
        return _slice(hosts.split(","), _number(environment, "TPU_WORKER_ID"))
    if metadata is None and not on_tpu_vm(environment):
        return None
    return _tpu_vm(metadata or _ask_metadata)


_EXPLICIT = ("ECHORL_COORDINATOR", "ECHORL_PROCESSES", "ECHORL_PROCESS_ID")


def _explicit(environment: Mapping[str, str]) -> Place | None:
    given = dict(environment)
    if "JOB_COMPLETION_INDEX" in given:
        given.setdefault("ECHORL_PROCESS_ID", given["JOB_COMPLETION_INDEX"])
    missing = [name for name in _EXPLICIT if name not in given]
    if missing:
        raise UserError(f"{', '.join(_EXPLICIT)} belong together; missing: {', '.join(missing)}")
    coordinator = given["ECHORL_COORDINATOR"]
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"ECHORL_COORDINATOR={coordinator!r}: must be HOST:PORT")
    return _checked(
        Place(
            coordinator,
            _number(given, "ECHORL_PROCESSES"),
            _number(given, "ECHORL_PROCESS_ID"),
        ),
        "ECHORL_PROCESS_ID",
    )


def _slurm(environment: Mapping[str, str]) -> Place | None:
    processes = _number(environment, "SLURM_STEP_NUM_TASKS")
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if processes == 1 or not nodes:
        return None
    # The port depends on the job step, so that jobs on one node do not connect to each other.
    job, step = _number(environment, "SLURM_JOB_ID"), environment.get("SLURM_STEP_ID", "0")
    port = 20000 + (job * 8 + int(step) if step.isdigit() else job * 8) % 10000
    place = Place(
        f"{first_host(nodes)}:{port}",
        processes,
        _number(environment, "SLURM_PROCID"),
        _slurm_devices(environment),
    )
    return _checked(place, "SLURM_PROCID")


def _slurm_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """One GPU for each task of a node, unless Slurm already shows each task only its GPU."""
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    tasks = max(int(number) for number in re.findall(r"(?:^|,)(\d+)", counts))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if tasks == 1 or (visible is not None and len(visible.split(",")) < tasks):
        return None
    return (_number(environment, "SLURM_LOCALID"),)


def first_host(nodes: str) -> str:
    """The first of a Slurm node list.

    >>> [first_host(nodes) for nodes in ("gpu7", "a,b", "node[003-007,9],x", "r[1,4]n2")]
    ['gpu7', 'a', 'node003', 'r1n2']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else nodes)


def on_tpu_vm(environment: Mapping[str, str]) -> bool:
    """True if this machine has TPU chips, and the program is meant to use them."""
    wanted = environment.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(
        "tpu" in wanted.split(",")
        and "TPU_SKIP_MDS_QUERY" not in environment
        and chips
        and importlib.util.find_spec("libtpu")
    )


def _tpu_vm(metadata: Callable[[str], str | None]) -> Place | None:
    number, endpoints = metadata("agent-worker-number"), metadata("worker-network-endpoints")
    if number is None or endpoints is None:
        return None
    # Either a host name each, or name:id:address.
    return _slice([entry.split(":")[-1] for entry in endpoints.split(",")], int(number))


def _ask_metadata(name: str) -> str | None:
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode().strip()
    except OSError:
        return None


def _slice(hosts: list[str], number: int) -> Place | None:
    if len(hosts) == 1:
        return None
    return _checked(Place(f"{hosts[0]}:{PORT}", len(hosts), number), "the TPU worker's number")


def _checked(place: Place, source: str) -> Place | None:
    if place.processes < 1 or not 0 <= place.process < place.processes:
        raise UserError(
            f"{source} = {place.process}: must be at least 0 and below the number of "
            f"processes, {place.processes}"
        )
    return place if place.processes > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name}={text!r}: must be a whole number")
    return int(text)
