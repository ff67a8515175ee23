"""The clock of a run config: what the keys say, and the work of a step that is counted later."""

from __future__ import annotations

from pathlib import Path

from fedlora_app.config import RunConfig
from strategies.wallclock import PROFILES, Devices, SimulatedClock, devices_from_csv


class Timing:
    """How long rounds take, as far as it is known before a model is there to count on.

    Parameters
    ----------
    config : RunConfig

    Raises
    ------
    OSError or ValueError
        If the devices are neither a profile nor in a file that can be used.
    """

    def __init__(self, config: RunConfig) -> None:
        self.keys = config.clock
        self.seed = config.seed
        self.devices: Devices | str = self.keys.profile
        if self.keys.simulated and self.keys.profile not in PROFILES:
            path = Path(self.keys.profile).expanduser()
            if not path.is_file():
                raise ValueError(
                    f"expected measured, {', '.join(PROFILES)} or a csv file; got "
                    f"{self.keys.profile!r}"
                )
            self.devices = devices_from_csv(path, self.keys.surroundings)

    @property
    def simulated(self) -> bool:
        """Whether the seconds are those of devices that are not there."""
        return self.keys.simulated

    def clock(self, *, base_flops: float, rank_flops: float, steps: float) -> SimulatedClock:
        """Return the simulated clock for work of this size."""
        c = self.keys
        return SimulatedClock(
            self.devices,
            base_flops=base_flops,
            rank_flops=rank_flops,
            steps=steps,
            bandwidth="equal" if c.bandwidth == "equal" else "optimal",
            bandwidth_hz=c.bandwidth_mhz * 1e6 or None,
            deadline=c.deadline,
            idle_seconds=c.idle_seconds,
            change_round=c.change_round,
            change_share=c.change_share,
            change_factor=c.change_factor,
            seed=self.seed,
        )
