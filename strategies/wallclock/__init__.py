"""The wall clock: how long a round takes, how many are needed, and the plan that ends soonest."""

from strategies.wallclock.allocators import (
    ALLOCATORS,
    BandwidthAllocator,
    CommandAllocator,
    HTBAllocator,
    Share,
)
from strategies.wallclock.availability import AVAILABILITIES, Always, Availability, Presence
from strategies.wallclock.bandwidth import (
    allocate_bandwidth,
    batch_round_seconds,
    equal_shares,
    simulate_round_time,
)
from strategies.wallclock.baselines import statistical_q, uniform_q, weighted_q
from strategies.wallclock.buffered import BufferedTime, buffered_time
from strategies.wallclock.channel import (
    PROFILES,
    Devices,
    Profile,
    devices_from_csv,
    sample_devices,
    spectral_efficiency,
)
from strategies.wallclock.choosing import Choice, choose_way
from strategies.wallclock.clock import Clock, RoundTime, Work
from strategies.wallclock.comings import Diurnal, Exponential
from strategies.wallclock.conditions import Conditions
from strategies.wallclock.convergence import (
    ConvergenceEstimate,
    Pilot,
    estimate_convergence,
    rounds_to_target,
    sampling_variance,
)
from strategies.wallclock.flops import rank_flops, training_flops
from strategies.wallclock.intervals import Intervals
from strategies.wallclock.measured import MeasuredClock
from strategies.wallclock.memory import rank_memory, saved_bytes
from strategies.wallclock.objective import ClientProfiles
from strategies.wallclock.planner import Plan, plan
from strategies.wallclock.registry import CLOCKS, make_availability, make_clock
from strategies.wallclock.retime import retime
from strategies.wallclock.simulated import SimulatedClock

__all__ = [
    "ALLOCATORS",
    "AVAILABILITIES",
    "CLOCKS",
    "PROFILES",
    "Always",
    "Availability",
    "BandwidthAllocator",
    "BufferedTime",
    "Choice",
    "ClientProfiles",
    "Clock",
    "CommandAllocator",
    "Conditions",
    "ConvergenceEstimate",
    "Devices",
    "Diurnal",
    "Exponential",
    "HTBAllocator",
    "Intervals",
    "MeasuredClock",
    "Pilot",
    "Plan",
    "Presence",
    "Profile",
    "RoundTime",
    "Share",
    "SimulatedClock",
    "Work",
    "allocate_bandwidth",
    "batch_round_seconds",
    "buffered_time",
    "choose_way",
    "devices_from_csv",
    "equal_shares",
    "estimate_convergence",
    "make_availability",
    "make_clock",
    "plan",
    "rank_flops",
    "rank_memory",
    "retime",
    "rounds_to_target",
    "sample_devices",
    "sampling_variance",
    "saved_bytes",
    "simulate_round_time",
    "spectral_efficiency",
    "statistical_q",
    "training_flops",
    "uniform_q",
    "weighted_q",
]
