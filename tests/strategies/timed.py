"""A grid whose nodes take their time, by a clock of the test's own."""

from collections.abc import Callable

import torch
from flwr.app import Error, MetricRecord, RecordDict

from strategies import FedLoRA
from strategies.messages import from_record, to_record
from strategies.ranks import UniformRank
from strategies.round import flow
from strategies.sampling import FractionSampling
from tests.fakes import FakeGrid, query_reply, random_adapter

UNHEARD = 1e9


class Clock:
    """The seconds of a test: they go by when somebody sleeps."""

    def __init__(self, monkeypatch):
        from strategies import transport
        from strategies.round import orders

        self.now = 0.0
        for module in (transport, flow, orders):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds):
        self.now += seconds


class TimedGrid(FakeGrid):
    """Node i needs ``seconds(i, round)`` for training, and nothing for the rest.

    It adds ``i + 1`` to every number it is sent.
    """

    def __init__(self, clock, nodes, seconds: Callable[[int, int], float], partition=None):
        super().__init__(nodes, self.answer)
        self.clock, self.seconds = clock, seconds
        self.partition = partition or {node: i for i, node in enumerate(nodes)}
        self.due: dict[str, float] = {}
        self.trained: list[tuple[int, int]] = []  # index and round, in the order they were sent
        self.lost: set[int] = set()

    def push_messages(self, messages):
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for i, message in zip(ids, messages, strict=True):
            self.due[i] = self.clock.now
            if message.metadata.message_type == "train":
                index = self.partition[message.metadata.dst_node_id]
                server_round = int(message.content["config"]["server-round"])
                self.due[i] += self.seconds(index, server_round)
                self.trained.append((index, server_round))
        return ids

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        for i in ids:  # the SuperLink tells of nodes that are gone
            there = self._replies.get(i)
            if there is not None and there.metadata.src_node_id in self.lost:
                there.__dict__["_content"] = None
                there.__dict__["_error"] = Error(5, "Error: Node Unavailable")
                self.due[i] = 0.0
        return super().pull_messages([i for i in ids if self.due[i] <= self.clock.now])

    def answer(self, message):
        index = self.partition[message.metadata.dst_node_id]
        if message.metadata.message_type == "query":
            return query_reply(**{"partition-id": index, "num-examples": 10})
        if message.metadata.message_type == "evaluate":
            return RecordDict({"metrics": MetricRecord({"num-examples": 10, "loss": 1.0})})
        sent = from_record(message.content["arrays"])
        moved = {key: tensor + index + 1 for key, tensor in sent.items()}
        metrics = MetricRecord({"num-examples": 10, "loss": 0.5, "steps": 3, "seconds": 0.1})
        return RecordDict({"arrays": to_record(moved), "metrics": metrics})


def start(grid, rounds, *, timeout=3600, rank=2, **options):
    """Return the strategy, its records, and how far every number has moved."""
    found: list[dict] = []
    settings = {
        "aggregation": "zero-padding", "ranks": UniformRank(rank), "scale": 2.0,
        "sampling": FractionSampling(1.0), "evaluate_fraction": 0.0, "listeners": [found.append],
    }  # fmt: skip
    strategy = FedLoRA(**{**settings, **options})
    initial = random_adapter(rank, seed=9)
    result = strategy.start(grid, to_record(initial.to_state_dict()), rounds, timeout=timeout)
    return strategy, found, moved(initial, result.arrays)


def moved(initial, arrays):
    before, after = initial.to_state_dict(), from_record(arrays)
    ends = torch.cat([(after[k] - before[k]).flatten() for k in before])
    assert torch.allclose(ends, ends[0].expand(len(ends)), atol=1e-4), ends
    return float(ends[0])


def books(found, kind="round"):
    return [r for r in found if r["kind"] == kind and r["round"]]
