"""The place of a process, from the environment variables of launchers."""

import pytest

from echorl_jax.cluster import Place, find_place
from echorl_jax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
# 20000 + (1234 * 8 + 0) % 10000
SLURM_ADDRESS = "gpu03:29872"
GKE = {"TPU_WORKER_HOSTNAMES": "a.svc,b.svc,c.svc,d.svc", "TPU_WORKER_ID": "2"}
EXPLICIT = {
    "ECHORL_COORDINATOR": "[::1]:9000",
    "ECHORL_PROCESSES": "2",
    "ECHORL_PROCESS_ID": "1",
}


def test_alone_nothing_is_needed_or_asked() -> None:
    assert find_place({}) is None
    assert find_place({"JAX_PLATFORMS": "cpu"}) is None
    # A batch script, or an allocation's shell: no step of several tasks.
    assert find_place({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None
    assert find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_place({"JOB_COMPLETION_INDEX": "0"}) is None
    assert find_place({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    assert find_place({"TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_explicit_comes_first() -> None:
    place = find_place({**SLURM, **GKE, **EXPLICIT})
    assert place == Place("[::1]:9000", 2, 1)
    assert place.address == ("::1", 9000)


def test_an_indexed_kubernetes_job() -> None:
    pod = {"ECHORL_COORDINATOR": "echorl-hosts-0-0.echorl:8491", "ECHORL_PROCESSES": "4"}
    place = find_place({**pod, "JOB_COMPLETION_INDEX": "3"})
    assert place == Place("echorl-hosts-0-0.echorl:8491", 4, 3)


def test_slurm_one_task_per_gpu() -> None:
    assert find_place(SLURM) == Place(SLURM_ADDRESS, 16, 9, (1,))
    # Slurm may hide the other tasks' GPUs by itself.
    bound = {**SLURM, "CUDA_VISIBLE_DEVICES": "0"}
    assert find_place(bound) == Place(SLURM_ADDRESS, 16, 9)
    shown = {**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert find_place(shown) == Place(SLURM_ADDRESS, 16, 9, (1,))


def test_slurm_one_task_per_node_has_all_gpus() -> None:
    node = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    node |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert find_place(node) == Place(SLURM_ADDRESS, 2, 1)


def test_a_tpu_slice_of_gke() -> None:
    assert find_place(GKE) == Place("a.svc:8491", 4, 2)


@pytest.mark.parametrize(
    ("endpoints", "first"),
    [("10.0.0.2,10.0.0.3", "10.0.0.2"), ("w0:0:10.0.0.2,w1:1:10.0.0.3", "10.0.0.2")],
)
def test_a_tpu_vm_asks_its_metadata(endpoints: str, first: str) -> None:
    known = {"agent-worker-number": "1", "worker-network-endpoints": endpoints}
    assert find_place({}, metadata=known.get) == Place(f"{first}:8491", 2, 1)
    assert find_place({}, metadata=lambda name: None) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ECHORL_PROCESSES": "2"}, "missing: ECHORL_COORDINATOR, ECHORL_PROCESS_ID"),
        ({**EXPLICIT, "ECHORL_COORDINATOR": "host"}, "must be HOST:PORT"),
        ({**EXPLICIT, "ECHORL_PROCESSES": "two"}, "ECHORL_PROCESSES='two': must be a whole number"),
        ({**EXPLICIT, "ECHORL_PROCESS_ID": "2"}, "ECHORL_PROCESS_ID = 2: must be at least 0 and"),
        ({**SLURM, "SLURM_PROCID": ""}, "SLURM_PROCID=''"),
        ({**GKE, "TPU_WORKER_ID": "7"}, "the TPU worker's number = 7"),
    ],
)
def test_what_contradicts_itself_is_one_line(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        find_place(environment)
    assert expected in str(error.value) and "\n" not in str(error.value)
