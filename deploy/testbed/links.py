"""The links of a testbed: drawn from a profile or as told, made with ``ip`` and ``tc``.

    node's namespace          namespace of the base station            this machine
    eth0 ---------- nNN --- bridge --- up0 (HTB: a class a node) ---- fedlora-tb
               (TBF: downloads)                                        SuperLink

Everything is in namespaces with our prefix: when they are gone, so is all of it.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from strategies.wallclock import sample_devices
from strategies.wallclock.channel import harmonic_efficiency

PREFIX = "fedlora-tb"
BASE = f"{PREFIX}-base"
UPLINK, BRIDGE = "up0", "br0"
HOST = "10.213.0.1"
MOST_NODES = 200
# A queue is of half a second, and of some packets at least. Linux' thousand packets hold for half a
# minute at 0.5 Mbit/s, and each of several requests of a reply would wait behind the large one.
QUEUE_SECONDS, LEAST_QUEUE = 0.5, 8


class LinkError(RuntimeError):
    """The network cannot be made, or not on this machine."""


@dataclass(frozen=True)
class Link:
    """The link of one node.

    Parameters
    ----------
    mbit : float
        What it uploads with if it has the whole band, Mbit/s.
    speed : float
        Its computer beside the fastest one, in (0, 1].
    share : float
        Its part of the band at first; 1: its line is its own.
    """

    mbit: float
    speed: float = 1.0
    share: float = 1.0

    @property
    def rate(self) -> float:
        """What it uploads with at first, Mbit/s."""
        return self.mbit * self.share


def links_of(profile: str, nodes: int, seed: int) -> list[Link]:
    """Draw devices of a profile of ``strategies.wallclock``, sharing its band equally at first.

    The rates are the mean ones over the fading, which a testbed does not have.
    """
    devices = sample_devices(profile, nodes, np.random.default_rng(seed))
    mbit = harmonic_efficiency(devices.profile, devices.snr_db) * devices.profile.bandwidth_hz / 1e6
    speed = devices.flops / devices.flops.max()
    pairs = zip(mbit.tolist(), speed.tolist(), strict=True)
    return [Link(rate, fast, 1 / nodes) for rate, fast in pairs]


def require_root() -> None:
    """Refuse to go on where links cannot be shaped.

    Raises
    ------
    LinkError
        With what to do instead.
    """
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        raise LinkError(f"expected the commands ip and tc (package iproute2); there is no "
                        f"{' and no '.join(missing)}; or use --plain, without shaping")  # fmt: skip
    if os.geteuid():
        raise LinkError(
            "links are made as root: network namespaces and traffic control need it; use sudo, or "
            "--plain for the same federation on loopback, without shaping"
        )


class Network:
    """Namespaces and shaped links between them.

    Parameters
    ----------
    links : Sequence[Link]
        One a node.
    down_mbit : float
        What each node downloads with.
    """

    def __init__(self, links: Sequence[Link], down_mbit: float) -> None:
        if len(links) > MOST_NODES:
            raise LinkError(f"expected at most {MOST_NODES} nodes, got {len(links)}")
        self.links, self.down_mbit = list(links), down_mbit

    def name(self, i: int) -> str:
        """Return the namespace of a node."""
        return f"{PREFIX}-{i:03}"

    def inside(self, i: int) -> list[str]:
        """Return what a command begins with that is to run at a node."""
        return ["ip", "netns", "exec", self.name(i)]

    def make(self) -> None:
        """Make everything.

        Raises
        ------
        LinkError
            If something of it is there already, or cannot be made.
        """
        if left := namespaces():
            raise LinkError(f"there is a testbed already ({left[0]} …); take it down first")
        _ip("netns", "add", BASE)
        at_base = ["-n", BASE]
        _ip("link", "add", PREFIX, "type", "veth", "peer", "name", UPLINK, "netns", BASE)
        _ip("addr", "add", f"{HOST}/24", "dev", PREFIX)
        _ip(*at_base, "link", "add", BRIDGE, "type", "bridge")
        _ip(*at_base, "link", "set", "dev", UPLINK, "master", BRIDGE)
        for name in (UPLINK, BRIDGE):
            _ip(*at_base, "link", "set", "dev", name, "up")
        _ip("link", "set", "dev", PREFIX, "up")
        lines = [
            f"qdisc add dev {UPLINK} root handle 1: htb default 2",
            f"class add dev {UPLINK} parent 1: classid 1:1 htb rate 10gbit",
            f"class add dev {UPLINK} parent 1:1 classid 1:2 htb rate 1gbit",  # ARP and the like
        ]
        for i, link in enumerate(self.links):
            own, port, address = self.name(i), f"n{i:03}", f"10.213.0.{i + 10}"
            _ip("netns", "add", own)
            _ip(*at_base, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", own)
            _ip(*at_base, "link", "set", "dev", port, "master", BRIDGE)
            _ip(*at_base, "link", "set", "dev", port, "up")
            _ip("-n", own, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", own, "link", "set", "dev", device, "up")
            # One packet after the other: larger ones would go through in bursts of a second.
            _ip("-n", own, "link", "set", "dev", "eth0", "gso_max_segs", "1")
            lines += [
                f"class add dev {UPLINK} parent 1:1 classid {_class(i)} htb {_rate(link.rate)}",
                f"qdisc add dev {UPLINK} parent {_class(i)} pfifo limit {_queue(link.rate)}",
                f"filter add dev {UPLINK} parent 1: protocol ip u32 "
                f"match ip src {address}/32 flowid {_class(i)}",
                f"qdisc add dev {port} root tbf rate {_bits(self.down_mbit)}bit burst 32kb "
                "latency 300ms",
            ]
        _ip("link", "set", "dev", PREFIX, "gso_max_segs", "1")
        _tc(lines)

    def reset(self) -> None:
        """Give every node its equal part of the band again, whatever an allocator has set."""
        _tc([f"class change dev {UPLINK} classid {_class(i)} htb {_rate(link.rate)}"
             for i, link in enumerate(self.links)])  # fmt: skip

    def change(self, indices: Sequence[int], factor: float) -> None:
        """Multiply the rates of some nodes, whatever share of the band they have now."""
        shown = _run(["tc", "-n", BASE, "class", "show", "dev", UPLINK])
        lines = []
        for i in indices:
            self.links[i] = replace(self.links[i], mbit=self.links[i].mbit * factor)
            found = re.search(rf"htb {_class(i)} .*?rate (\S+)bit", shown)
            if found is None:
                raise LinkError(f"{UPLINK} has no class {_class(i)}")
            rate = _number(found[1]) / 1e6 * factor
            lines.append(f"class change dev {UPLINK} classid {_class(i)} htb {_rate(rate)}")
        _tc(lines)

    def write(self, path: Path, node_ids: Sequence[str]) -> None:
        """Write what an ``HTBAllocator`` must know of every node."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["node", "device", "class", "mbit", "netns"])
            for i, (node, link) in enumerate(zip(node_ids, self.links, strict=True)):
                writer.writerow([node, UPLINK, _class(i), f"{link.mbit:.6g}", BASE])


def namespaces() -> list[str]:
    """Return our namespaces that are there."""
    if not shutil.which("ip"):
        return []
    names = (line.split()[0] for line in _run(["ip", "netns", "list"]).splitlines() if line)
    return [name for name in names if name.startswith(f"{PREFIX}-")]


def take_down() -> list[str]:
    """Remove all of ours, also what a testbed that was killed has left; return their names."""
    gone = namespaces()
    for name in gone:
        pids = _run(["ip", "netns", "pids", name], check=False).split()
        if pids:
            _run(["kill", "-KILL", *pids], check=False)
        _run(["ip", "netns", "del", name], check=False)
    if gone:  # went with its peer, unless that was half made
        _run(["ip", "link", "del", PREFIX], check=False)
    return gone


def _queue(mbit: float) -> int:
    """Return how many packets of 1514 bytes wait at most before a link of this rate."""
    return max(LEAST_QUEUE, round(QUEUE_SECONDS * mbit * 1e6 / (8 * 1514)))


def _class(i: int) -> str:
    return f"1:{i + 0x10:x}"


def _bits(mbit: float) -> int:
    return max(round(mbit * 1e6), 8000)


def _rate(mbit: float) -> str:
    return f"rate {_bits(mbit)}bit ceil {_bits(mbit)}bit burst 4kb cburst 4kb quantum 1514"


def _number(text: str) -> float:
    """Return a rate as ``tc`` writes it."""
    units = {"K": 1e3, "M": 1e6, "G": 1e9}
    return float(text.rstrip("KMG")) * units.get(text[-1], 1.0)


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _tc(lines: Sequence[str]) -> None:
    _run(["tc", "-n", BASE, "-batch", "-"], told="\n".join(lines) + "\n")


def _run(command: Sequence[str], *, told: str = "", check: bool = True) -> str:
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=False)
    if check and done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise LinkError(f"{' '.join(command)} failed: {said}")
    return done.stdout
