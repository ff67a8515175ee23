"""What an event costs in virtual time, and whether memory grows with who is under way.

    python -m benchmarks.events [--clients 1000] [--messages 5000]

First the queue of events alone; then a run in the buffered mode on a grid in this process, whose
clients answer at once: by the profiler, what placing orders, the queue and looking for who is next
take of each message. Memory is what a run's peak is above its start, with few and with all clients
under way.
"""

import argparse
import cProfile
import logging
import math
import pstats
import tracemalloc
from time import perf_counter

import numpy as np

from benchmarks.many_clients import HIGH, Here, tiny
from benchmarks.measure import machine, table
from strategies import FedLoRA
from strategies.ranks import UniformRank
from strategies.round.waiting import Waiting
from strategies.sampling import FractionSampling
from strategies.wallclock import SimulatedClock
from strategies.wallclock.events import Events

BUFFER = 10
#: Where virtual time is kept.
OURS = ("events.py", "virtual.py", "flow.py", "outstanding.py", "lasting.py")


def queue_alone(clients: int, messages: int) -> float:
    """Return the seconds of a message, with all clients under way at all times."""
    rng = np.random.default_rng(0)
    needs = rng.exponential(size=(clients + messages, 2)).tolist()
    events = Events(float(clients))
    began = perf_counter()
    for key in range(clients + messages):
        if key >= clients:
            events.next()
        events.start(key, *needs[key], math.inf)
    return (perf_counter() - began) / (clients + messages)


def run(clients: int, busy: int, rounds: int) -> FedLoRA:
    """Run the buffered mode with so many busy of so many clients."""
    strategy = FedLoRA(
        aggregation="zero-padding", ranks=UniformRank(HIGH), scale=1.0, evaluate_fraction=0.0,
        sampling=FractionSampling(1.0), query=False,
        clock=SimulatedClock("phones", base_flops=1e9, rank_flops=1e7),
        waiting=Waiting(mode="buffered", buffer=BUFFER, busy=busy),
    )  # fmt: skip
    strategy.start(Here(clients), tiny(), rounds, timeout=60)
    return strategy


def main() -> None:
    """Print it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--messages", type=int, default=5000)
    asked = parser.parse_args()
    logging.getLogger("flwr").setLevel("ERROR")
    rounds = max(asked.messages // BUFFER, 1)
    print(machine())
    alone = queue_alone(asked.clients, asked.messages)
    profile = cProfile.Profile()
    began = perf_counter()
    profile.runcall(run, asked.clients, asked.clients // 2, rounds)
    whole = (perf_counter() - began) / (rounds * BUFFER)
    stats = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    own = sum(spent for (path, *_), (_, _, spent, *_) in stats if path.endswith(OURS))
    drawn, times = next((total, n) for (path, _, name), (_, n, _, total, _) in stats
                        if path.endswith("simulated.py") and name == "order")  # fmt: skip
    orders = rounds * BUFFER + asked.clients // 2
    rows = [
        ["the queue alone", f"{1e3 * alone:.3f}"],
        ["all of virtual time in a run, by the profiler", f"{1e3 * own / orders:.3f}"],
        ["an order's device, channel and fade, by the profiler", f"{1e3 * drawn / times:.3f}"],
        ["all the server does, with the profiler", f"{1e3 * whole:.3f}"],
    ]
    print(table(["milliseconds of each message", "ms"], rows))
    memory = []
    for busy in (asked.clients // 100, asked.clients):
        tracemalloc.start()
        run(asked.clients, busy, 3)
        memory.append([str(busy), f"{tracemalloc.get_traced_memory()[1] / 1e6:.1f}"])
        tracemalloc.stop()
    print(table(["clients under way", "peak MB of Python's memory"], memory))


if __name__ == "__main__":
    main()
