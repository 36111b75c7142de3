"""A Slurm cluster of two nodes on this machine, with daemons, key and state of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "scancel", "srun")
NODES = ("echorl-node1", "echorl-node2")
HOSTS = Path("/etc/hosts")
CONFIG = """
ClusterName=echorl
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={here}/munge.socket,cred_expire=5
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
SlurmdSpoolDir={here}/spool-%n
StateSaveLocation={here}/state
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=2
NodeName={first} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port1} CPUs=4
NodeName={second} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port2} CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def why_not() -> str:
    """Why no cluster can be had here; "" if it can. Installs Debian's Slurm when run as root."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    if all(map(shutil.which, PROGRAMS)):
        return ""
    if shutil.which("apt-get") is None:
        return "no Slurm here, and no apt-get to install it"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        with contextlib.suppress(subprocess.TimeoutExpired):
            command = ["apt-get", "-qq", *words]
            subprocess.run(command, env=environment, capture_output=True, timeout=300)
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"apt-get did not bring {', '.join(missing)}" if missing else ""


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextlib.contextmanager
def names_of_this_host(names: tuple[str, ...]) -> Iterator[None]:
    """Lets the names mean 127.0.0.1 while inside."""
    line = f"127.0.0.1 {' '.join(names)}\n"
    before = HOSTS.read_text()
    HOSTS.write_text(before.rstrip("\n") + "\n" + line)
    try:
        yield
    finally:
        HOSTS.write_text(HOSTS.read_text().replace(line, ""))


@contextlib.contextmanager
def cluster(here: Path) -> Iterator[dict[str, str]]:
    """Starts the daemons; gives the environment in which Slurm's commands reach them."""
    controller, port1, port2 = free_ports(3)
    config = here / "slurm.conf"
    first, second = NODES
    config.write_text(
        CONFIG.format(
            here=here, controller=controller, first=first, second=second, port1=port1, port2=port2
        )
    )
    (here / "state").mkdir()
    key = here / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(config)}
    commands = [
        ["munged", "--foreground", "--force", f"--socket={here}/munge.socket"]
        + [f"--key-file={key}", f"--pid-file={here}/munge.pid"]
        + [f"--log-file={here}/munge.log", f"--seed-file={here}/munge.seed"],
        ["slurmctld", "-D", "-f", str(config)],
        *(["slurmd", "-D", "-f", str(config), "-N", name] for name in NODES),
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(names_of_this_host(NODES))
        stack.callback(_stop, daemons)
        output = stack.enter_context((here / "daemons.log").open("wb"))
        for command in commands:
            daemons.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            time.sleep(0.5)
        _wait_until_idle(environment, here)
        yield environment


def _wait_until_idle(environment: dict[str, str], here: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        words = ["sinfo", "--noheader", "--format=%D %t"]
        found = subprocess.run(words, env=environment, capture_output=True, text=True)
        if found.stdout.strip() == "2 idle":
            return
        if time.monotonic() > deadline:
            logs = "".join(path.read_text()[-2000:] for path in here.glob("*.log"))
            raise RuntimeError(f"the nodes are not idle: {found.stdout}{found.stderr}\n{logs}")
        time.sleep(0.5)


def _stop(daemons: list[subprocess.Popen[bytes]]) -> None:
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
