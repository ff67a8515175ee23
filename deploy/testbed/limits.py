"""How much of the machine's cores a node may use: control groups of Linux, version 1 or 2."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from deploy.testbed.links import PREFIX, LinkError

GROUPS = Path("/sys/fs/cgroup")
PERIOD = 100_000  # microseconds


def limit(name: str, pid: int, cores: float) -> None:
    """Limit a process, and those it will start, to so many cores.

    Raises
    ------
    LinkError
        If this machine has no control group for it.
    """
    root = next(_roots(), None)
    if root is None:
        raise LinkError(f"expected a control group for cores at {GROUPS}, there is none; leave "
                        "out --cores, and every node has one thread")  # fmt: skip
    group = root / f"{PREFIX}-{name}"
    quota = max(round(cores * PERIOD), 1000)
    try:
        group.mkdir()
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {PERIOD}")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise LinkError(f"{group} cannot be used: {error}") from error


def unlimit() -> None:
    """Remove all of our groups; their processes must be gone."""
    for root in _roots():
        for group in root.glob(f"{PREFIX}-*"):
            for _ in range(20):
                with suppress(OSError):  # busy: one is not reaped yet
                    group.rmdir()
                if not group.exists():
                    break
                time.sleep(0.1)


def _roots() -> Iterator[Path]:
    for root, file in ((GROUPS, "cgroup.controllers"), (GROUPS / "cpu", "cpu.cfs_quota_us")):
        if not (root / file).exists():
            continue
        if file != "cgroup.controllers" or "cpu" in (root / file).read_text().split():
            yield root
