"""A clock for deployments: it reads the times of real rounds and smooths them [D]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies.wallclock.bandwidth import equal_shares
from strategies.wallclock.clock import Clock, RoundTime, Work, by_client, reported
from strategies.wallclock.objective import ClientProfiles

# The planner needs an upload that takes time, and an efficiency that is finite.
_NOTHING = 1e-9
_LEAST_BYTE_SECONDS = 1e-15


@dataclass(frozen=True)
class Pace:
    """What is known of one client.

    Parameters
    ----------
    step_seconds : float
        Of a local step at rank 0, that is without the share that grows with the rank.
    byte_seconds : float
        Transfer and start-up for each byte of its upload.
    steps : float
        Local steps it did last; 1 if it never said, then a step is a whole round.
    """

    step_seconds: float
    byte_seconds: float
    steps: float = 1.0


class MeasuredClock(Clock):
    """Time rounds by what was measured in them [D].

    Of a reply that arrived ``elapsed`` seconds after its message was sent, ``train_seconds`` are
    compute; the rest is transfer, both ways, and start-up, and is put down to the bytes of the
    upload. Where the client did not report its training time all of it is compute. The round
    lasts as long as the slowest answer.

    Per client the seconds of a step and of a byte are smoothed exponentially. Clients not heard
    of count as the mean of the others. Nobody is called late: a deadline is the strategy's own
    timeout, and its ``answered=False`` is not learned from.

    Parameters
    ----------
    smoothing : float
        Weight of the newest measurement, in (0, 1]. (default: 0.3)
    rank_share : float
        ``c1 / c0``: what one rank adds to a local step, as a share of the step without adapter,
        ≥ 0; `strategies.wallclock.flops.rank_flops` measures it. (default: 0)
    shared_band : bool
        Whether the clients share one uplink, each the same part of it in a measured round, or
        every client has a line of its own. (default: False)

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name: ClassVar[str] = "measured"

    def __init__(
        self, *, smoothing: float = 0.3, rank_share: float = 0.0, shared_band: bool = False
    ) -> None:
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing must lie in (0, 1], got {smoothing!r}")
        if not (math.isfinite(rank_share) and rank_share >= 0):
            raise ValueError(f"rank_share must be finite and ≥ 0, got {rank_share!r}")
        self.smoothing, self.rank_share, self.shared_band = smoothing, rank_share, shared_band
        self._paces: dict[int, Pace] = {}

    def forecast(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time expected from what was measured; NaN seconds if that is nothing yet."""
        works = by_client(works)
        if not works or not self._paces:
            return RoundTime(math.nan if works else 0.0)
        paces = self._known([work.client for work in works])
        compute = np.array([self._compute(p, w) for p, w in zip(paces, works, strict=True)])
        upload = np.array(
            [p.byte_seconds * w.upload_bytes for p, w in zip(paces, works, strict=True)]
        )
        if self.shared_band:
            shares = equal_shares(compute, upload, 1.0)[0]
            upload = upload / shares
        total = compute + upload
        clients = [work.client for work in works]
        return RoundTime(
            seconds=float(total.max()),
            bottleneck=clients[int(total.argmax())],
            compute_seconds=dict(zip(clients, compute.tolist(), strict=True)),
            upload_seconds=dict(zip(clients, upload.tolist(), strict=True)),
        )

    def finish(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time of the round as measured, and learn from those who answered."""
        compute: dict[int, float] = {}
        upload: dict[int, float] = {}
        works = by_client(works)
        for work in works:
            trained, elapsed = reported(work.train_seconds), reported(work.elapsed_seconds)
            if elapsed is None:
                elapsed = trained
            if elapsed is not None:
                compute[work.client] = elapsed if trained is None else min(trained, elapsed)
                upload[work.client] = elapsed - compute[work.client]
        if not compute:
            return RoundTime(0.0)
        usual: Pace | None = None  # looked up once: there may be thousands of clients
        for work in works:
            if work.answered and work.client in compute:
                i = work.client
                # On a shared line the transfer alone would have been this much faster.
                alone = upload[i] / (len(compute) if self.shared_band else 1)
                # Of who was not looked at when it answered, only the training is known.
                if reported(work.elapsed_seconds) is None:
                    if i not in self._paces and usual is None and self._paces:
                        usual = self._mean()
                    pace = self._paces.get(i, usual)
                    alone = (pace.byte_seconds if pace else 0.0) * max(work.upload_bytes, 1)
                self._learn(work, compute[i], alone)
        slowest = max(compute, key=lambda i: compute[i] + upload[i])
        seconds = compute[slowest] + upload[slowest]
        return RoundTime(seconds, slowest, compute, upload)

    def profiles(
        self,
        clients: Sequence[int],
        weights: Sequence[float],
        ranks: Sequence[Sequence[int]],
        upload_bytes: tuple[float, float],
        full_rank: int,
        server_round: int,
    ) -> ClientProfiles:
        """Return what was measured.

        Lines of their own take nothing from each other: their transfers are then counted as
        compute, and an upload of a nanosecond is left.

        Raises
        ------
        ValueError
            If nothing was measured yet.
        """
        if not self._paces:
            raise ValueError(
                "nothing was measured yet: expected at least one finished round with an answer "
                "before a plan; plan after the first round"
            )
        fixed, per_rank = max(upload_bytes[0], 0.0), upload_bytes[1]
        paces = self._known(clients)
        step_seconds, byte_seconds, steps = _table(paces).T
        base, slope = steps * step_seconds, steps * step_seconds * self.rank_share
        if self.shared_band:
            efficiency = 8 / np.maximum(byte_seconds, _LEAST_BYTE_SECONDS)
            constant_bits, bits_per_rank = 8 * fixed, 8 * per_rank
        else:
            base, slope = base + byte_seconds * fixed, slope + byte_seconds * per_rank
            efficiency = np.ones(len(paces))
            constant_bits, bits_per_rank = _NOTHING, 0.0
        return ClientProfiles(
            weights=weights,
            base_seconds=base,  # of a whole round, so one step
            rank_seconds=slope,
            steps=1.0,
            bits_per_rank=bits_per_rank,
            constant_bits=constant_bits,
            spectral_efficiency=efficiency,
            bandwidth_hz=1.0,
            ranks=ranks,
            full_rank=full_rank,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of every client."""
        return {"clients": {str(client): asdict(pace) for client, pace in self._paces.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._paces = {int(client): Pace(**pace) for client, pace in state["clients"].items()}

    def summary(self) -> str:
        """Return the clock and its settings in one line."""
        lines = "one shared band" if self.shared_band else "lines of their own"
        return f"{self.name} ({lines}, smoothing {self.smoothing:g})"

    def _learn(self, work: Work, compute: float, transfer: float) -> None:
        old = self._paces.get(work.client)
        steps = reported(work.steps) or (old.steps if old else 1.0)
        step = compute / (steps * (1 + self.rank_share * work.rank))
        byte = transfer / max(work.upload_bytes, 1)
        if old:
            step = old.step_seconds + self.smoothing * (step - old.step_seconds)
            byte = old.byte_seconds + self.smoothing * (byte - old.byte_seconds)
        self._paces[work.client] = Pace(step, byte, steps)

    def _known(self, clients: Sequence[int]) -> list[Pace]:
        """Return what is known of clients; others count as the mean of all that are known."""
        usual = self._mean()
        return [self._paces.get(client, usual) for client in clients]

    def _mean(self) -> Pace:
        return Pace(*_table(list(self._paces.values())).mean(axis=0).tolist())

    def _compute(self, pace: Pace, work: Work) -> float:
        steps = reported(work.steps) or pace.steps
        return steps * pace.step_seconds * (1 + self.rank_share * work.rank)


def _table(paces: Sequence[Pace]) -> NDArray[np.float64]:
    """Return one row a client."""
    return np.array([(p.step_seconds, p.byte_seconds, p.steps) for p in paces])
