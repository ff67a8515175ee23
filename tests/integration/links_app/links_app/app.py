"""Clients sleep and send back what they got, in another rank each round.

Ranks are such that a transfer over a link of the config's ``rates`` (Mbit/s) takes from a part of
``longest`` seconds to all of it.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from strategies import FedLoRA
from strategies.client import bundled, register_identity, timed
from strategies.messages import to_record
from strategies.ranks import RankPolicy
from strategies.sampling import FractionSampling
from strategies.wallclock import HTBAllocator, MeasuredClock

WIDTH, MODULES = 512, 8
RANK_BYTES = 2 * WIDTH * MODULES * 4
SHARES = (0.15, 0.3, 0.5, 0.75, 1.0)  # of the longest transfer

server = ServerApp()
client = ClientApp(mods=[bundled, timed])
register_identity(client)


class EveryRank(RankPolicy):
    name = "every"

    def __init__(self, rates: list[float], longest: float, seed: int) -> None:
        self.seed = seed
        self.steps = [
            [max(round(1e6 / 8 * rate * longest * s / RANK_BYTES), 1) for s in SHARES]
            for rate in rates
        ]

    @property
    def max_rank(self) -> int:
        return max(map(max, self.steps))

    def choose(self, clients, server_round):
        rng = np.random.default_rng([self.seed, server_round])
        return [int(rng.choice(self.steps[c.index])) for c in clients]


@client.train()
def train(message: Message, context: Context) -> Message:
    seconds = float(context.run_config["seconds"])
    time.sleep(seconds)
    (arrays,) = message.content.array_records.values()
    metrics = MetricRecord({"num-examples": 1, "seconds": seconds, "steps": 1, "loss": 1.0})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    rates = [float(rate) for rate in str(config["rates"]).split(",")]
    policy = EveryRank(rates, float(config["longest"]), int(config["seed"]))
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for i in range(MODULES):
        key = f"base_model.model.layer.{i}.lora"
        arrays[f"{key}_A.weight"] = torch.randn(policy.max_rank, WIDTH, generator=generator)
        arrays[f"{key}_B.weight"] = torch.randn(WIDTH, policy.max_rank, generator=generator)
    folder = Path(str(config["output"]))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with (folder / "metrics.jsonl").open("w", buffering=1) as file:

        def tell(record):
            print(json.dumps({**record, "at": time.perf_counter() - began}), file=file)

        path = str(config["clock.allocate-with"])
        clock = MeasuredClock(
            allocator=HTBAllocator(path) if path else None,
            bandwidth=str(config["clock.bandwidth"]),
        )
        FedLoRA(
            ranks=policy,
            sampling=FractionSampling(float(config["fraction"])),
            clock=clock,
            min_available_nodes=len(rates),
            evaluate_fraction=0.0,
            scale=1.0,
            listeners=[tell],
        ).start(grid, to_record(arrays), num_rounds=int(config["rounds"]))
