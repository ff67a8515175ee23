"""A Ray of this machine that is started before anybody needs it, and serves several runs.

    python -m fedlora_app.launch.ray_head CORES LOGS

starts one, with so many of the machine's cores (0: all), prints its address, and ends with
its standard input.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from types import TracebackType

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers without a job would start cold, and every run makes its own.
    "RAY_prestart_worker_first_driver": "0",
    # Nobody asks for them, and gathering them takes a share of a core.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}


class RayHead:
    """A Ray that starts while other things are done; a context manager that ends with it.

    Parameters
    ----------
    cores : int, optional
        How many it may use (default: all).
    logs : bool
        Whether what workers print reaches the log of a run (default: True).
    """

    def __init__(self, cores: int | None = None, *, logs: bool = True) -> None:
        self._words = [str(cores or 0), str(int(logs))]
        # Not below TMPDIR, which may be long: the path of a socket ends at 107 characters.
        self._folder = tempfile.mkdtemp(prefix="fedlora-", dir="/tmp")
        self._process: subprocess.Popen[str] | None = None
        self._address = ""

    def __enter__(self) -> RayHead:
        environment = os.environ | QUIET | {"RAY_TMPDIR": self._folder}
        for name in ("RAY_ADDRESS", "RAY_RUNTIME_ENV_HOOK"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedlora_app.launch.ray_head", *self._words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            encoding="utf-8",
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.communicate()  # its input ends
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """``host:port``, as soon as it is there; empty if Ray did not start."""
        if self._process is not None and self._process.stdout is not None and not self._address:
            self._address = self._process.stdout.readline().strip()
        return self._address


def main(cores: str, logs: str) -> None:
    """Start a Ray and keep it until the standard input ends."""
    import ray
    from ray._private.node import Node

    # Nothing grows or shrinks here, and who reads no logs need not have them carried.
    for name in ("start_monitor", *(() if int(logs) else ("start_log_monitor",))):
        if hasattr(Node, name):
            setattr(Node, name, lambda self: None)
    ray.init(
        num_cpus=int(cores) or None,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
