"""A real Slurm cluster of this one machine, in a folder of its own, without accounting. Needs root; see install.sh.

By hand: `python tests/slurm/cluster.py start FOLDER` prints the SLURM_CONF to export; `stop FOLDER` ends every process
that was started for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import psutil

CONF = """\
ClusterName=sasa-bench-test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5,bf_interval=5
MaxArraySize=10001
MaxJobCount=20000
ReturnToService=2
SlurmdTimeout=60
SlurmdParameters=config_overrides
KillWait=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """munged, slurmctld and slurmd of one folder. `environment` is what clients need."""

    def __init__(self, folder: Path, cpus: int | None = None) -> None:
        self.folder = folder.absolute()
        self.cpus = cpus or os.cpu_count() or 1
        self.environment = os.environ | {"SLURM_CONF": f"{self.folder}/slurm.conf"}

    def start(self) -> None:
        """Write keys and configuration, start the three daemons, wait until the node is idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        names = {"key-file": key.name, "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={self.folder}/{name}" for option, name in names.items()]
        self._run("munged", "--force", *options, f"--seed-file={self.folder}/munged.seed")
        controller_port, node_port = _free_ports(2)
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=socket.gethostname(),
                folder=self.folder,
                cpus=self.cpus,
                controller_port=controller_port,
                node_port=node_port,
            )
        )
        self.start_controller()
        self.start_node()
        wait_for(lambda: self.node_state() == "idle", 60, "the node is idle")

    def start_controller(self) -> None:
        """Start slurmctld with the state that it saved."""
        self._run("slurmctld")

    def start_node(self) -> None:
        """Start slurmd."""
        self._run("slurmd")

    def kill(self, daemon: str) -> None:
        """End slurmctld or slurmd at once, as a crash does."""
        self._process(daemon).kill()
        wait_for(lambda: not self._alive(daemon), 20, f"{daemon} is dead")

    def kill_controller(self) -> None:
        """End slurmctld at once, as a crash does, but not before it saved which task runs.

        It saves every five seconds. One that forgot the start of a task holds the task before it for running, until
        that one's time limit.
        """
        state = self.folder / "state" / "job_state"

        def saved() -> bool:
            starts = self.run("squeue", "--noheader", "--states=RUNNING", "--format=%S").split()
            return bool(starts) and state.stat().st_mtime >= datetime.fromisoformat(max(starts)).timestamp() + 1

        wait_for(saved, 60, "slurmctld saved which task runs")
        self.kill("slurmctld")

    def kill_node(self) -> None:
        """End slurmd and everything that runs on the node at once, as a power failure does."""
        tasks = [p for step in self._steps() for p in [step, *step.children(recursive=True)]]
        self.kill("slurmd")
        for process in tasks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def give_up_node(self) -> None:
        """Declare the node lost, as the controller does by itself once the node has not answered for long enough."""
        self.run("scontrol", "update", f"NodeName={socket.gethostname()}", "State=DOWN", "Reason=lost")

    def start_at_once(self, job: str) -> None:
        """Wait until `job` was requeued, and spare it the two minutes for which Slurm then holds it back."""
        wait_for(
            lambda: self.run("squeue", "-h", "-j", job, "-o", "%T") in ("PENDING", "RUNNING"), 60, f"{job} requeued"
        )
        with contextlib.suppress(RuntimeError):
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop(self) -> None:
        """End the jobs and the daemons."""
        self.run("scancel", "--user=root", check=False)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self.run("squeue", "--noheader", check=False), 15, "the queue is empty")
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ValueError):
            self.kill_node()
        for daemon in ("slurmctld", "munged"):
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ValueError):
                self._process(daemon).send_signal(signal.SIGTERM)
                self._process(daemon).wait(20)

    def run(self, *command: str, check: bool = True) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def node_state(self) -> str:
        """idle, allocated, down and so on."""
        return self.run("sinfo", "--noheader", "--format=%T", check=False).strip("*~#!%$@^-")

    def state(self) -> str:
        """Tasks and nodes with the reasons that Slurm gives, for an error message."""
        return self.run("squeue", "--array", check=False) + "\n" + self.run("sinfo", "--list-reasons", check=False)

    def running(self) -> list[str]:
        """Tasks that run now."""
        return self.run("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%F_%K").split()

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, timeout=60)

    def _process(self, daemon: str) -> psutil.Process:
        return psutil.Process(int((self.folder / f"{daemon}.pid").read_text()))

    def _alive(self, daemon: str) -> bool:
        try:
            return self._process(daemon).status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, FileNotFoundError, ValueError):
            return False

    def _steps(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if process.info["name"] == "slurmstepd" and self._is_mine(process):
                    found.append(process)
        return found

    def _is_mine(self, process: psutil.Process) -> bool:
        return any(str(self.folder) in opened.path for opened in process.open_files())


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Return when `condition()` holds. Raises TimeoutError that says `what` did not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s, and still not: {what}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    verb, where = sys.argv[1:]
    cluster = Cluster(Path(where))
    if verb == "start":
        cluster.start()
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
    elif verb == "stop":
        cluster.stop()
    else:
        sys.exit(f"{verb}: give start or stop, and a folder")
