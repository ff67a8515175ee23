"""A SuperLink and SuperNodes on the links of a testbed, which are gone when it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy.testbed import limits, links
from deploy.testbed.links import HOST, Link, LinkError, Network
from fedlora_app.launch.copies import Copies
from fedlora_app.launch.superlink import SuperLink

STATE = Path(tempfile.gettempdir()) / "fedlora-testbed.json"
MARK = "FEDLORA_TESTBED"
TABLE = "links.csv"  # in the SuperLink's home: what an ``HTBAllocator`` reads
PATIENCE = 120.0  # seconds until every SuperNode has its number


@dataclass(frozen=True)
class Setting:
    """What a testbed is made of.

    Parameters
    ----------
    links : Sequence[Link]
        One a node.
    shaped : bool
        Whether they are made; else all are on loopback.
    down_mbit : float
        What each node downloads with.
    cores : float
        What the fastest node may use of this machine's cores; 0: no limit but one thread.
    poll : float
        Seconds between two looks of a SuperNode at the SuperLink.
    data : Path, optional
        Folder with one csv file a node; else they share out ``data.name``.
    """

    links: Sequence[Link]
    shaped: bool = True
    down_mbit: float = 100.0
    cores: float = 0.0
    poll: float = 0.5
    data: Path | None = None


class Testbed:
    """Everything of a testbed, from ``with`` to its end.

    Parameters
    ----------
    setting : Setting
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.network = Network(setting.links, setting.down_mbit)
        self.mark = f"{os.getpid()}-{time.time_ns()}"
        self.nodes: list[str] = []
        self._watchdog: tuple[int, int] | None = None

    def __enter__(self) -> Testbed:
        if running():
            raise LinkError(f"a testbed is up already ({STATE}); take it down first")
        if self.setting.shaped:
            links.require_root()
            if left := links.namespaces():
                raise LinkError(f"a testbed has left {left[0]} …; take it down first")
        self.copies = Copies()
        self.link = SuperLink(
            host=HOST if self.setting.shaped else "127.0.0.1",
            environment={MARK: self.mark, "OMP_NUM_THREADS": "1"},
            copies=self.copies,
        )
        self._watch()
        try:
            if self.setting.shaped:
                self.network.make()
            self.copies.__enter__()
            self.link.__enter__()
            self._start_nodes()
            self.write()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self) -> None:
        """Write down what is up, for ``run`` and ``down`` elsewhere."""
        if self.setting.shaped:
            self.network.write(self.link.home / TABLE, self.nodes)
        state = {
            "pid": os.getpid(),
            "mark": self.mark,
            "address": self.link.address,
            "home": str(self.link.home),
            "nodes": self.nodes,
            "links": [asdict(link) for link in self.network.links],
            "shaped": self.setting.shaped,
            "down_mbit": self.setting.down_mbit,
        }
        STATE.write_text(json.dumps(state), encoding="utf-8")

    def close(self) -> None:
        """End every process, and remove every link and file."""
        self.link.close()
        self.copies.__exit__(None, None, None)
        _remove(self.mark, self.link.home)
        if self._watchdog is not None:
            pid, pipe = self._watchdog
            os.close(pipe)
            os.waitpid(pid, 0)
            self._watchdog = None

    def _start_nodes(self) -> None:
        count = len(self.setting.links)
        tables = sorted(self.setting.data.glob("*.csv")) if self.setting.data else []
        if self.setting.data and len(tables) != count:
            raise LinkError(f"expected {count} csv files in {self.setting.data}, got {len(tables)}")
        for i, link in enumerate(self.setting.links):
            config = f"partition-id={i} num-partitions={count}"
            if tables:
                config = f'data-path="{tables[i].resolve()}"'
            node = self.link.start_supernode(
                config,
                warm=True,
                options=["--poll", str(self.setting.poll)],
                prefix=self.network.inside(i) if self.setting.shaped else (),
            )
            if self.setting.cores:
                limits.limit(f"{i:03}", node.pid, self.setting.cores * link.speed)
        logs = [self.link.home / f"supernode-{1 + i}.log" for i in range(count)]
        until = time.monotonic() + PATIENCE
        while len(self.nodes) < count:
            found = [re.search(r"SuperNode ID: (\d+)", log.read_text()) for log in logs]
            if all(found):
                self.nodes = [match[1] for match in found if match]
                return
            if time.monotonic() > until:
                silent = logs[found.index(None)]
                raise LinkError(f"a SuperNode did not start within {PATIENCE:g} s:\n"
                                f"{silent.read_text()[-2000:]}")  # fmt: skip
            time.sleep(0.2)

    def _watch(self) -> None:
        """Start the process that takes all of it down if this one is killed."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(reader)
            self._watchdog = pid, writer
            return
        code = 0
        try:
            os.close(writer)
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            os.read(reader, 1)  # until the other end is closed, however that comes
            _remove(self.mark, self.link.home)
            shutil.rmtree(self.copies.folder, ignore_errors=True)
        except BaseException as error:
            print(f"testbed: not all is taken down: {error!r}", file=sys.stderr)
            code = 1
        os._exit(code)


def running() -> dict[str, Any] | None:
    """Return what ``write`` wrote of a testbed that is up."""
    state = _written()
    return state if state and psutil.pid_exists(int(state["pid"])) else None


def _written() -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(STATE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state


def take_down() -> list[str]:
    """End a testbed, or what one that was killed has left; return what there was."""
    found = []
    if state := running():
        pid = int(state["pid"])
        found.append(f"process {pid}")
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            process.terminate()
            with suppress(psutil.TimeoutExpired):
                process.wait(30)
    if left := _written():
        _remove(str(left["mark"]), Path(str(left["home"])))
    found += links.take_down()
    limits.unlimit()
    STATE.unlink(missing_ok=True)
    return found


def _remove(mark: str, home: Path) -> None:
    """End the processes with a mark, and remove all that a testbed makes."""
    for stop in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
        marked = _marked(mark)
        for process in marked:
            with suppress(psutil.Error):
                stop(process)
        psutil.wait_procs(marked, timeout=3)
    links.take_down()
    limits.unlimit()
    shutil.rmtree(home, ignore_errors=True)
    if _written().get("mark") == mark:
        STATE.unlink(missing_ok=True)


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found.append(process)
    return found
