"""The wall clock: how long a round takes, how many are needed, and the plan that ends soonest."""

from strategies.wallclock.bandwidth import (
    allocate_bandwidth,
    batch_round_seconds,
    equal_shares,
    simulate_round_time,
)
from strategies.wallclock.baselines import statistical_q, uniform_q, weighted_q
from strategies.wallclock.channel import (
    PROFILES,
    Devices,
    Profile,
    devices_from_csv,
    sample_devices,
    spectral_efficiency,
)
from strategies.wallclock.convergence import (
    ConvergenceEstimate,
    Pilot,
    estimate_convergence,
    rounds_to_target,
    sampling_variance,
)
from strategies.wallclock.objective import ClientProfiles
from strategies.wallclock.planner import Plan, plan

__all__ = [
    "PROFILES",
    "ClientProfiles",
    "ConvergenceEstimate",
    "Devices",
    "Pilot",
    "Plan",
    "Profile",
    "allocate_bandwidth",
    "batch_round_seconds",
    "devices_from_csv",
    "equal_shares",
    "estimate_convergence",
    "plan",
    "rounds_to_target",
    "sample_devices",
    "sampling_variance",
    "simulate_round_time",
    "spectral_efficiency",
    "statistical_q",
    "uniform_q",
    "weighted_q",
]
