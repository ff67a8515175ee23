"""What was learned of a nameless node is not held against whoever has its place next."""

import pytest

from strategies import FedLoRA
from strategies.clients import Roster
from strategies.lora import Adapter
from strategies.messages import to_record
from strategies.ranks import AutoRank, QualityRank, SelfPruningRank, UniformRank
from strategies.trained import Trained
from tests.fakes import FakeGrid, query_reply, random_adapter
from tests.strategies.test_participation import books, client

ROWS = {1: 50, 2: 300, 3: 5000}  # of the site that the last digit of a node id stands for
BACK = [103, 202, 301]  # sorted, they are another order of sites than before


def site(message, *, named):
    node = message.metadata.dst_node_id
    index = node % 10
    if message.metadata.message_type == "query":
        own = {"partition-id": index} if named else {}
        if message.content["config"].get("profile"):
            numbers = {"loss-entropy": 1.0 * index, "label-entropy": 0.3 * index}
            return query_reply(**own, **numbers, **{"gini-simpson": 0.1 * index})
        return query_reply(**own)
    reply = client(message, partition={node: index})
    reply["metrics"]["num-examples"] = ROWS[index]
    return reply


def run(ranks, *, named=False, nodes=(11, 22, 33), rounds=4):
    """All nodes come back under new ids after two rounds."""
    grid = FakeGrid(list(nodes), lambda message: site(message, named=named))
    records = []

    def move(record):
        if record["kind"] == "round" and record["round"] == 2:
            grid.nodes[:] = BACK

    strategy = FedLoRA(
        ranks=ranks, scale=2.0, evaluate_fraction=0.0, listeners=[move, records.append]
    )
    start = to_record(random_adapter(4, seed=0).to_state_dict())
    strategy.start(grid, start, num_rounds=rounds, timeout=1)
    return records, strategy, grid


@pytest.mark.parametrize("named", [False, True])
def test_no_honest_count_is_refused_because_of_who_had_the_place_before(named):
    records, strategy, _ = run(UniformRank(4), named=named)
    assert [r["accepted"] for r in books(records)] == [3, 3, 3, 3]
    counts = {c.node_id: c.num_examples for c in strategy.roster.present(BACK)}
    assert counts == {node: ROWS[node % 10] for node in BACK}


def test_a_node_that_names_itself_is_still_held_to_its_first_count():
    records, strategy, _ = run(UniformRank(4), named=True)
    with pytest.raises(ValueError, match="num-examples is 501, but this node reported 50 before"):
        strategy.participation.guard.check_count(1, 501)
    assert books(records)


@pytest.mark.parametrize(("named", "asked"), [(False, 6), (True, 3)])
def test_a_profile_belongs_to_the_rows_it_was_made_of(named, asked):
    records, strategy, grid = run(AutoRank(1, 4), named=named)
    profiled = [
        m for m in grid.sent
        if m.metadata.message_type == "query" and m.content["config"].get("profile")
    ]  # fmt: skip
    assert len(profiled) == asked
    told = {c["client"]: c for c in books(records, "ranks")[-1]["clients"]}
    here = {c.node_id: told[c.index] for c in strategy.roster.present(BACK)}
    assert [here[node]["loss-entropy"] for node in BACK] == [3.0, 2.0, 1.0]
    assert here[103]["rank"] > here[301]["rank"]


def test_scores_and_pruned_ranks_stay_with_those_who_earned_them():
    roster = Roster()
    roster.join({1: {}, 2: {"partition-id": 5}}, present=[1, 2])
    assert not roster.handed_on
    first, sent = roster.clients[1], random_adapter(4, seed=0)
    less = Adapter.from_state_dict({k: 0.5 * t for k, t in sent.to_state_dict().items()}, 2.0)
    pruning, quality = SelfPruningRank(4, gamma=0.5), QualityRank(2, 4, score_fn=lambda _: 1.0)
    for policy in (pruning, quality):
        policy.choose([first], 1)
        policy.observe(Trained(first, less, sent, {}, 1, Adapter({})))
    assert pruning.choose([first], 2) == [2]
    assert quality.choose([first], 2) == [4]
    roster.join({3: {}, 4: {"partition-id": 5}}, present=[3, 4])
    assert roster.handed_on == {first.index}  # and not the one that named itself
    for policy in (pruning, quality):
        policy.forget(first.index)
    assert pruning.choose([roster.clients[3]], 3) == [4]
    assert quality.choose([roster.clients[3]], 3) == [2]
    for policy in (pruning, quality):
        policy.forget(77)  # who was never seen


def test_a_name_does_not_inherit_the_limit_of_a_nameless_node():
    roster = Roster()
    roster.join({1: {"max-rank": 2, "num-examples": 9}}, present=[1])
    roster.join({2: {"partition-id": 0}}, present=[2])
    assert roster.handed_on == {0}
    assert (roster.clients[2].max_rank, roster.clients[2].num_examples) == (None, None)
    roster.handed_on.clear()
    roster.join({3: {"partition-id": 0, "max-rank": 8}}, present=[3])
    roster.join({4: {"partition-id": 0}}, present=[4])
    assert roster.clients[4].max_rank == 8  # a name keeps its own
    assert not roster.handed_on
