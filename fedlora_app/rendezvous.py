"""Clients of a simulation, each in a process of its own, that meet to train in one batch.

Flower's Ray engine hands each process one message and waits for its answer, so clients of a round
never meet in a process. Here they leave their orders in a folder of their machine; whoever comes
first leads: it takes the orders that are there, trains them as one (``together``) on its device,
and leaves the results for the others. Where a leader ends early another one leads.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common import log
from numpy.typing import NDArray

from fedlora_app.models.cache import save_whole

PATIENCE = 0.3
"""Seconds without a new order after which a leader begins with those it has."""

PAUSE = 0.005

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Order:
    """Arrays, and what belongs to them as JSON can say it: what is to be done, or was."""

    arrays: Arrays
    about: dict[str, Any]


Work = Callable[[Sequence[Order]], Sequence[Order]]


class Rendezvous:
    """Where processes of one machine meet; each with one order at a time.

    Parameters
    ----------
    folder : Path
        The same for all who may meet, of this user alone; made if it is not there.
    most : int
        So many orders are done at once, at most.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def done(self, order: Order, work: Work) -> Order | None:
        """Return what ``work`` makes of an order, here or in another process.

        None: it could not be done with others, and is for the caller to do alone.
        """
        name = uuid.uuid4().hex
        mine = self.folder / f"{name}.done"
        self._write(f"{name}.order", order)
        try:
            with (self.folder / "leader").open("w") as lock:
                while not mine.exists():
                    if _taken(lock):
                        try:
                            if not mine.exists():  # the last leader may have done it
                                self._lead(name, work)
                        finally:
                            fcntl.flock(lock, fcntl.LOCK_UN)
                    else:
                        time.sleep(PAUSE)
            found = _read(mine)
            return None if "alone" in found.about else found
        finally:
            for file in (mine, self.folder / f"{name}.order"):
                file.unlink(missing_ok=True)

    def _lead(self, own: str, work: Work) -> None:
        """Do the orders that are here, ``own`` among them, and leave the results."""
        chosen, orders = [], []
        for name in self._gathered(own):
            with suppress(FileNotFoundError):  # who left it was ended, and took it along
                orders.append(_read(self.folder / f"{name}.order"))
                chosen.append(name)
        try:
            results = work(orders)
        except (ValueError, RuntimeError) as error:  # one of them: who, each finds out alone
            log(WARNING, "%s clients train one after the other: %s", len(chosen), error)
            results = [Order({}, {"alone": str(error)})] * len(chosen)
        for name, result in zip(chosen, results, strict=True):
            (self.folder / f"{name}.order").unlink(missing_ok=True)
            self._write(f"{name}.done", result)

    def _gathered(self, own: str) -> list[str]:
        """Return the names of orders, as soon as there are enough or no more come."""
        known: set[str] = set()
        since = time.monotonic()
        while True:
            here = {file.stem for file in self.folder.glob("*.order")}
            if here - known:
                known, since = known | here, time.monotonic()
            if len(here) >= self.most or time.monotonic() - since > PATIENCE:
                return [own, *sorted(here - {own})][: self.most]
            time.sleep(PAUSE)

    def _write(self, name: str, order: Order) -> None:
        arrays = order.arrays or {"": np.zeros(1)}  # a file without an array is none
        save_whole(self.folder / name, arrays, {"about": json.dumps(order.about)})


def of_this_run(most: int) -> Rendezvous | None:
    """Return where the workers of this machine meet in this run; None outside a simulation."""
    import ray

    if most < 2 or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    run = f"{context.gcs_address} {context.get_job_id()}"  # type: ignore[no-untyped-call]
    place = Path(tempfile.gettempdir()) / f"fedlora-together-{os.getuid()}"
    return Rendezvous(place / sha256(run.encode()).hexdigest()[:16], most)


def _taken(lock: Any) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _read(file: Path) -> Order:
    from safetensors import safe_open

    with safe_open(file, "np") as stored:
        arrays = {key: stored.get_tensor(key) for key in stored.keys() if key}  # noqa: SIM118
        return Order(arrays, json.loads(stored.metadata()["about"]))
