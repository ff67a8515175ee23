"""A process that imports what others need, once, and is copied (``fork``) for each of them.

    python -m fedlora_app.launch.copies FILE MODULE,… LATER,…

torch, transformers and PEFT take seconds to import, and a simulation starts many processes that
need them: the check before it, Flower's simulation, one worker a core. Each of them is a process of
its own, with its own environment and app; what was imported is shared. ``ask`` is the
other side, and ``Copies`` starts it all.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from fedlora_app.launch.ask import FORWARDED, NUMBER
from fedlora_app.launch.processes import die_with

MODELS = (
    "torch",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
)
"""What building a model imports, the packaged models' own modules among it."""

LATER = (
    "flwr_datasets.partitioner",  # where no run before drew the same shares
    "flwr.superlink.main",
    "flwr.supercore.cli.flower_superexec",
    "flwr.cli.app",
    "flwr.simulation.app",
    "flwr.serverapp",
    "flwr.clientapp",
    "flwr.client",
    "sklearn.metrics",
)
"""What is imported while nobody asks; neither an app, which every copy brings along, nor Ray,
which takes its settings from the environment when it is imported."""

COMMANDS = ("flower-superexec", "flwr-simulation", "flwr-serverapp")
"""What a SuperLink starts through PATH."""

HOOK = "fedlora_app.launch.copies.with_copies"
"""Value of ``RAY_RUNTIME_ENV_HOOK`` that has Ray's workers start as copies."""

PLACE = "FEDLORA_COPIES"
"""The environment variable with the socket's path."""

APP = ("fedlora_app", "strategies")
ASK = Path(__file__).with_name("ask.py")


class Copies:
    """Starts Python programs as copies; a context manager that ends with all of them.

    On anything but Linux programs start as ever: there a copy is missing or not sound.

    Parameters
    ----------
    preload, later : sequence of str
        Modules to import before the first copy is made, and while nobody asks for one
        (default: ``MODELS`` and ``LATER``).
    """

    def __init__(self, preload: Sequence[str] = MODELS, later: Sequence[str] = LATER) -> None:
        self._modules = (",".join(preload), ",".join(later))
        self.folder = Path(tempfile.mkdtemp(prefix="fedlora-", dir="/tmp"))  # a short path
        self._socket = str(self.folder / "copies")
        self._original: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Copies:
        if sys.platform == "linux":
            here, parent = str(Path(__file__).parents[2]), os.getpid()
            places = [here, os.environ.get("PYTHONPATH", "")]
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(self._socket)  # here, so that who asks at once waits in the queue
                listener.listen(128)
                number = str(listener.fileno())
                self._original = subprocess.Popen(
                    [sys.executable, "-m", "fedlora_app.launch.copies", number, *self._modules],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,
                    preexec_fn=lambda: die_with(parent),
                )
            self._shadow_commands()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._original is not None:
            self._original.kill()  # and all copies with it
            self._original.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """Number of the process that is copied; 0 without one."""
        return self._original.pid if self._original else 0

    def command(self, script: str, *arguments: str) -> list[str]:
        """Return the command that runs a script, one on PATH, or (``-m``) a module."""
        found = script if script == "-m" else shutil.which(script, path=search_path()) or script
        if self._original is None:
            return [sys.executable, found, *arguments]
        return [sys.executable, str(ASK), self._socket, found, *arguments]

    def environment(self) -> dict[str, str]:
        """Return what has a SuperLink, and Ray under it, start copies too."""
        if self._original is None:
            return {}
        places = os.pathsep.join([str(self.folder), search_path()])
        return {"PATH": places, PLACE: self._socket, "RAY_RUNTIME_ENV_HOOK": HOOK}

    def _shadow_commands(self) -> None:
        for name in COMMANDS:
            shadow = self.folder / name
            words = " ".join(map(shlex.quote, self.command(name)))
            shadow.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
            shadow.chmod(0o700)


def with_copies(runtime_env: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a Ray runtime environment whose workers are copies."""
    words = [sys.executable, str(ASK), os.environ[PLACE]]
    return dict(runtime_env or {}) | {"py_executable": " ".join(map(shlex.quote, words))}


def search_path() -> str:
    """Return PATH with the commands of this Python in front, activated or not."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def preload(names: Sequence[str]) -> None:
    """Import modules, and make them cheap to share."""
    # A CUDA driver that was asked before the copy was made would not work in it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in filter(None, names):
        if name == "peft" and _has_cuda() and find_spec("bitsandbytes") is not None:
            continue  # it imports bitsandbytes, which asks each GPU what it can do
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a module raises; who needs it will see it again
            print(f"warm start: cannot preload {name}: {error!r}", file=sys.stderr)
    gc.collect()
    gc.freeze()  # a collection in a copy would write to every page of it


def _has_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.backends.cuda.is_built()


def _fork() -> int:
    # One thread there is, of pyarrow's allocator, which knows forks; from 3.12 Python warns of any.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return os.fork()


def spoiled() -> bool:
    """Return whether a copy of this process could not use a GPU: one was asked from here.

    What was asked is known to copies alone, so one is made to say it.
    """
    if not _has_cuda():
        return False
    copy = _fork()
    if copy == 0:
        os._exit(int(sys.modules["torch"].cuda._is_in_bad_fork()))
    return os.waitpid(copy, 0)[1] != 0


def forget_app() -> None:
    """Have the app imported anew: every message and run brings its own version."""
    for name in [m for m in sys.modules if m.partition(".")[0] in APP]:
        del sys.modules[name]


def reseed() -> None:
    """Give a copy a chance of its own, as a new Python has it."""
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()


def serve(listener: socket.socket, later: Sequence[str] = ()) -> None:
    """Answer requests until killed; returns in every copy, which is to run ``sys.argv``.

    Where something that was imported asked a GPU, there are no copies: all programs start cold.

    Parameters
    ----------
    listener : socket
    later : sequence of str
        Modules to import while there is nothing to do.
    """
    asking: dict[int, socket.socket] = {}
    original, modules, cold = os.getpid(), list(later), spoiled()
    while True:
        # Copies that end are found by looking: rarely, and not before there is one.
        pause = 0 if modules else 0.02 if asking else None
        if select.select([listener], [], [], pause)[0]:
            asked, _ = listener.accept()
            request, files = _read(asked)
            try:
                copy = _fork() if request and not cold else None
            except OSError as error:  # no memory or no room for a process: it starts cold, or not
                print(f"warm start: cannot start a copy: {error}", file=sys.stderr)
                copy = None
            if copy == 0:
                die_with(original)
                listener.close()
                for other in asking.values():
                    other.close()
                _become(asked, request, files)
                return
            for file in files:
                os.close(file)
            _tell(asked, copy or 0)
            if copy:
                asking[copy] = asked
            else:
                asked.close()
        elif modules:
            preload([modules.pop(0)])
            cold = cold or spoiled()
        while asking:
            copy, status = os.waitpid(-1, os.WNOHANG)
            if not copy:
                break
            code = os.waitstatus_to_exitcode(status)
            with asking.pop(copy) as asked:
                _tell(asked, code if code >= 0 else 128 - code)


def run(words: Sequence[str]) -> None:
    """Run a script, or a module after ``-m``, as the program of this process."""
    if words[0] == "-m":
        sys.argv = [words[1], *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(words)
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def _read(asked: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a request and the files that came with it; an empty one from who went away."""
    try:
        size, files, _, _ = socket.recv_fds(asked, NUMBER, 3)
        wanted, data = int.from_bytes(size, "big"), b""
        while len(data) < wanted and (more := asked.recv(wanted - len(data))):
            data += more
        request: dict[str, Any] = json.loads(data) if len(files) == 3 else {}
    except (OSError, ValueError):
        return {}, []
    return request, files


def _tell(asked: socket.socket, number: int) -> None:
    with suppress(OSError):  # it went away, and its copy ends for that
        asked.sendall(number.to_bytes(NUMBER, "big"))


def _become(asked: socket.socket, request: dict[str, Any], files: Sequence[int]) -> None:
    """Turn this copy into what was asked for, but for running it."""
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    first = os.environ.get("PYTHONPATH", "")
    for place in reversed([p for p in first.split(os.pathsep) if p]):
        if place not in sys.path:
            sys.path.insert(1, place)
    forget_app()
    reseed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    sys.argv = request["words"]
    threading.Thread(target=_end_with, args=(asked,), daemon=True).start()


def _end_with(asked: socket.socket) -> None:
    """End this process when the one that asked for it is gone."""
    with suppress(OSError):
        asked.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def main(number: str, first: str = "", later: str = "") -> None:
    """Import and serve a listening socket; what follows in a copy is its program."""
    listener = socket.socket(fileno=int(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Threads would be lacking in a copy, which may start its own.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    preload(first.split(","))
    serve(listener, [name for name in later.split(",") if name])
    run(sys.argv)


if __name__ == "__main__":
    main(*sys.argv[1:])
