"""A private Slurm on this machine: real daemons, several nodes, GPUs that are files; nothing is left of it.

A node is a slurmd in namespaces of its own: it has a name, which its own /etc/hosts knows, and all of its
processes can be told apart from those of other nodes. Every folder, port and name is the cluster's own, so
several of them may run side by side. Times that are minutes on a real cluster are seconds here.
"""

from __future__ import annotations

import ctypes
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil
from patience import patient

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"
PROGRAMS = "slurmctld", "slurmd", "sbatch", "munged", "unshare"
FREEZER = Path("/sys/fs/cgroup/freezer")
"""Where Slurm holds together all processes of a job, if it may."""
GPUS = 2
CPUS = 8
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
"""States that a job does not leave by itself."""


def why_not() -> str | None:
    """Why there can be no cluster on this machine; None if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--uts", "--mount", "true"], check=False).returncode:
        return "nodes with names of their own need root, and a container that may unshare(1)"
    return None


class Job(NamedTuple):
    """A job that was submitted, or a task of an array (`12_3`)."""

    cluster: Cluster
    number: str
    folder: Path

    def fact(self, name: str) -> str:
        """A field of `scontrol show job`."""
        text = self.cluster.ask("scontrol", "show", "job", "--oneliner", self.number)
        return next(word.partition("=")[2] for word in text.split() if word.startswith(f"{name}="))

    def text(self) -> str:
        log = self.folder / f"madpo-{self.fact('JobId')}.out"
        return log.read_text() if log.exists() else ""

    def wait_for(self, words: str, life: str = "0", seconds: float = 60) -> Job:
        """Wait until the log has these words, in this life of the job."""
        self._wait(lambda: words in self._text_of(life), f"no {words!r} in life {life}", seconds)
        return self

    def _text_of(self, life: str) -> str:
        return self.text().partition(f"life {life} of job {self.number} on ")[2]

    def wait(self, state: str = "COMPLETED", seconds: float = 90) -> str:
        """Wait until the job has ended; its log."""
        self._wait(lambda: self.fact("JobState") in ENDED and not self._in_queue(), "it never ended", seconds)
        assert self.fact("JobState") == state, f"{self.fact('JobState')}\n{self.text()}"
        return self.text()

    def signal(self, name: str) -> None:
        """Signal the script of the job, as Slurm does before the time limit."""
        self.cluster.ask("scancel", "--batch", f"--signal={name}", self.number)

    def _in_queue(self) -> bool:
        """Whether processes may be left of it."""
        return bool(self.cluster.ask("squeue", "--noheader", "--jobs", self.number))

    def _wait(self, what: Callable[[], bool], otherwise: str, seconds: float) -> None:
        wait_until(what, seconds, lambda: f"{otherwise}\n{self.cluster.ask('squeue')}\n{self.text()}")


class Cluster:
    """Nodes with GPUs (the first partition) and without (partition `cpu`)."""

    def __init__(self, folder: Path, gpu_nodes: int, cpu_nodes: int) -> None:
        self.folder = folder
        name = f"m{secrets.token_hex(3)}"  # nodes' names are also those of control groups of the machine
        names = [f"{name}x{number}" for number in range(1, gpu_nodes + cpu_nodes + 1)]
        self.gpu_nodes, self.cpu_nodes = names[:gpu_nodes], names[gpu_nodes:]
        self.config = folder / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.config), "PATH": _path()}
        self._ports = dict(zip(["", *names], _free_ports(1 + len(names)), strict=True))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def ask(self, *command: str, env: dict[str, str] | None = None) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=env or self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *arguments: str, folder: Path, env: dict[str, str] | None = None) -> Job:
        """`sbatch` with these arguments, in a folder."""
        command = "sbatch", "--parsable", f"--chdir={folder}", *arguments
        return Job(self, self.ask(*command, env={**self.env, **(env or {})}), folder)

    def crash(self, node: str) -> None:
        """End everything on a node at once, as a power cut does, and let Slurm know it without a timeout."""
        for process in self._processes_of(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._daemons.pop(node).wait()
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=crash")

    def revive(self, node: str) -> None:
        self._start_node(node)
        wait_until(lambda: self._is_back(node), 30, self._logs)

    def _is_back(self, node: str) -> bool:
        """Whether the node answers; it is put back into service if it is not yet."""
        state = self.ask("sinfo", "--noheader", f"--nodes={node}", "--format=%t")
        if "down" in state:
            self.ask("scontrol", "update", f"nodename={node}", "state=resume")
        return state == "idle"

    def cancel(self) -> None:
        """End the jobs that are left."""
        self.ask("scancel", "--user=root")
        wait_until(lambda: not self.ask("squeue", "--noheader"), 20, lambda: self.ask("squeue"))

    def processes(self) -> list[psutil.Process]:
        """Every process that the cluster has started, and what those have."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            is_dead = process.status() == psutil.STATUS_ZOMBIE
            return not is_dead and process.environ().get("SLURM_CONF") == str(self.config)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def _processes_of(self, node: str) -> list[psutil.Process]:
        def space(pid: int) -> str:
            with suppress(OSError):
                return os.readlink(f"/proc/{pid}/ns/uts")
            return ""

        own = space(self._daemons[node].pid)
        return [process for process in self.processes() if space(process.pid) == own]

    def start(self) -> None:
        for name in ("state", "spool", "dev", "munge"):
            (self.folder / name).mkdir(mode=0o755)
        (self.folder / "munge").chmod(0o711)
        for gpu in range(GPUS):  # Slurm wants devices; they are never opened
            (self.folder / "dev" / f"gpu{gpu}").symlink_to("/dev/null")
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"127.0.0.1 {node}\n" for node in self._nodes())
        )
        self._write_config()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = "key-file", "socket", "pid-file", "log-file", "seed-file"
        options = [f"--{file}={self.folder}/munge/{file.removesuffix('-file')}" for file in files]
        self._start("munged", "munged", "--foreground", "--num-threads=2", *options)
        wait_until((self.folder / "munge" / "socket").exists, 20, self._logs)
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for node in self._nodes():
            self._start_node(node)
        wait_until(self._is_up, 30, self._logs)

    def stop(self) -> None:
        """End the jobs and the daemons. Fails if any process of theirs is left."""
        with suppress(AssertionError):
            self.cancel()
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(patient(10))
        with suppress(AssertionError):
            wait_until(lambda: not self.processes(), 10, str)
        left = self.processes()
        for process in left:
            process.kill()
        for node in self._nodes():
            for group in sorted(FREEZER.glob(f"slurm_{node}/**/"), reverse=True):
                with suppress(OSError):
                    group.rmdir()
        assert not left, left

    def _nodes(self) -> list[str]:
        return [*self.gpu_nodes, *self.cpu_nodes]

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=output, stderr=output, preexec_fn=_end_with_parent
            )

    def _start_node(self, node: str) -> None:
        inside = f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -D -N {node}"
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._start(node, "unshare", "--uts", "--mount", "sh", "-c", inside)

    def _is_up(self) -> bool:
        with suppress(AssertionError):
            states = self.ask("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
            return sorted(states) == sorted(f"{node} idle" for node in self._nodes())
        return False

    def _logs(self) -> str:
        files = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        return "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in files)

    def _write_config(self) -> None:
        folder = self.folder
        # Without the control group, processes that have left their parents outlive a job.
        tracking = "cgroup" if os.access(FREEZER / "cgroup.procs", os.W_OK) else "linuxproc"
        gpus = f"Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]"
        (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName={','.join(self.gpu_nodes)} {gpus}\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        nodes = "".join(
            f"NodeName={node} NodeAddr=127.0.0.1 Port={self._ports[node]} CPUs={CPUS} RealMemory=4000"
            f"{f' Gres=gpu:{GPUS}' if node in self.gpu_nodes else ''}\n"
            for node in self._nodes()
        )
        here = socket.gethostname()
        self.config.write_text(f"""\
ClusterName=madpo
SlurmctldHost={here}(127.0.0.1)
SlurmctldPort={self._ports[""]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0,defer_batch=0
PriorityType=priority/basic
KillWait=5
SlurmctldTimeout=5
SlurmdTimeout=60
InactiveLimit=0
MinJobAge=3600
MessageTimeout=10
BatchStartTimeout=10
{nodes}\
PartitionName=gpu Nodes={",".join(self.gpu_nodes)} Default=YES MaxTime=INFINITE State=UP
PartitionName=cpu Nodes={",".join(self.cpu_nodes)} MaxTime=INFINITE State=UP
""")


@contextmanager
def slurm_cluster(gpu_nodes: int = 2, cpu_nodes: int = 2) -> Iterator[Cluster]:
    """Context manager: a cluster that is up while inside."""
    with TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder, ExitStack() as stack:
        Path(folder).chmod(0o755)
        cluster = Cluster(Path(folder), gpu_nodes, cpu_nodes)
        stack.callback(cluster.stop)
        cluster.start()
        yield cluster


def wait_until(what: Callable[[], Any], seconds: float, otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + patient(seconds)
    while not what():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.1)


def _free_ports(count: int) -> Sequence[int]:
    """Ports that nobody uses, and that no program is given that asks for any."""
    found: list[int] = []
    for port in random.sample(range(10000, 20000), 1000):
        with socket.socket() as each, suppress(OSError):
            each.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _end_with_parent() -> None:
    """A killed test run takes its daemons along."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
