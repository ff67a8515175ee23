"""Who has the band: told before each round, so that it can be made so.

A share is a part of the whole band, and those of a round sum to one. What a node's rate is on the
whole band is for the one who sets it to know: an access point, a base station, a testbed.
"""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from strategies.naming import Registry

# Seconds that setting shares may take: a round waits for it.
PATIENCE = 10.0
# Of a class whose node has no share: enough for its heartbeats and questions.
LEAST_BITS = 64_000
COLUMNS = ("node", "device", "class", "mbit")


@dataclass(frozen=True)
class Share:
    """What one participant of a round is to have.

    Parameters
    ----------
    client : int
        Its index.
    node : int
        Its node id, as Flower's SuperLink knows it.
    share : float
        Its part of the band, > 0; those of a round sum to 1.
    """

    client: int
    node: int
    share: float


class BandwidthAllocator(ABC):
    """Give each participant its share of the band.

    One of one's own needs ``allocate``. Whatever it raises is logged, and the round goes on as if
    nobody had been given anything.
    """

    name: ClassVar[str] = ""

    @abstractmethod
    def allocate(self, shares: Sequence[Share], server_round: int) -> None:
        """Make it so, before the messages of the round are sent.

        Parameters
        ----------
        shares : Sequence[Share]
            Of everybody who is asked in the round, by client index.
        server_round : int
        """

    def release(self) -> None:  # noqa: B027
        """Give the band back, when a run is over."""

    def summary(self) -> str:
        """Return it and its settings in one line."""
        return self.name


class CommandAllocator(BandwidthAllocator):
    """Call a command of the user's, with the shares as JSON on its standard input.

    It gets ``{"round": 3, "shares": [{"client": 0, "node": "123…", "share": 0.25}, …]}``, and
    ``{"round": null, "shares": []}`` when the run is over.

    Parameters
    ----------
    command : str
        With its arguments, as a shell splits them; no shell is run.

    Raises
    ------
    ValueError
        If there is no command.
    """

    name: ClassVar[str] = "command"

    def __init__(self, command: str) -> None:
        self.command = shlex.split(command)
        if not self.command:
            raise ValueError(
                "expected a command that sets the shares of the band, got none; for example "
                "'/usr/local/bin/set-shares --interface wlan0'"
            )

    def allocate(self, shares: Sequence[Share], server_round: int) -> None:
        """Run the command.

        Raises
        ------
        RuntimeError
            If it cannot be run, fails, or takes longer than ten seconds.
        """
        told = [{"client": s.client, "node": str(s.node), "share": s.share} for s in shares]
        _run(self.command, json.dumps({"round": server_round, "shares": told}))

    def release(self) -> None:
        """Run the command without shares."""
        _run(self.command, json.dumps({"round": None, "shares": []}))

    def summary(self) -> str:
        """Return it and its settings in one line."""
        return f"{self.name} ({self.command[0]})"


class HTBAllocator(BandwidthAllocator):
    """Set the rate of HTB classes of Linux' traffic control: an access point, or a testbed.

    ``tc class change`` for each class; needs root, or the capability ``CAP_NET_ADMIN``.

    Parameters
    ----------
    links : str or Path
        A csv file with the columns ``node`` (its id), ``device``, ``class`` (``1:10``), ``mbit``
        (its rate on the whole band, Mbit/s), and, where the device is in a network namespace,
        ``netns``. Read before each round: it may change, or come later.

    Raises
    ------
    ValueError
        If no file is named.
    """

    name: ClassVar[str] = "htb"

    def __init__(self, links: str | Path) -> None:
        if not str(links):
            raise ValueError(
                f"expected a csv file of links with the columns {', '.join(COLUMNS)}, got none"
            )
        self.links = Path(links).expanduser()

    def allocate(self, shares: Sequence[Share], server_round: int) -> None:
        """Set a class for every node of the file; who has no share gets 64 kbit/s.

        Raises
        ------
        OSError, ValueError or RuntimeError
            If the file cannot be used, or ``tc`` fails.
        """
        wanted = {str(s.node): s.share for s in shares}
        rows = self._rows()
        if unknown := wanted.keys() - {row["node"] for row in rows}:
            raise ValueError(f"{self.links}: no link of node {', '.join(sorted(unknown))}")
        self._set(rows, wanted)

    def release(self) -> None:
        """Give every node of the file an equal share."""
        rows = self._rows()
        self._set(rows, {row["node"]: 1 / len(rows) for row in rows})

    def _rows(self) -> list[dict[str, str]]:
        with self.links.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if missing := set(COLUMNS) - set(rows[0] if rows else ()):
            raise ValueError(f"{self.links}: expected the columns {', '.join(COLUMNS)}; there is "
                             f"no {', '.join(sorted(missing))}")  # fmt: skip
        return rows

    def _set(self, rows: Sequence[Mapping[str, str]], wanted: Mapping[str, float]) -> None:
        batches: dict[str, list[str]] = {}
        for row in rows:
            bits = round(float(row["mbit"]) * 1e6 * wanted.get(row["node"], 0.0))
            bits = max(bits, LEAST_BITS)
            line = f"class change dev {row['device']} classid {row['class']} htb"
            line += f" rate {bits}bit ceil {bits}bit"
            batches.setdefault(row.get("netns") or "", []).append(line)
        for netns, lines in batches.items():
            inside = ["-n", netns] if netns else []
            _run(["tc", *inside, "-batch", "-"], "\n".join(lines) + "\n")

    def summary(self) -> str:
        """Return it and its settings in one line."""
        return f"{self.name} ({self.links})"


def _run(command: Sequence[str], told: str) -> None:
    try:
        done = subprocess.run(
            command, input=told, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} took longer than {PATIENCE:g} s") from error
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        why = f": {said[-1][:200]}" if said else ""
        raise RuntimeError(f"{command[0]} ended with {done.returncode}{why}")


ALLOCATORS: Registry[Callable[[str], BandwidthAllocator]] = Registry(
    {CommandAllocator.name: CommandAllocator, HTBAllocator.name: HTBAllocator}
)
"""By name."""
