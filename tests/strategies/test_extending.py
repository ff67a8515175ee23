"""The examples of docs/extending.md: taken out of the page, imported, and put to work."""

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from strategies import FedLoRA
from strategies.aggregation import AGGREGATIONS, Replication, make_aggregator
from strategies.aggregation import register as register_rule
from strategies.clients import Client
from strategies.lora import Adapter
from strategies.messages import from_record, to_record
from strategies.ranks import RANK_POLICIES, UniformRank, make_rank_policy
from strategies.sampling import SAMPLERS, make_sampler
from tests.fakes import FakeGrid, message_reply, random_adapter, same

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
NODES = [11, 22, 33, 44, 55]
SCALE = 2.0


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Import every example as a module of its own; afterwards nobody knows of them."""
    folder = tmp_path_factory.mktemp("own")
    registries = (AGGREGATIONS, RANK_POLICIES, SAMPLERS)
    before = [dict(registry) for registry in registries]
    names = [f"own_example_{i}" for i in range(len(BLOCKS))]
    for name, code in zip(names, BLOCKS, strict=True):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield [importlib.import_module(name) for name in names]
    sys.path.remove(str(folder))
    for name in names:
        del sys.modules[name]
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_there_is_one_of_each_in_under_thirty_lines(own):
    assert len(BLOCKS) == 3
    for code in BLOCKS:
        assert len([line for line in code.splitlines() if line.strip()]) < 30
        assert max(len(line) for line in code.splitlines()) <= 100
    for registry, name in zip(
        (AGGREGATIONS, RANK_POLICIES, SAMPLERS), ("median", "by-rows", "turns"), strict=True
    ):
        assert registry[name].__module__.startswith("own_example")


# ----- the rule -----------------------------------------------------------------------------


def medians(adapters, current):
    """Loop over single numbers: the median over those that have one there."""
    pairs = {}
    for module, old in current.pairs.items():
        A, B = old.A.numpy().copy(), old.B.numpy().copy()
        sent = [a.pairs[module] for a in adapters]
        for index in np.ndindex(A.shape):
            held = [p.A[index].item() for p in sent if p.rank > index[0]]
            A[index] = np.median(held) if held else A[index]
        for index in np.ndindex(B.shape):
            held = [p.B[index].item() for p in sent if p.rank > index[1]]
            B[index] = np.median(held) if held else B[index]
        pairs[module] = (A, B)
    return pairs


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 2, 4, 4), (2, 5, 1, 3, 4)])
def test_the_rule_is_the_median_of_every_number(own, ranks):
    current = random_adapter(6, seed=99)
    adapters = [random_adapter(rank, seed=i) for i, rank in enumerate(ranks)]
    result = make_aggregator("median").aggregate(
        current, [(a, i + 1) for i, a in enumerate(adapters)]
    )
    for module, (A, B) in medians(adapters, current).items():
        pair = result.adapter.pairs[module]
        np.testing.assert_allclose(pair.A.numpy(), A, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(pair.B.numpy(), B, rtol=1e-6, atol=1e-6)
    head = sum((i + 1) * a.dense["head.bias"] for i, a in enumerate(adapters))
    total = sum(range(1, len(ranks) + 1))
    torch.testing.assert_close(result.adapter.dense["head.bias"], head / total)


def test_order_changes_nothing_and_one_hostile_client_little(own):
    rule, current = make_aggregator("median"), random_adapter(4, seed=9)
    adapters = [random_adapter(4, seed=i) for i in range(5)]
    honest = rule.aggregate(current, [(a, 1) for a in adapters]).adapter
    backwards = rule.aggregate(current, [(a, 1) for a in adapters[::-1]]).adapter
    for module, pair in honest.pairs.items():
        assert torch.equal(pair.A, backwards.pairs[module].A)
    huge = Adapter(
        {m: replace(p, A=p.A * 1e9) for m, p in adapters[0].pairs.items()}, adapters[0].dense
    )
    hit = rule.aggregate(current, [(huge, 1), *((a, 1) for a in adapters[1:])]).adapter
    bound = torch.stack([a.pairs["tall"].A for a in adapters[1:]]).abs().max()
    assert hit.pairs["tall"].A.abs().max() <= bound


# ----- the policy and the sampler -----------------------------------------------------------


def test_ranks_follow_the_rows_once_they_are_known(own):
    policy = make_rank_policy("by-rows", low=2, high=16)
    unknown = [Client(100 + i, i) for i in range(3)]
    assert policy.assign(unknown, 1) == {100: 2, 101: 2, 102: 2}
    rows = [Client(7, 0, num_examples=10), Client(8, 1, num_examples=80), Client(9, 2, 4, 40)]
    assert policy.assign(rows, 2) == {7: 2, 8: 16, 9: 4}  # the last one's device holds 4


@pytest.mark.parametrize(("n", "size"), [(5, 2), (4, 4), (3, 7), (1, 1)])
def test_everyone_is_asked_equally_often(own, n, size):
    clients = [Client(100 + i, i) for i in range(n)]
    sampler, rng = make_sampler("turns", size=size), np.random.default_rng(0)
    asked = [c.index for t in range(1, n + 1) for c in sampler.sample(clients, t, rng)]
    counts = np.bincount(asked, minlength=n)
    assert (counts == min(size, n)).all()


# ----- a run --------------------------------------------------------------------------------


def client(message):
    if message.metadata.message_type == "query":
        return RecordDict({"properties": ConfigRecord({})})
    node = message.metadata.dst_node_id
    if message.metadata.message_type == "evaluate":
        return RecordDict({"metrics": MetricRecord({"num-examples": 5, "loss": 1.0})})
    adapter = Adapter.from_state_dict(from_record(message.content["arrays"]), SCALE)
    g = torch.Generator().manual_seed(node)
    state = adapter.to_state_dict()
    trained = {k: v + torch.randn(v.shape, generator=g) for k, v in state.items()}
    return message_reply(Adapter.from_state_dict(trained, SCALE), weight=node)


def run(rounds=5, shuffle=None):
    listener = []
    strategy = FedLoRA(
        aggregation="median",
        ranks=make_rank_policy("by-rows", low=2, high=4),
        sampling=make_sampler("turns", size=2),
        scale=SCALE,
        listeners=[listener.append],
    )
    rng = None if shuffle is None else np.random.default_rng(shuffle)
    grid = FakeGrid(NODES, client, rng=rng)
    start = to_record(random_adapter(4, seed=0).to_state_dict())
    return strategy.start(grid, start, num_rounds=rounds, timeout=5), listener, grid


def test_all_three_in_one_run(own):
    result, records, grid = run()
    asked = [m.metadata.dst_node_id for m in grid.sent if m.metadata.message_type == "train"]
    assert asked == [11, 22, 33, 44, 11, 55, 22, 33, 44, 55]
    assert all(r["status"] == "ok" for r in records if r["kind"] == "client")
    ranks = [r["rank"] for r in records if r["kind"] == "client"]
    assert ranks[:2] == [2, 2]
    assert max(ranks) == 4  # once rows are known
    first = Adapter.from_state_dict(from_record(result.arrays), SCALE)
    again = Adapter.from_state_dict(from_record(run(shuffle=3)[0].arrays), SCALE)
    assert same(first, again)


def test_the_rule_refuses_coins_before_anything_is_sent(own):
    strategy = FedLoRA(aggregation="median", ranks=UniformRank(4), sampling="independent")
    grid = FakeGrid(NODES, client)
    with pytest.raises(ValueError, match="Median does not declare that it stays unbiased"):
        strategy.start(grid, to_record(random_adapter(4, seed=0).to_state_dict()), num_rounds=1)
    assert not grid.sent


# ----- registering --------------------------------------------------------------------------


def test_a_taken_or_missing_name_is_refused(own):
    class Mine(Replication):
        pass

    with pytest.raises(ValueError, match=r"'replication' belongs to .*averaging\.Replication"):
        register_rule(Mine)
    assert AGGREGATIONS["replication"] is Replication
    Mine.name = ""
    with pytest.raises(ValueError, match="expected a name"):
        register_rule(Mine)


def test_a_module_loaded_again_replaces_its_own(own):
    before = AGGREGATIONS["median"]
    importlib.reload(own[0])
    assert AGGREGATIONS["median"] is not before
