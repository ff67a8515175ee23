"""A clock for simulations: every client gets a device and a channel [D]."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies.wallclock.availability import Always, Availability
from strategies.wallclock.bandwidth import (
    Array,
    Bandwidth,
    Mask,
    allocate_bandwidth,
    equal_shares,
    without_whom_soonest,
)
from strategies.wallclock.channel import (
    Devices,
    Profile,
    check_devices,
    efficiency_at,
    fading,
    harmonic_efficiency,
    resolve_profile,
    sample_devices,
)
from strategies.wallclock.clock import Clock, RoundTime, Work, by_client, reported
from strategies.wallclock.conditions import Conditions
from strategies.wallclock.objective import ClientProfiles

# Purposes of a client's generators: none shares its numbers with another, nor with other clients.
_DEVICE, _FADING, _CHANGE = range(3)
_BLOCK = 10


class SimulatedClock(Clock):
    """Time rounds as if every client were a device in a radio cell [D].

    A client computes for ``steps · (base_flops + rank_flops · rank) / speed`` seconds, then
    uploads its real bytes over its share of one band that the participants of the round divide
    among themselves. The way down is a broadcast of the model and is not counted.

    Speed, place and shadowing stay with a client, fading is drawn anew each round. All depend on
    the seed, the client's index and the round alone: not on how many clients there are, nor on
    who else takes part.

    A client that did not answer counts as if it had: the server waited for it.

    With a ``deadline``, ``forecast`` says who misses it, from the planned bytes and the number
    of steps each client did last time. ``finish`` keeps that verdict, since replies were dropped
    on it, and times the others by their real bytes and steps: a round with late clients lasts
    until the deadline, and beyond it only if somebody on time did more than was planned.

    Parameters
    ----------
    devices : Devices, Profile or str
        Devices of one's own (client ``i`` is row ``i``, counted from the start again when there
        are more clients than rows), or surroundings to draw them in, or the name of a profile.
        (default: "campus")
    base_flops, rank_flops : float
        A local step at rank ``k`` costs ``base_flops + rank_flops · k`` FLOPs, both ≥ 0; see
        `strategies.wallclock.flops`.
    steps : float
        Local steps a round of a client that never reported them, > 0. (default: 1)
    bandwidth : "optimal" or "equal"
        How the band is shared: so that the round is as short as possible, see
        `allocate_bandwidth`, or all the same. (default: "optimal")
    deadline : float
        Seconds after which a round ends; 0: none. With optimal shares as many clients as
        possible are kept, with equal shares those who are done by then. (default: 0)
    idle_seconds : float
        Time of a round in which nobody takes part, ≥ 0. (default: 1)
    seed : int
        Same seed, same devices and channels. (default: 42)
    bandwidth_hz : float, optional
        The band (Hz), > 0; signal-to-noise ratios stay as they are. (default: the profile's)
    change_round : int
        From this round on a share of the clients have less of the channel; 0: never.
        (default: 0)
    change_share : float
        Share of the clients that this happens to, in [0, 1]: as many of any ten in a row,
        rounded at random. (default: 0.5)
    change_factor : float
        What their spectral efficiency is multiplied by, > 0. (default: 0.1)
    availability : Availability, optional
        Who is there when. Who goes away before it is done is late, and the server hears of it at
        once: the round lasts until the others are done, and until all who go have gone.
        (default: everybody is always there)
    fixed_seconds : float
        What every reply takes beside, such as polling, ≥ 0; counts as computing. (default: 0)

    Raises
    ------
    ValueError
        If an argument is out of range or no such profile exists.
    """

    name: ClassVar[str] = "simulated"

    def __init__(
        self,
        devices: Devices | Profile | str = "campus",
        *,
        base_flops: float,
        rank_flops: float,
        steps: float = 1.0,
        bandwidth: Bandwidth = "optimal",
        deadline: float = 0.0,
        idle_seconds: float = 1.0,
        seed: int = 42,
        bandwidth_hz: float | None = None,
        change_round: int = 0,
        change_share: float = 0.5,
        change_factor: float = 0.1,
        availability: Availability | None = None,
        fixed_seconds: float = 0.0,
    ) -> None:
        self.devices = devices if isinstance(devices, Devices) else None
        if isinstance(devices, Devices):
            self.profile, self.label = devices.profile, f"{len(devices)} devices"
            check_devices(devices)
        else:
            self.profile = resolve_profile(devices)
            self.label = devices if isinstance(devices, str) else "own profile"
        self.bandwidth_hz = self.profile.bandwidth_hz if bandwidth_hz is None else bandwidth_hz
        problems = [
            f"{name} must be finite and {'> 0' if positive else '≥ 0'}, got {value!r}"
            for name, value, positive in (
                ("base_flops", base_flops, False),
                ("rank_flops", rank_flops, False),
                ("steps", steps, True),
                ("deadline", deadline, False),
                ("idle_seconds", idle_seconds, False),
                ("bandwidth_hz", self.bandwidth_hz, True),
                ("change_factor", change_factor, True),
                ("fixed_seconds", fixed_seconds, False),
            )
            if not (math.isfinite(value) and (value > 0 or (value == 0 and not positive)))
        ]
        problems += [
            f"{name} must be a whole number ≥ 0, got {value!r}"
            for name, value in (("seed", seed), ("change_round", change_round))
            if isinstance(value, bool) or not isinstance(value, int) or value < 0
        ]
        if bandwidth not in ("optimal", "equal"):
            problems.append(f"bandwidth must be 'optimal' or 'equal', got {bandwidth!r}")
        if not 0 <= change_share <= 1:
            problems.append(f"change_share must lie in [0, 1], got {change_share!r}")
        if problems:
            raise ValueError("invalid simulated clock: " + "; ".join(problems))
        self.base_flops, self.rank_flops = base_flops, rank_flops
        self.steps, self.bandwidth = steps, bandwidth
        self.deadline, self.idle_seconds, self.seed = deadline, idle_seconds, seed
        self.change_round, self.change_share = change_round, change_share
        self.change_factor, self.fixed_seconds = change_factor, fixed_seconds
        if availability is not None:
            self.availability = availability
        self._devices: dict[int, tuple[float, float, bool]] = {}
        self._steps: dict[int, float] = {}  # what each client did last
        # Of a round: who is late, and who of these goes away when.
        self._verdict: tuple[int, frozenset[int], Mapping[int, float]] = (0, frozenset(), {})

    def forecast(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time of a round as planned, and who will miss the deadline."""
        time = self._time(works, server_round, None)
        self._verdict = (server_round, time.late, time.gone)
        return time

    def finish(self, works: Sequence[Work], server_round: int) -> RoundTime:
        """Return the time of the round as it was; without a forecast of it, also who was late."""
        known = self._verdict[0] == server_round
        time = self._time(works, server_round, self._verdict[1:] if known else None)
        self.learn(works, server_round)
        return time

    def learn(self, works: Sequence[Work], server_round: int) -> None:
        """Learn how many steps each client does."""
        self._steps.update({work.client: self._steps_of(work) for work in works})

    def order(self, work: Work, server_round: int) -> tuple[float, float]:
        """Return the seconds that a client computes, and uploads alone on the whole band.

        For runs whose orders are no rounds; the fade is that of the round it was asked in.
        """
        snr, flops, changes = self._table([work.client])
        compute, upload = self._seconds([work], snr, flops, changes, server_round)
        return float(compute[0]), float(upload[0] / self.bandwidth_hz)

    def profiles(
        self,
        clients: Sequence[int],
        weights: Sequence[float],
        ranks: Sequence[Sequence[int]],
        upload_bytes: tuple[float, float],
        full_rank: int,
        server_round: int,
    ) -> ClientProfiles:
        """Return what a base station knows before a round: means over the fading, no fades."""
        fixed, per_rank = upload_bytes
        snr, flops, changes = self._table(clients)
        steps = [self._steps.get(client, self.steps) for client in clients]
        return ClientProfiles(
            weights=weights,
            base_seconds=self.base_flops / flops + self.fixed_seconds / np.maximum(steps, 1e-9),
            rank_seconds=self.rank_flops / flops,
            steps=steps,
            bits_per_rank=8 * per_rank,
            constant_bits=8 * max(fixed, 0.0),  # a difference: it may be below 0 by rounding
            spectral_efficiency=harmonic_efficiency(self.profile, snr)
            * self._change(changes, server_round),
            bandwidth_hz=self.bandwidth_hz,
            ranks=ranks,
            full_rank=full_rank,
            conditions=self._conditions(clients, snr),
        )

    def _conditions(self, clients: Sequence[int], snr: Array) -> Conditions | None:
        """Return what rounds are like; None where they are what the planner takes them for.

        With optimal shares and nothing else, the mean over the fading is enough.
        """
        away = not isinstance(self.availability, Always)
        if not (away or self.deadline or self.bandwidth == "equal"):
            return None
        usual = harmonic_efficiency(self.profile, snr)

        def slower(chances: Array) -> Array:
            gain = -np.log1p(-chances) if self.profile.rayleigh else np.ones_like(chances)
            factors: Array = usual / efficiency_at(self.profile, snr, gain)
            return factors

        return Conditions(
            bandwidth=self.bandwidth,
            deadline=self.deadline,
            there=self.availability.share(clients) if away else 1.0,
            slower=slower,
            left=partial(self.availability.left, clients) if away else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the steps that each client did last."""
        return {"steps": {str(client): steps for client, steps in self._steps.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._steps = {int(client): float(steps) for client, steps in state["steps"].items()}

    def summary(self) -> str:
        """Return the clock and its settings in one line."""
        parts = [f"{self.label}, {self.bandwidth_hz / 1e6:g} MHz, {self.bandwidth} shares"]
        if not isinstance(self.availability, Always):
            parts.append(self.availability.summary())
        if self.deadline:
            parts.append(f"deadline {self.deadline:g} s")
        if self.change_round:
            parts.append(
                f"channel x {self.change_factor:g} for {self.change_share:.0%} "
                f"from round {self.change_round}"
            )
        return f"{self.name} ({', '.join(parts)})"

    def _time(
        self,
        works: Sequence[Work],
        server_round: int,
        verdict: tuple[Collection[int], Mapping[int, float]] | None,
    ) -> RoundTime:
        works = by_client(works)
        if not works:
            return RoundTime(self.idle_seconds)
        clients = [work.client for work in works]
        compute, upload = self._seconds(works, *self._table(clients), server_round)
        if verdict is None:
            misses = self._misses(compute, upload)
            misses, gone = self._leave(clients, compute, upload, misses)
        else:
            misses = np.array([client in verdict[0] for client in clients])
            gone = {client: verdict[1][client] for client in clients if client in verdict[1]}
        kept = ~misses
        if self.bandwidth == "optimal":
            shares, seconds = allocate_bandwidth(compute[kept], upload[kept], self.bandwidth_hz)
            bottleneck = without_whom_soonest(compute, upload / self.bandwidth_hz)
        else:
            # Whoever will be late holds its share all the same.
            shares = equal_shares(compute, upload, self.bandwidth_hz)[0][kept]
            finish = compute + upload * len(works) / self.bandwidth_hz
            seconds = float(finish[kept].max(initial=0.0))
            bottleneck = int(finish.argmax())
        sending = np.divide(upload[kept], shares, out=np.zeros(kept.sum()), where=shares > 0)
        on_time = [client for client, stays in zip(clients, kept, strict=True) if stays]
        # Those who are only slow are waited for until the deadline, those who go until they do.
        slow = int(misses.sum()) > len(gone)
        return RoundTime(
            seconds=max(seconds, self.deadline if slow else 0.0, *gone.values()),
            bottleneck=clients[bottleneck],
            compute_seconds=dict(zip(clients, compute.tolist(), strict=True)),
            upload_seconds=dict(zip(on_time, sending.tolist(), strict=True)),
            late=frozenset(clients) - frozenset(on_time),
            gone=gone,
        )

    def _seconds(
        self, works: Sequence[Work], snr: Array, flops: Array, changes: Mask, server_round: int
    ) -> tuple[Array, Array]:
        """Return the seconds that each client computes, and uploads at unit bandwidth."""
        gain = np.concatenate(
            [fading(self.profile, self._rng(_FADING, server_round, w.client), 1) for w in works]
        )
        efficiency = efficiency_at(self.profile, snr, gain) * self._change(changes, server_round)
        step_flops = self.base_flops + self.rank_flops * np.array([work.rank for work in works])
        compute = np.array([self._steps_of(work) for work in works]) * step_flops / flops
        compute = compute + self.fixed_seconds
        return compute, 8 * np.array([work.upload_bytes for work in works]) / efficiency

    def _leave(
        self, clients: Sequence[int], compute: Array, upload: Array, misses: Mask
    ) -> tuple[Mask, dict[int, float]]:
        """Return who misses the round, and who of these goes away before it is done, and when.

        Whoever goes first is the first not to be done; the others then share the band anew.
        """
        present = self.availability.look(clients, self.now)
        left = np.where(present.here, present.until - self.now, 0.0)
        misses = misses.copy()
        if np.isinf(left).all():
            return misses, {}
        gone = np.zeros(len(clients), bool)
        if self.bandwidth == "equal":
            gone = left < compute + upload * len(clients) / self.bandwidth_hz
            gone &= ~misses | (left < self.deadline)
        else:
            gone = misses & (left < self.deadline)
            for client in np.argsort(left, kind="stable").tolist():
                kept = ~(misses | gone)
                seconds = allocate_bandwidth(compute[kept], upload[kept], self.bandwidth_hz)[1]
                if left[client] >= seconds:
                    break
                gone[client] = gone[client] or kept[client]
        when = {clients[i]: float(left[i]) for i in np.flatnonzero(gone).tolist()}
        return misses | gone, when

    def _misses(self, compute: Array, upload: Array) -> Mask:
        """Return who misses the deadline, shape (n,).

        To upload by then a client needs the share ``t / (D − τ)``: with optimal shares, those
        who need least are kept for as long as the band suffices, and no set is larger.
        """
        n = compute.size
        if not self.deadline:
            return np.zeros(n, bool)
        if self.bandwidth == "equal":
            return np.asarray(compute + upload * n / self.bandwidth_hz > self.deadline)
        left = self.deadline - compute
        need = np.full(n, np.inf)
        np.divide(upload, left, out=need, where=left > 0)
        need[(upload == 0) & (left == 0)] = 0.0
        order = np.argsort(need, kind="stable")
        late = np.ones(n, bool)
        late[order[np.cumsum(need[order]) <= self.bandwidth_hz]] = False
        return late

    def _steps_of(self, work: Work) -> float:
        if (steps := reported(work.steps)) is not None:
            return steps
        if work.client in self._steps or not self._steps:
            return self._steps.get(work.client, self.steps)
        return float(np.mean(list(self._steps.values())))  # as the others do

    def _table(self, clients: Sequence[int]) -> tuple[Array, Array, Mask]:
        """Return each client's mean SNR (dB), speed (FLOP/s), and whether its channel changes."""
        rows = np.array([self._device(client) for client in clients], np.float64)
        snr, flops, changes = rows.reshape(-1, 3).T.copy()
        return snr, flops, changes > 0

    def _device(self, client: int) -> tuple[float, float, bool]:
        if client not in self._devices:
            devices, row = self.devices, 0
            if devices is None:
                devices = sample_devices(self.profile, 1, self._rng(_DEVICE, client))
            else:
                row = client % len(devices)
            block, place = divmod(client, _BLOCK)
            rng = self._rng(_CHANGE, block)
            changes = (rng.permutation(_BLOCK)[place] + rng.random()) / _BLOCK < self.change_share
            snr, flops = devices.snr_db[row], devices.flops[row]
            self._devices[client] = float(snr), float(flops), bool(changes)
        return self._devices[client]

    def _change(self, changes: Mask, server_round: int) -> NDArray[np.float64]:
        happened = 0 < self.change_round <= server_round
        return np.where(changes & happened, self.change_factor, 1.0)

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=purpose))
