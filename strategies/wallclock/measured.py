"""A clock for deployments: it reads the times of real rounds and smooths them [D]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from logging import WARNING
from typing import Any, ClassVar

import numpy as np
from flwr.common import log
from numpy.typing import NDArray

from strategies.wallclock.allocators import BandwidthAllocator, Share
from strategies.wallclock.bandwidth import allocate_bandwidth, equal_shares
from strategies.wallclock.clock import Clock, RoundTime, Work, by_client, reported
from strategies.wallclock.forecasts import Forecasts
from strategies.wallclock.objective import ClientProfiles
from strategies.wallclock.transfers import End, Estimate, Fit, Transfers

# The planner needs an upload that takes time, and an efficiency that is finite.
_NOTHING = 1e-9
_LEAST_BYTE_SECONDS = 1e-15
MB = 1e6
LEAST_SHARE = 0.1  # of an equal one
GUESSES = 32  # of a client not heard of
# Transfers fade slower than a step's seconds, for each is noise for a good part and a change of a
# link is noticed by itself; so much slower forecasts were best, over rates that stay and that fall.
TRANSFERS = 2 / 3

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pace:
    """What is known of one client beside its transfers.

    Parameters
    ----------
    step_seconds : float
        Of a local step at rank 0, that is without the share that grows with the rank.
    byte_seconds : float
        As a checkpoint of before transfers were looked at has it, for each byte of an upload with
        all that came with it; counts until there is a transfer. (default: 0)
    steps : float
        Local steps it did last; 1 if it never said, then a step is a whole round.
    started : bool
        Whether a step is of a client that only started with it. (default: False)
    """

    step_seconds: float
    byte_seconds: float = 0.0
    steps: float = 1.0
    started: bool = False


class MeasuredClock(Clock):
    """Time rounds by what was measured in them [D].

    Of a reply that arrived ``elapsed`` seconds after its message was sent, ``held_seconds`` (or,
    where the client does not report them, ``train_seconds``) are compute. The rest is fitted by
    seconds that all replies have in common and seconds for each byte of the client's own upload
    (``strategies.wallclock.transfers``), both with an interval; a download goes with the upload
    that belongs to it. Where the client did not report any time all of it is compute. The round
    lasts as long as the slowest answer.

    Per client the seconds of a step are smoothed exponentially, and newer transfers weigh more. Its
    first reply, for which it read model and rows, counts with what training took until the next.
    Clients not heard of count as the mean of the others, in what a round is expected to take as any
    of them. Nobody is called late: a deadline is the strategy's own timeout, and its
    ``answered=False`` is not learned from.

    In a simulation clients wait for a core instead of a network: what they waited is told as such.

    Parameters
    ----------
    smoothing : float
        Weight of the newest measurement, in (0, 1]; two thirds of it for transfers. (default: 0.3)
    rank_share : float
        ``c1 / c0``: what one rank adds to a local step, as a share of the step without adapter,
        ≥ 0; `strategies.wallclock.flops.rank_flops` measures it. (default: 0)
    shared_band : bool
        Whether the clients share one uplink, each the same part of it in a measured round, or
        every client has a line of its own. (default: False)
    bandwidth : str
        How a shared band is divided: "equal", or "optimal", so that all finish together; the
        latter needs an allocator. (default: "equal")
    allocator : BandwidthAllocator, optional
        Is told each round's shares before it, so that it can be made so; then the band is a shared
        one. Equal ones where nothing was measured yet. (default: nobody is told)

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    name: ClassVar[str] = "measured"

    def __init__(
        self,
        *,
        smoothing: float = 0.3,
        rank_share: float = 0.0,
        shared_band: bool = False,
        bandwidth: str = "equal",
        allocator: BandwidthAllocator | None = None,
    ) -> None:
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing must lie in (0, 1], got {smoothing!r}")
        if not (math.isfinite(rank_share) and rank_share >= 0):
            raise ValueError(f"rank_share must be finite and ≥ 0, got {rank_share!r}")
        if bandwidth not in ("equal", "optimal"):
            raise ValueError(f"bandwidth: expected 'equal' or 'optimal', got {bandwidth!r}")
        if bandwidth == "optimal" and allocator is None:
            raise ValueError(
                "bandwidth = 'optimal' needs an allocator that gives everybody its share; without "
                "one the network divides its band as it likes"
            )
        self.smoothing, self.rank_share = smoothing, rank_share
        self.shared_band, self.bandwidth = shared_band or allocator is not None, bandwidth
        self.allocator = allocator
        self._told: dict[int, float] = {}  # shares of this round
        self._expected: float | None = None  # seconds of this round
        self._network = True
        self._end: End | None = None  # of what is fitted: its value
        self._paces: dict[int, Pace] = {}
        self._transfers = Transfers(smoothing * TRANSFERS)
        self._forecasts = Forecasts()

    def begin(
        self, works: Sequence[Work], server_round: int, *, network: bool, empty: Sequence[float]
    ) -> RoundTime:
        """Return the forecast of a round that is about to be run."""
        self._network = network
        if empty:
            self._transfers.add_empty(empty)
        self._told = {}  # of the round before
        self._told = self._allocate(by_client(works), server_round)
        time = self.forecast(works, server_round)
        self._expected = None if math.isnan(time.seconds) else time.seconds
        known = [client for client in time.compute_seconds if client in self._paces]
        self._forecasts.expect({client: _whole(time, client) for client in known})
        return time

    def forecast(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time expected from what was measured; NaN seconds if that is nothing yet.

        A reply is as likely to be late by any of what earlier ones were, and one of a client not
        heard of is as likely to take what any of the others would (`forecasts`).
        """
        works = by_client(works)
        if not works or not self._paces:
            return RoundTime(math.nan if works else 0.0)
        clients, fit = [work.client for work in works], self._transfers.fit()
        compute, upload = self._alone(works, fit)
        shares = self._shares(clients, compute, upload) if self.shared_band else np.ones(len(works))
        time = self._time(clients, compute, upload / shares, fit)
        heard = sorted(self._paces)
        others = self._known(heard[:: math.ceil(len(heard) / GUESSES)], fit)[:, None]
        compute, upload = self._taken(works, others)
        likely = compute + fit.fixed.value + upload / shares
        guesses = [
            np.array([_whole(time, client)]) if client in self._paces else likely[:, i]
            for i, client in enumerate(clients)
        ]
        return replace(time, seconds=self._forecasts.latest(guesses))

    def finish(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time of the round as measured, and learn from those who answered."""
        works = by_client(works)
        for work in works:
            if work.answered and (seconds := reported(work.elapsed_seconds)) is not None:
                self._forecasts.learn(work.client, seconds)
        return self._measured(works)

    def _measured(self, works: Sequence[Work]) -> RoundTime:
        """Learn from works, of one round or late for it, and return the time they took."""
        compute: dict[int, float] = {}
        rest: dict[int, float] = {}
        for work in works:
            trained, elapsed = _held(work), reported(work.elapsed_seconds)
            if elapsed is None:
                elapsed = trained
            if elapsed is not None:
                compute[work.client] = elapsed if trained is None else min(trained, elapsed)
                rest[work.client] = elapsed - compute[work.client]
        if not compute:
            return RoundTime(0.0)
        for work in works:
            if work.answered and work.client in compute:
                self._learn(work, compute[work.client])
                # Of who was not looked at when it answered, only the training is known.
                if reported(work.elapsed_seconds) is not None and _held(work) is not None:
                    # On a shared line the transfer alone would have been this much faster.
                    alone = self._told.get(work.client, 1 / len(compute) if self.shared_band else 1)
                    nbytes = max(work.upload_bytes, 1) / alone
                    self._transfers.add(work.client, nbytes, rest[work.client])
        clients, fit = list(compute), self._transfers.fit()
        if not self._network:  # nothing was sent: all of it was waiting for a turn
            fit = Fit(Estimate(0.0, 0.0, 0.0), fit.byte_seconds)
        sent = np.array([max(rest[i] - fit.fixed.value, 0.0) for i in clients])
        whole = {i: compute[i] + rest[i] for i in clients}
        slowest = max(whole, key=whole.__getitem__)
        time = self._time(clients, np.array(list(compute.values())), sent, fit)
        return replace(time, seconds=whole[slowest], bottleneck=slowest, expected=self._expected)

    def learn(self, works: Sequence[Work], server_round: int) -> None:
        """Learn from work that took longer than its round."""
        for work in works:  # one after the other: a client may have answered two
            if self.shared_band:  # and was shared by others while it came
                work = replace(work, elapsed_seconds=None)
            self._measured(by_client([work]))

    def profiles(
        self,
        clients: Sequence[int],
        weights: Sequence[float],
        ranks: Sequence[Sequence[int]],
        upload_bytes: tuple[float, float],
        full_rank: int,
        server_round: int,
    ) -> ClientProfiles:
        """Return what was measured; the seconds all replies have in common count as compute.

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
        fit = self._transfers.fit()
        fit = fit if self._end is None else fit.at(self._end)
        step_seconds, byte_seconds, steps = self._known(clients, fit).T
        base, slope = steps * step_seconds, steps * step_seconds * self.rank_share
        base = base + fit.fixed.value
        if self.shared_band:
            efficiency = 8 / np.maximum(byte_seconds, _LEAST_BYTE_SECONDS)
            constant_bits, bits_per_rank = 8 * fixed, 8 * per_rank
        else:
            base, slope = base + byte_seconds * fixed, slope + byte_seconds * per_rank
            efficiency = np.ones(len(clients))
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

    def ends(self) -> tuple[Clock, Clock]:
        """Return it with all that was fitted to transfers at one end, and at the other.

        What is fixed and what a byte takes are hardly ever both at the same end: it is wider than
        the interval of either. Compute is taken as measured.
        """
        low, high = copy(self), copy(self)
        low._end, high._end = "low", "high"
        return low, high

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of every client."""
        return {
            "clients": {str(client): asdict(pace) for client, pace in self._paces.items()},
            "transfers": self._transfers.state_dict(),
            "forecasts": self._forecasts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned, also before it had transfers or forecasts."""
        self._paces = {int(client): Pace(**pace) for client, pace in state["clients"].items()}
        self._transfers = Transfers(self.smoothing * TRANSFERS)
        if "transfers" in state:
            self._transfers.load_state_dict(state["transfers"])
        self._forecasts = Forecasts()
        if "forecasts" in state:
            self._forecasts.load_state_dict(state["forecasts"])

    def summary(self) -> str:
        """Return the clock and its settings in one line."""
        lines = "one shared band" if self.shared_band else "lines of their own"
        if self.allocator is not None:
            lines += f", {self.bandwidth} shares by {self.allocator.summary()}"
        return f"{self.name} ({lines}, smoothing {self.smoothing:g})"

    def _allocate(self, works: Sequence[Work], server_round: int) -> dict[int, float]:
        """Have the shares of a round set; return them, or nothing where they are not."""
        nodes = [work.node for work in works]
        if self.allocator is None or not works or None in nodes:
            return {}
        if self._paces:
            # A link that only looks fast would get next to nothing: each is as slow as it may be.
            sent = {work.client: work.upload_bytes * len(works) for work in works}
            time = self._alone(works, self._transfers.told(sent).at("high"))
            shares = self._shares([work.client for work in works], *time)
        else:
            shares = np.full(len(works), 1 / len(works))
        told = [Share(w.client, w.node or 0, float(s)) for w, s in zip(works, shares, strict=True)]
        try:
            self.allocator.allocate(told, server_round)
        except Exception as error:  # whatever a user's own may raise, a run goes on without it
            log(WARNING, "round %s: the band is not shared out: %s", server_round, error)
            return {share.client: 1 / len(told) for share in told}
        return {share.client: share.share for share in told}

    def close(self) -> None:
        """Give the band back."""
        if self.allocator is not None:
            try:
                self.allocator.release()
            except Exception as error:  # as above: a run that is over does not fail
                log(WARNING, "the band is not given back: %s", error)

    def _shares(self, clients: Sequence[int], compute: Array, upload: Array) -> Array:
        """Return who has how much of the band."""
        if all(client in self._told for client in clients):
            return np.array([self._told[client] for client in clients])
        if self.bandwidth == "equal" or not upload.any():
            return equal_shares(compute, upload, 1.0)[0]
        # A link may be worse than it looks: nobody gets less than a tenth of an equal share.
        shares = np.maximum(allocate_bandwidth(compute, upload, 1.0)[0], LEAST_SHARE / len(clients))
        return np.asarray(shares / shares.sum())

    def _time(self, clients: Sequence[int], compute: Array, upload: Array, fit: Fit) -> RoundTime:
        """Return the time of a round in which clients are busy for so long."""
        total = compute + fit.fixed.value + upload
        known = fit.byte_seconds if self._network else dict[int, Estimate]()
        return RoundTime(
            seconds=float(total.max()),
            bottleneck=clients[int(total.argmax())],
            compute_seconds=dict(zip(clients, compute.tolist(), strict=True)),
            upload_seconds=dict(zip(clients, upload.tolist(), strict=True)),
            fixed_seconds=fit.fixed.value,
            fixed_between=(fit.fixed.low, fit.fixed.high),
            mb_seconds={i: known[i].times(MB) for i in clients if i in known},
            queued=not self._network,
        )

    def _alone(self, works: Sequence[Work], fit: Fit) -> tuple[Array, Array]:
        """Return what computing takes, and what an upload would on the whole band."""
        return self._taken(works, self._known([work.client for work in works], fit))

    def _taken(self, works: Sequence[Work], known: Array) -> tuple[Array, Array]:
        step, byte, steps = np.moveaxis(known, -1, 0)
        done = np.array([reported(work.steps) for work in works], dtype=np.float64)  # None: NaN
        steps = np.where(np.isnan(done), steps, done)
        compute = steps * step * (1 + self.rank_share * np.array([work.rank for work in works]))
        return compute, byte * np.array([work.upload_bytes for work in works], dtype=np.float64)

    def _learn(self, work: Work, compute: float) -> None:
        known, old = work.client in self._paces, self._paces.get(work.client, Pace(0.0))
        if not known:  # it read model and rows, once: the next reply replaces this one
            compute = min(compute, reported(work.train_seconds) or compute)
        steps = reported(work.steps) or old.steps
        step = compute / (steps * (1 + self.rank_share * work.rank))
        if known and not old.started:
            step = old.step_seconds + self.smoothing * (step - old.step_seconds)
        self._paces[work.client] = Pace(step, old.byte_seconds, steps, started=not known)

    def _known(self, clients: Sequence[int], fit: Fit) -> Array:
        """Return step seconds, byte seconds and steps, one row a client.

        Others than those heard of count as the mean of all that are known.
        """
        rows = {i: (p.step_seconds, p.byte_seconds, p.steps) for i, p in self._paces.items()}
        bytes_known = {i: e.value for i, e in fit.byte_seconds.items()}
        bytes_known = {i: row[1] for i, row in rows.items() if row[1]} | bytes_known
        usual = np.mean(list(rows.values()), axis=0)
        usual[1] = np.mean(list(bytes_known.values())) if bytes_known else 0.0
        table = np.array([rows.get(client, usual) for client in clients], dtype=np.float64)
        table[:, 1] = [bytes_known.get(client, usual[1]) for client in clients]
        return table


def _whole(time: RoundTime, client: int) -> float:
    """Return the seconds from a client's message to its reply."""
    fixed = time.fixed_seconds or 0.0
    return time.compute_seconds[client] + time.upload_seconds[client] + fixed


def _held(work: Work) -> float | None:
    """Return the seconds a reply was at its client, as far as it said."""
    held = reported(work.held_seconds)
    return reported(work.train_seconds) if held is None else held
