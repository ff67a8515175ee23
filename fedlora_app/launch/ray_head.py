"""A Ray of this machine that is started before anybody needs it, and serves several runs.

    python -m fedlora_app.launch.ray_head [CORES]

starts one, with so many of the machine's cores (default: all), prints its address, and ends with
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
}


class RayHead:
    """A Ray that starts while other things are done; a context manager that ends with it.

    Parameters
    ----------
    cores : int, optional
        How many it may use (default: all).
    """

    def __init__(self, cores: int | None = None) -> None:
        self._cores = [str(cores)] if cores else []
        # Not below TMPDIR, which may be long: the path of a socket ends at 107 characters.
        self._folder = tempfile.mkdtemp(prefix="fedlora-", dir="/tmp")
        self._process: subprocess.Popen[str] | None = None
        self._address = ""

    def __enter__(self) -> RayHead:
        environment = os.environ | QUIET | {"RAY_TMPDIR": self._folder}
        for name in ("RAY_ADDRESS", "RAY_RUNTIME_ENV_HOOK"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedlora_app.launch.ray_head", *self._cores],
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


def main(cores: str = "") -> None:
    """Start a Ray and keep it until the standard input ends."""
    import ray

    ray.init(
        num_cpus=int(cores) if cores else None,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
