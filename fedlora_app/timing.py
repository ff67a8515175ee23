"""The clock of a run config: what the keys say, and the work of a step, counted on the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedlora_app.config.keys import ConfigError, RunConfig
from strategies.capacity import RankCost
from strategies.client import adapter_state, load_adapter
from strategies.lora import Adapter
from strategies.losses import autocast_type, on_device
from strategies.seeding import stream
from strategies.wallclock import (
    ALLOCATORS,
    PROFILES,
    Clock,
    Devices,
    MeasuredClock,
    SimulatedClock,
    devices_from_csv,
    make_availability,
    rank_flops,
    rank_memory,
)

if TYPE_CHECKING:
    from peft import PeftModel

    from fedlora_app.tasks import Inputs


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
        self.config, self.keys = config, config.clock
        self.devices: Devices | str = self.keys.profile
        if self.keys.simulated and self.keys.profile not in PROFILES:
            path = Path(self.keys.profile).expanduser()
            if not path.is_file():
                raise ValueError(
                    f"expected measured, {', '.join(PROFILES)} or a csv file; got "
                    f"{self.keys.profile!r}"
                )
            self.devices = devices_from_csv(path, self.keys.surroundings)
        try:
            self.availability = make_availability(
                self.keys.availability,
                rng=stream(config.seed, "availability"),
                **self.keys.availability_settings(),
            )
        except (TypeError, ValueError, OSError) as error:
            raise ConfigError([f"clock.availability: {error}"]) from error
        self.allocator = None
        if self.keys.allocator != "none":
            try:
                self.allocator = ALLOCATORS.make(self.keys.allocator, self.keys.allocate_with)
            except ValueError as error:
                raise ConfigError([f"clock.allocator, clock.allocate-with: {error}"]) from error

    def clock_on(
        self, model: PeftModel, inputs: Inputs, config: RunConfig, *, max_rank: int, blind: bool
    ) -> Clock:
        """Return the clock of a run, with the FLOPs of a training step as counted on its model.

        Parameters
        ----------
        model : PeftModel
        inputs : Inputs
            Rows of which the largest makes a batch.
        config : RunConfig
            With the precision that this machine computes in.
        max_rank : int
            The largest rank a client trains.
        blind : bool
            Whether nobody looks at the clock, so that a measured one need not know what a rank
            costs.
        """
        if blind and not self.keys.simulated:
            return self.measured(0.0)
        ranks = (1, max(2, max_rank))
        base, per_rank = rank_flops(lambda rank: training_step(model, inputs, config, rank), *ranks)
        if config.method == "head":
            per_rank = 0.0
        if not self.keys.simulated:
            return self.measured(per_rank / base)
        steps = float(config.train.steps or 1)
        return self.clock(base_flops=base, rank_flops=per_rank, steps=steps)

    def measured(self, rank_share: float) -> MeasuredClock:
        """Return the measured clock; see there for ``rank_share``."""
        return MeasuredClock(
            rank_share=rank_share,
            shared_band=self.keys.shared_band,
            bandwidth=self.keys.bandwidth if self.allocator else "equal",
            allocator=self.allocator,
        )

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
            seed=self.config.seed,
            availability=self.availability,
            fixed_seconds=c.fixed_seconds,
        )


def rank_cost(model: PeftModel, inputs: Inputs, config: RunConfig, *, max_rank: int) -> RankCost:
    """Return what a rank costs a node in a round, counted on the model with its largest rows.

    See ``Timing.clock_on`` for the parameters.
    """

    def step_at(rank: int) -> Callable[[], None]:
        return training_step(model, inputs, config, rank)

    ranks = (1, max(2, max_rank))
    base, per_rank = rank_flops(step_at, *ranks)
    steps = float(config.train.steps or 1)
    return RankCost(base, per_rank, steps, *rank_memory(step_at, model, *ranks))


def training_step(
    model: PeftModel, inputs: Inputs, config: RunConfig, rank: int
) -> Callable[[], None]:
    """Return one training step at a rank, forward and backward, on a batch of the largest rows."""
    adapter = Adapter.from_state_dict(
        {k: t.clone() for k, t in adapter_state(model).items()}, config.lora.scale
    )
    load_adapter(model, adapter.with_rank(rank))
    largest = int(np.argmax(inputs.sizes))
    device = next(model.parameters()).device
    batch = on_device(inputs.batch([largest] * config.train.batch_size), device)

    dtype = autocast_type(config.train.precision)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()

    return step
