"""How much memory a client's training takes, by what it does at the time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

PHASES = ("load", "forward", "backward", "optimizer")  # the last ends a step

FIRST_STEPS = 2  # the optimiser's states come with the first

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PhaseMemory:
    """Peak memory in MB (of 1e6 bytes) by phase, over all that was looked at.

    On a GPU what torch has allocated there; else the resident memory of the whole process, with
    all it has imported. Where Linux does not let a process forget its peak, and elsewhere, a phase
    has the largest peak of the process so far. Looked at are the first two steps and every batch
    that is larger than those before: a look takes some 30 microseconds.

    Parameters
    ----------
    device : torch.device
        Where the model is.

    Attributes
    ----------
    peaks : dict of str to float
        ``memory_<phase>_mb`` of the phases so far, as a client reports them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, float] = {}
        self._steps, self._largest, self._larger = 0, -1, True

    def batch(self, size: int) -> None:
        """Look at the phases of a batch, of ``size`` values, if it may be the largest."""
        self._larger = size > self._largest
        self._largest = max(size, self._largest)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the peak of the block."""
        if not (self._larger or self._steps < FIRST_STEPS):
            yield
            return
        self._forget()
        try:
            yield
        finally:
            key, peak = f"memory_{name}_mb", self._peak()
            if peak is not None:
                self.peaks[key] = max(self.peaks.get(key, 0.0), round(peak / 1e6, 1))
            self._steps += name == PHASES[-1]

    def _forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # no Linux, or a container that forbids it
                _CLEAR.write_bytes(b"5")

    def _peak(self) -> float | None:
        """Return the peak in bytes since it was forgotten; None where nobody knows."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        with suppress(OSError, ValueError, IndexError):
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return 1024.0 * float(line.split()[1])
        with suppress(ImportError):
            import resource

            most = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            return most if sys.platform == "darwin" else 1024 * most
        return None
