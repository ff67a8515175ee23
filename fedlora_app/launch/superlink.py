"""A Flower SuperLink that lives as long as a ``with`` block and leaves nothing behind.

``flwr run`` on its own starts a SuperLink that stays, and reinstalls the app's
dependencies for every run. The one here has its own port and Flower home, uses the
Python environment it is started from, and ends with everything it started: ServerApp,
SuperNodes, Ray.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import psutil

from fedlora_app.launch.cluster import HOOK
from fedlora_app.launch.copies import Copies, search_path
from fedlora_app.launch.ports import free_port
from fedlora_app.launch.processes import die_with
from fedlora_app.launch.ray_head import RayHead

Scalar = bool | int | float | str

PROGRAM = "flower-superlink"

MARK = "FEDLORA_RUN"
"""Environment variable that every process of a SuperLink inherits."""

POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
"""Environment variable: seconds between two looks of a SuperLink's executor for a new run."""


class SuperLinkError(RuntimeError):
    """A SuperLink could not start, or a command to it failed."""


class RunStatus(NamedTuple):
    """Where a run stands."""

    status: str
    """``pending``, ``starting``, ``running``, ``finished:completed``, ``finished:failed`` …"""
    details: str
    """Why it failed, where Flower knows."""

    @property
    def completed(self) -> bool:
        """Whether the run ended as it should."""
        return self.status == "finished:completed"


class SuperLink:
    """Start a SuperLink, submit runs to it, and end all its processes on exit.

    Parameters
    ----------
    simulation : bool (default: False)
        Simulate the SuperNodes of a run with Ray; otherwise real SuperNodes connect,
        for example those of ``start_supernode``.
    ray_address : str (default: "")
        Simulate on the Ray cluster with this address, and leave it running at the end;
        empty: on a Ray of its own.
    timeout : float (default: 60)
        Seconds the SuperLink may take to come up.
    copies : Copies, optional
        Starts everything as copies of a process that has imported it (default: every process
        is a new Python).
    ray_head : RayHead, optional
        Simulate on this Ray (default: Flower starts one for each run).
    environment : Mapping[str, str], optional
        What the environment of runs is to have more.
    host : str (default: "127.0.0.1")
        This machine's address that it listens on.
    wait : bool (default: True)
        Whether entering it waits until it has come up; otherwise the first run does.

    Examples
    --------
    >>> with SuperLink(simulation=True) as link:  # doctest: +SKIP
    ...     run_id = link.run(Path("."), {"rounds": 3}, {"num-supernodes": 4})
    ...     for line in link.stream(run_id):
    ...         print(line)
    ...     print(link.status(run_id))
    """

    def __init__(
        self,
        *,
        simulation: bool = False,
        ray_address: str = "",
        timeout: float = 60,
        copies: Copies | None = None,
        ray_head: RayHead | None = None,
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        wait: bool = True,
    ) -> None:
        self.simulation = simulation
        self.ray_address = ray_address
        self.timeout = timeout
        self.copies = copies
        self.ray_head = ray_head
        self.environment = dict(environment or {})
        self.wait = wait
        self.address = f"{host}:{free_port()}"
        # Not below TMPDIR, which may be long: Ray keeps its sockets in here, and the path
        # of a socket ends at 107 characters.
        self.home = Path(tempfile.mkdtemp(prefix="fedlora-", dir="/tmp"))
        self.log_file = self.home / "superlink.log"
        self._mark = uuid.uuid4().hex
        self._sessions: set[int] = set()
        self._children: list[subprocess.Popen[bytes]] = []
        self._coming_up: subprocess.Popen[bytes] | None = None

    @classmethod
    def at(cls, address: str, home: Path) -> SuperLink:
        """Return a SuperLink that another process has started, to submit runs to.

        Parameters
        ----------
        address, home
            Those attributes of that process's.
        """
        link = cls()
        link.home.rmdir()  # its own
        link.address, link.home, link.log_file = address, home, home / "superlink.log"
        return link

    def __enter__(self) -> SuperLink:
        try:
            self._start()
            if self.wait:
                self._come_up()
        except BaseException:  # Ctrl-C as well: __exit__ is not called for a failed __enter__
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self,
        project: Path,
        run_config: Mapping[str, Scalar] | None = None,
        federation_config: Mapping[str, Scalar] | None = None,
    ) -> int:
        """Submit the Flower app in ``project`` and return the id of its run.

        Parameters
        ----------
        project : Path
            Folder with the app's ``pyproject.toml``.
        run_config : Mapping[str, Scalar] | None (default: None)
            Flat overrides of ``[tool.flwr.app.config]``, which must have these keys.
        federation_config : Mapping[str, Scalar] | None (default: None)
            Options of a simulation, such as ``num-supernodes``.
        """
        self._come_up()
        command = ["run", str(project), "link"]
        if run_config:
            # On the command line Flower splits values at blanks. JSON's scalars are TOML's.
            file = self.home / "run.toml"
            lines = (f'"{k}" = {json.dumps(v)}\n' for k, v in run_config.items())
            file.write_text("".join(lines), encoding="utf-8")
            command += ["--run-config", str(file)]
        if federation_config:
            pairs = (f"{k}={json.dumps(v)}" for k, v in federation_config.items())
            command += ["--federation-config", " ".join(pairs)]
        return int(self._flwr(*command)["run-id"])

    def stream(self, run_id: int) -> Iterator[str]:
        """Yield the lines of a run's log as they come, until the run ends.

        The end of the stream does not say how the run ended; ``status`` does.
        """
        process = subprocess.Popen(
            self._command("flwr", "log", str(run_id), "link", "--stream"),
            env=self._environment() | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        with process:
            try:
                for line in process.stdout or ():
                    yield line.rstrip("\n")
            finally:
                process.terminate()

    def status(self, run_id: int) -> RunStatus:
        """Return where a run stands."""
        run = self._flwr("list", "link", "--run-id", str(run_id))["runs"][0]
        return RunStatus(run["status"], run["status-details"])

    def stop(self, run_id: int) -> None:
        """Stop a run."""
        self._flwr("stop", str(run_id), "link")

    def start_supernode(
        self,
        node_config: str = "",
        *,
        warm: bool = False,
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a real SuperNode that connects to this SuperLink.

        Parameters
        ----------
        node_config : str (default: "")
            What the node knows of itself, such as ``"partition-id=0 max-rank=8"``.
        warm : bool (default: False)
            Import what clients need once and not for every message (``fedlora_app.supernode``).
        options : sequence of str (default: none)
            More of its command line.
        prefix : sequence of str (default: none)
            What the command line begins with, such as ``ip netns exec``.
        """
        name = f"supernode-{len(self._children)}"
        program = [sys.executable, "-m", "fedlora_app.supernode"] if warm else ["flower-supernode"]
        command = [*prefix, *program, "--insecure", "--superlink", self.address]
        command += ["--host", "127.0.0.1", "--port", str(free_port()), *options]
        if node_config:
            command += ["--node-config", node_config]
        # A home each, as on machines of their own: they install the same app at the same time.
        with (self.home / f"{name}.log").open("wb") as log:
            return self._spawn(command, log, home=self.home / name)

    def processes(self) -> list[psutil.Process]:
        """Return the processes of this SuperLink that are alive."""
        # Two ways to find them, because each has gaps: Flower detaches processes into sessions
        # of their own, and Ray's workers overwrite their environment with their title.
        everyone = list(psutil.process_iter())
        for process in everyone:
            with suppress(psutil.Error, OSError):  # gone, a zombie, or not ours to look at
                if process.environ().get(MARK) == self._mark:
                    self._sessions.add(os.getsid(process.pid))
        alive = []
        for process in everyone:
            with suppress(psutil.Error, OSError):
                zombie = process.status() == psutil.STATUS_ZOMBIE
                if os.getsid(process.pid) in self._sessions and not zombie:
                    alive.append(process)
        return alive

    def close(self) -> None:
        """End every process of this SuperLink and remove its files."""
        # Twice killed, because a process can start another while it is being stopped.
        for stop in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    stop(process)
            deadline = time.monotonic() + 3
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.1)
        for child in self._children:
            child.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def log_tail(self, lines: int = 20) -> str:
        """Return the end of the SuperLink's own log."""
        if not self.log_file.exists():
            return ""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _start(self) -> None:
        host, port = self.address.split(":")
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "link"\n\n'
            f'[superlink.link]\naddress = "{self.address}"\ninsecure = true\n',
            encoding="utf-8",
        )
        if shutil.which(PROGRAM, path=search_path()) is None:
            raise SuperLinkError(
                f"no program {PROGRAM} beside {sys.executable} or on PATH: install flwr there"
            )
        command = self._command(PROGRAM, "--insecure", "--isolation", "subprocess")
        command += ["--disable-runtime-dependency-installation", "--host", host, "--port", port]
        if self.simulation:
            command.append("--simulation")
        with self.log_file.open("wb") as log:
            self._coming_up = self._spawn(command, log)

    def _come_up(self) -> None:
        """Wait until it answers, if it has not yet."""
        process = self._coming_up
        if process is None:
            return
        deadline = time.monotonic() + self.timeout
        while not self._healthy():
            if (code := process.poll()) is not None:
                raise SuperLinkError(f"{PROGRAM} ended with code {code}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise SuperLinkError(
                    f"{PROGRAM} did not answer on {self.address} within "
                    f"{self.timeout:g} s:\n{self.log_tail()}"
                )
            time.sleep(0.05)
        self._coming_up = None

    def _healthy(self) -> bool:
        connection = HTTPConnection(self.address, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def _flwr(self, *command: str) -> dict[str, Any]:
        """Run a command of Flower's CLI and return its JSON answer."""
        done = subprocess.run(
            self._command("flwr", *command, "--format", "json"),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            check=False,
        )
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {"error-message": done.stdout + done.stderr}
        if not answer.get("success"):
            reason = str(answer.get("error-message", done.stdout)).strip()
            raise SuperLinkError(f"flwr {command[0]} failed: {reason}")
        return answer

    def _command(self, name: str, *arguments: str) -> list[str]:
        return self.copies.command(name, *arguments) if self.copies else [name, *arguments]

    def _spawn(
        self, command: list[str], log: IO[bytes], home: Path | None = None
    ) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        child = subprocess.Popen(
            command,
            env=self._environment(home),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end the rest in order
            preexec_fn=(lambda: die_with(parent)) if sys.platform == "linux" else None,
        )
        self._children.append(child)
        return child

    def _environment(self, home: Path | None = None) -> dict[str, str]:
        # This machine is not reached through a proxy that the caller may have.
        no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        here = f"127.0.0.1,{self.address.rpartition(':')[0]}"
        no_proxy = f"{no_proxy},{here}" if no_proxy else here
        environment = os.environ | {
            MARK: self._mark,
            "PATH": search_path(),  # Flower finds its own commands through it
            "FLWR_HOME": str(home or self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            POLL: "0.1",  # both are on this machine
            **self.environment,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        if self.ray_address:
            environment |= {"RAY_ADDRESS": self.ray_address, "RAY_RUNTIME_ENV_HOOK": HOOK}
            return environment
        if self.copies:
            environment |= self.copies.environment()
        if self.ray_head is not None and self.ray_head.address:
            return environment | {"RAY_ADDRESS": self.ray_head.address}
        # Ray would attach to a cluster of this machine that it finds in either of them.
        environment.pop("RAY_ADDRESS", None)
        return environment | {"RAY_TMPDIR": str(self.home)}
