"""What ten thousand clients cost the server: beside Flower's FedAvg, with the same arrays.

    python -m benchmarks.many_clients [--nodes 10000] [--asked 100] [--rounds 10] [--ray 1000]

First on a grid in this process, whose clients answer at once, so that nothing but the strategies is
seen; then, with ``--ray N``, on Flower's own simulation of N clients whose app does nothing. On
either, FedAvg on the same grid is what Flower itself takes for the same messages.
"""

import argparse
import gc
import itertools
import logging
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.measure import machine, seconds, table
from strategies import FedLoRA
from strategies.checkpoint import Checkpoints
from strategies.client import register_profile
from strategies.lora import Adapter, LoraPair
from strategies.messages import from_record, to_record
from strategies.proxy_grid import identify
from strategies.ranks import AutoRank
from strategies.sampling import FractionSampling, IndependentSampling, PlannedSampling, Sampler
from strategies.saving import Saver
from strategies.wallclock import SimulatedClock

SHOWN = (1, 5, 10)
LOW, HIGH = 2, 8


def tiny(rank: int = HIGH) -> ArrayRecord:
    """Return the initial arrays of a model of two small modules and a head."""
    g = torch.Generator().manual_seed(0)
    pairs = {
        name: LoraPair(torch.randn(rank, 32, generator=g), torch.zeros(32, rank), 1.0)
        for name in ("query", "value")
    }
    return to_record(Adapter(pairs, {"head.bias": torch.zeros(4)}).to_state_dict())


# ----- clients that do nothing -------------------------------------------------------------------

app = ClientApp()
_trained: dict[tuple[str, ...], ArrayRecord] = {}


@app.train()
def train(message: Message, context: Context) -> Message:
    """Send back arrays like those that came."""
    return Message(answer(message), reply_to=message)


def answer(message: Message) -> RecordDict:
    """Return a training reply: the same arrays, moved a little, made once for each rank."""
    (arrays,) = message.content.array_records.values()
    key = tuple(f"{name} {array.shape}" for name, array in arrays.items())
    if key not in _trained:
        _trained[key] = to_record({k: t + 0.01 for k, t in from_record(arrays).items()})
    metrics = MetricRecord({"num-examples": 10, "loss": 0.5})
    return RecordDict({"arrays": _trained[key], "metrics": metrics})


def measured(i: int) -> tuple[list[float], list[int]]:
    """Return losses and labels of a client, as various as ten thousand are."""
    return [1.0 + ((i * 37 + j * j) % 101) / 50 for j in range(4)], [0, i % 2, i % 3, i % 5]


register_profile(app, lambda context: measured(int(context.node_config["partition-id"])))


class Here(Grid):
    """A grid without a network: every client answers at once, in this process."""

    def __init__(self, nodes: int) -> None:
        identify()
        self.contexts = {
            1000 + i: Context(1, 1000 + i, {"partition-id": i}, RecordDict(), {})
            for i in range(nodes)
        }
        self.nodes = list(self.contexts)
        self.pushes = self.queries = 0
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.pushes += 1
        ids = []
        for message in messages:
            ids.append(str(next(self._ids)))
            message.metadata.__dict__["_message_id"] = ids[-1]
            if message.metadata.message_type == "query":
                self.queries += 1
                reply = app(message, self.contexts[message.metadata.dst_node_id])
            else:
                reply = Message(answer(message), reply_to=message)
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(list(messages)))

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError


# ----- strategies that look at the clock ---------------------------------------------------------


class Ours(FedLoRA):
    """FedLoRA that notes when each round was over, and what it held then."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.over: list[float] = []
        self.memory: list[tuple[float, float]] = []
        self.census_seconds = 0.0
        take = self.census.take

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            clients = take(*args)
            self.census_seconds = self.census_seconds or time.perf_counter() - began
            return clients

        self.census.take = timed  # type: ignore[method-assign]

    def round_over(self, server_round: int, result: Any) -> None:
        super().round_over(server_round, result)
        if tracemalloc.is_tracing():
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
            self.memory.append((held, psutil.Process().memory_info().rss))
        self.over.append(time.perf_counter())


class Flowers(FedAvg):
    """Flower's FedAvg that notes when each round was over."""

    def __init__(self, nodes: int, asked: int) -> None:
        super().__init__(
            asked / nodes, 0.0, min_train_nodes=asked, min_evaluate_nodes=0,
            min_available_nodes=nodes,
        )  # fmt: skip
        self.over: list[float] = []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        result = super().aggregate_train(server_round, replies)
        self.over.append(time.perf_counter())
        return result


def a_round(over: list[float]) -> float:
    """Return the median seconds between the ends of rounds, the first (and its census) left out."""
    return median(b - a for a, b in itertools.pairwise(over[1:] or over))


def run_ours(grid: Grid, nodes: int, asked: int, rounds: int, **options: Any) -> Ours:
    settings: dict[str, Any] = {
        "aggregation": "zero-padding",
        "ranks": AutoRank(LOW, HIGH),
        "sampling": FractionSampling(clients=asked),
        "evaluate_fraction": 0.0,
        "min_available_nodes": nodes,
        "query_timeout": 600.0,  # all of them together
    }
    strategy = Ours(**{**settings, **options})
    strategy.start(grid, tiny(), num_rounds=rounds, timeout=600)
    if not strategy.round.accepted:
        raise RuntimeError("nothing was accepted")
    return strategy


def run_flowers(grid: Grid, nodes: int, asked: int, rounds: int) -> Flowers:
    strategy = Flowers(nodes, asked)
    strategy.start(grid, tiny(), num_rounds=rounds, timeout=600)
    return strategy


# ----- what is measured --------------------------------------------------------------------------


def samplers(asked: int, nodes: int) -> dict[str, Callable[[], Sampler]]:
    return {
        "a number of clients": lambda: FractionSampling(clients=asked),
        "independent coins": lambda: IndependentSampling(asked / nodes),
        "planned, simulated clock": lambda: PlannedSampling(
            alpha=1.0, beta=100.0, q_min=asked / nodes
        ),
    }


def in_this_process(nodes: int, asked: int, rounds: int) -> None:
    flower = a_round(run_flowers(Here(nodes), nodes, asked, rounds + 1).over) / asked
    rows = []
    for name, sampler in samplers(asked, nodes).items():
        clock = {"clock": SimulatedClock(base_flops=1e9, rank_flops=1e7)} if "clock" in name else {}
        grid = Here(nodes)
        run = run_ours(grid, nodes, asked, rounds + 1, sampling=sampler(), **clock)
        chosen = len(run.round.assignments)
        one = a_round(run.over) / max(chosen, 1)
        rows.append(
            [name, seconds(run.census_seconds), f"{grid.queries}", f"{chosen}", seconds(one),
             seconds(one - flower)]
        )  # fmt: skip
    print(f"On a grid in this process, {nodes} clients, about {asked} a round, ranks by AutoRank.")
    print(f"Flower's FedAvg with the same arrays: {seconds(flower)} a message.\n")
    head = ["sampler", "census", "queries", "asked", "a message", "beside FedAvg"]
    print(table(head, rows))


def memory(nodes: int, asked: int, rounds: int) -> None:
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Checkpoints(Path(folder), every=1, keep=1), fingerprint={})
        run = run_ours(Here(nodes), nodes, asked, rounds, saver=saver)
        saved = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    tracemalloc.stop()
    print(f"Held by the server after a round, with a checkpoint of each ({saved / 2**20:.1f} MiB "
          "on disk for the last ones); traced from before the clients are made.\n")  # fmt: skip
    head = ["after round", "Python objects", "resident"]
    rows = [
        [str(r), *(f"{value / 2**20:.1f} MiB" for value in run.memory[r])]
        for r in SHOWN if r < len(run.memory)
    ]  # fmt: skip
    print(table(head, rows))


def on_ray(nodes: int, asked: int, rounds: int) -> None:
    found: dict[str, Any] = {}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        before = run_flowers(grid, nodes, asked, rounds)
        found["ours"] = run_ours(grid, nodes, asked, rounds)
        after = run_flowers(grid, nodes, asked, rounds)
        found["flower"] = [before, after]

    run_simulation(server, app, nodes, backend_config={"client_resources": {"num_cpus": 1}})
    ours = found["ours"]
    flower = [a_round(run.over) / asked for run in found["flower"]]
    own = a_round(ours.over) / asked
    print(f"On Flower's simulation, {nodes} clients, {asked} a round.\n", flush=True)
    rows = [
        ["census and profiles, a client", seconds(ours.census_seconds / nodes)],
        ["ours, a message", seconds(own)],
        ["FedAvg before and after, a message", " and ".join(map(seconds, flower))],
        ["ours beside FedAvg, a message", seconds(own - sum(flower) / 2)],
    ]
    print(table(["", "time"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ray", type=int, default=0, metavar="NODES")
    args = parser.parse_args()
    where = machine()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    print(f"{where}\n")
    in_this_process(args.nodes, args.asked, args.rounds)
    memory(args.nodes, args.asked, args.rounds)
    if args.ray:
        on_ray(args.ray, min(args.asked, args.ray), args.rounds)


if __name__ == "__main__":
    main()
