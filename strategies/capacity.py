"""What a node can train: what it measures of itself, what a rank costs, and the largest that fits.

The names are those in a message; both sides and both client APIs use them. Nobody has published
such a rule; all of it is this project's decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: In a config: the client is to measure what it can train.
CAPACITY_KEY = "capacity"
#: In a config a text, in the answer the same text: so the server times the link.
ECHO_KEY = "capacity-echo"
#: Set by the server, in an answer to a query: seconds from sending it.
ELAPSED_KEY = "elapsed-seconds"

FREE_BYTES = "free-bytes"
DEVICE_FREE_BYTES = "device-free-bytes"
STEP_SECONDS = "step-seconds"
PROBE_RANK = "probe-rank"
PROBE_SECONDS = "probe-seconds"
PROCESS_SECONDS = "process-seconds"

# No machine has a pebibyte free, and no step takes a day. What is outside was not measured.
_LIMITS = {
    FREE_BYTES: (0.0, 2.0**50),
    DEVICE_FREE_BYTES: (0.0, 2.0**50),
    STEP_SECONDS: (1e-9, 86400.0),
    PROBE_RANK: (1.0, 65536.0),
    PROBE_SECONDS: (0.0, 86400.0),
    PROCESS_SECONDS: (0.0, 1e9),
}


@dataclass(frozen=True)
class Capacity:
    """What a node has measured of itself.

    Parameters
    ----------
    free_bytes : float
        Of the host, with the frozen model loaded.
    device_free_bytes : float, optional
        Of the accelerator; None: it trains on the host.
    step_seconds : float
        Of one training step at ``rank``.
    rank : int
    link : float, optional
        Bytes a second, both ways together, as the server timed it; None: not known.
    """

    free_bytes: float
    device_free_bytes: float | None
    step_seconds: float
    rank: int
    link: float | None = None


@dataclass(frozen=True)
class RankCost:
    """What a rank costs a node: each of them is linear in the rank.

    Parameters
    ----------
    base_flops, rank_flops : float
        Of a training step (``strategies.wallclock.rank_flops``).
    steps : float
        Of a round.
    base_bytes, rank_bytes : float
        Memory of training beside the frozen model (``strategies.wallclock.rank_memory``).
    fixed_moved, rank_moved : float (default: 0.0)
        Bytes of a round, down and up; the strategy says them.
    """

    base_flops: float
    rank_flops: float
    steps: float
    base_bytes: float
    rank_bytes: float
    fixed_moved: float = 0.0
    rank_moved: float = 0.0


def checked_capacity(answer: Mapping[str, Any], echo: str = "") -> Capacity:
    """Return what a node's answer says, with the link that its echo was timed by.

    A node can make itself look slower or faster, larger or smaller, which changes its own rank and
    nobody else's but where they share a budget, within the limits of the policy.

    Parameters
    ----------
    answer : Mapping[str, Any]
    echo : str
        The text that was sent and must come back; empty: the link was not timed.

    Raises
    ------
    ValueError
        If a number is missing, none, or outside what can be.
    """
    found: dict[str, float] = {}
    for key, (low, high) in _LIMITS.items():
        value = answer.get(key)
        if value is None and key == DEVICE_FREE_BYTES:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"{key} is {value!r}, expected a number" if key in answer else f"{key} is missing"
            )
        if not low <= value <= high:  # NaN is neither
            raise ValueError(f"{key} is {value!r}, expected {low:g} to {high:g}")
        found[key] = float(value)
    link = None
    elapsed = answer.get(ELAPSED_KEY)
    if echo and answer.get(ECHO_KEY) == echo and isinstance(elapsed, float):
        # Not on the way is the probe, and the start of a process that was made for this answer. No
        # less is left than a thousandth, whatever it says.
        age = found[PROCESS_SECONDS]
        busy = max(found[PROBE_SECONDS], age if age < elapsed else 0.0)
        moving = max(elapsed - busy, elapsed / 1000)
        link = 2 * len(echo) / moving if moving > 0 else None
    return Capacity(
        found[FREE_BYTES],
        found.get(DEVICE_FREE_BYTES),
        found[STEP_SECONDS],
        int(found[PROBE_RANK]),
        link,
    )


def largest_rank(
    capacity: Capacity, cost: RankCost, *, memory_share: float = 0.5, seconds: float = 0.0
) -> int | None:
    """Return the largest rank that a node can train; 0: none, None: nothing sets a limit.

    With ``v = (base_flops + rank_flops · r₀) / step_seconds``, the FLOPs a second in the probe at
    rank ``r₀``, rank ``r`` fits if

    - ``base_bytes + rank_bytes · r ≤ memory_share · free`` on the device that trains;
    - on an accelerator's host, the messages of a round do: ``moved(r) ≤ memory_share · free``;
    - ``steps · (base_flops + rank_flops · r)/v + moved(r)/link ≤ seconds``, if that is above 0. A
      link that is not known takes no time.

    Parameters
    ----------
    capacity : Capacity
    cost : RankCost
    memory_share : float (default: 0.5)
        Of what is free: the rest is for what is not counted, and for others.
    seconds : float (default: 0.0)
        Of a round; 0: any.
    """
    trains = capacity.free_bytes
    pairs: list[tuple[float, float, float]] = []  # what there is, what no rank needs, what one does
    if capacity.device_free_bytes is not None:
        trains = capacity.device_free_bytes
        host = memory_share * capacity.free_bytes
        pairs.append((host, cost.fixed_moved, cost.rank_moved))
    pairs.append((memory_share * trains, cost.base_bytes, cost.rank_bytes))
    if seconds > 0:
        flops = cost.base_flops + cost.rank_flops * capacity.rank
        per_flop = capacity.step_seconds / flops if flops else 0.0
        per_byte = 1 / capacity.link if capacity.link else 0.0
        fixed = cost.steps * cost.base_flops * per_flop + cost.fixed_moved * per_byte
        each = cost.steps * cost.rank_flops * per_flop + cost.rank_moved * per_byte
        pairs.append((seconds, fixed, each))
    limit = math.inf
    for there_is, fixed, each in pairs:
        if there_is < fixed:
            return 0
        if each > 0:
            limit = min(limit, (there_is - fixed) / each)
    return None if limit == math.inf else math.floor(limit * (1 + 1e-12))
