"""What the server holds during a round does not grow with the clients, but for indices."""

import tracemalloc

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from strategies import FedLoRA
from strategies.aggregation import FSLoRA
from strategies.messages import to_record
from strategies.ranks import ListRank, UniformRank
from tests.fakes import FakeGrid, random_adapter

SHAPES = {"one": (4000, 3000), "two": (3000, 4000)}


def start(rule, ranks, clients, wire="float32"):
    """A strategy, its messages and the bytes of an adapter, as in a round of our own loop."""
    strategy = FedLoRA(aggregation=rule, ranks=ranks, query=False, wire_dtype=wire)
    strategy.led = True
    arrays = to_record(random_adapter(8, seed=0, shapes=SHAPES).to_state_dict())
    grid = FakeGrid(range(1, clients + 1), lambda message: None)
    return strategy, lambda: strategy.configure_train(1, arrays, ConfigRecord(), grid), arrays


def answered(messages):
    """Every client returns what it got, one after the other."""
    for message in messages:
        metrics = MetricRecord({"num-examples": 5, "loss": 1.0})
        content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
        yield Message(content, reply_to=message)


@pytest.mark.parametrize("rule", ["fslora", "rbla", "fedex"])
def test_a_round_holds_a_few_adapters_whatever_the_number_of_clients(rule):
    strategy, configure, arrays = start(rule, UniformRank(8), clients=60)
    size = sum(len(a.data) for a in arrays.values())
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        messages = configure()
        planned, _ = tracemalloc.get_traced_memory()
        strategy.aggregate_train(1, answered(messages))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert strategy.round.accepted == 60
    assert planned - before < 10 * size
    assert peak - before < 20 * size  # all at once would be above 60


@pytest.mark.parametrize("wire", ["float32", "float16", "int8"])
def test_what_is_made_twice_is_the_same(wire):
    """A sketch is drawn to be sent and again to be read: the untrained model stays as it was."""
    strategy, configure, arrays = start("fslora", ListRank([2, 5, 8], cycle=True), 6, wire)
    twice = [list(configure()), list(configure())]
    for one, two in zip(*twice, strict=True):
        for name, array in one.content["arrays"].items():
            assert array.data == two.content["arrays"][name].data
    result, _ = strategy.aggregate_train(1, answered(twice[1]))
    assert strategy.round.accepted == 6
    for name, array in arrays.items():
        if "lora" in name:
            assert result[name].data == array.data


def test_strategies_around_get_a_list():
    strategy, configure, _ = start("fslora", UniformRank(8), 3)
    strategy.led = False  # as in the loop of Flower, or of a strategy around
    assert len(list(configure())) == 3
    assert isinstance(configure(), list)


class Forgetful(FSLoRA):
    """Draws from a generator of its own."""

    name = "forgetful"
    unbiased = True

    def __init__(self):
        super().__init__(ratio=0.5)
        self.own = np.random.default_rng(0)

    def download(self, current, rank, rng):
        return super().download(current, rank, self.own)


def test_a_rule_that_draws_otherwise_the_second_time_is_named():
    _, configure, _ = start(Forgetful(), UniformRank(8), 2)
    with pytest.raises(RuntimeError, match="forgetful: download gave something else"):
        list(configure())
