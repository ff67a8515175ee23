"""Warnings of a round: nothing moved, a loss that grows, entries that one client alone holds."""

import json

import pytest
import torch

from fedlora_app.report.page import RunFiles, warnings
from strategies.aggregation import AGGREGATIONS
from strategies.clients import Client
from strategies.lora import Adapter
from strategies.ranks import ListRank
from strategies.trained import Trained
from strategies.watch import Watch
from tests.strategies.test_claims import start, training


def reply(loss=None, *, index=0, moved=True, steps=5, rank=2):
    pair = {"m.lora_A.weight": torch.ones(rank, 3), "m.lora_B.weight": torch.ones(4, rank)}
    sent = Adapter.from_state_dict(pair, 1.0)
    after = Adapter.from_state_dict({k: t + moved for k, t in pair.items()}, 1.0)
    metrics = {"steps": steps} | ({} if loss is None else {"loss": loss})
    return Trained(Client(7, index), after, sent, metrics, 3)


def kinds(watch, *losses, **settings):
    found = [watch.reply(reply(loss, **settings), "AB", "float32") for loss in losses]
    return [[w["about"] for w in one] for one in found]


def test_a_loss_grows_when_it_is_above_its_first_twice_in_a_row():
    assert kinds(Watch(), 1.0, 1.2, 1.2, 1.0, 1.2, 1.3) == [[], [], ["loss"], [], [], ["loss"]]
    assert kinds(Watch(), 1.0, 1.09, 1.09, 1.09) == [[]] * 4  # within a tenth
    assert kinds(Watch(), 3.0, 2.0, 2.5, 2.9) == [[]] * 4  # below its first
    assert kinds(Watch(), None, 0.0, 1.0, 1.0) == [[]] * 4  # of nothing all is more
    assert kinds(Watch(), 1.0, float("nan"), 2.0, float("inf"), 2.0)[-1] == ["loss"]
    watch = Watch()
    kinds(watch, 1.0)
    kinds(watch, 2.0, index=1)
    assert kinds(watch, 2.0, 2.0, index=1) == [[], []]  # each against itself
    watch.forget(0)
    assert kinds(watch, 2.0, 2.0) == [[], []]


def test_losses_last_in_a_checkpoint_and_older_ones_have_none():
    watch, again = Watch(), Watch()
    kinds(watch, 1.0, 1.5)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert kinds(again, 1.5) == [["loss"]]
    again.load_state_dict({})
    assert kinds(again, 1.5) == [[]]


def test_an_update_that_is_exactly_zero():
    watch = Watch()
    (warning,) = watch.reply(reply(moved=False), "AB", "float16")
    assert warning["about"] == "unmoved"
    assert "its update is exactly zero" in warning["text"]
    assert "float16" in warning["text"]
    assert watch.reply(reply(moved=False, steps=0), "AB", "float16") == []


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([4, 8, 16, 32], "entries 17 to 32 of the rank axis are held by client 3"),
        ([4, 5, 4, 4], "entry 5 of the rank axis is held by client 1"),
        ([4, 4, 8, 8], None),
        ([8, 8, 8, 8], None),
        ([8], None),
    ],
)
def test_entries_of_one_client(ranks, said):
    clients = [Client(100 + i, i) for i in range(len(ranks))]
    found = Watch().ranks(clients, {c.node_id: r for c, r in zip(clients, ranks, strict=True)})
    assert [w["text"].partition(" (node")[0] for w in found] == ([said] if said else [])


def test_a_run_tells_and_logs_once_and_the_page_shows(caplog):
    caplog.set_level("WARNING", logger="flwr")
    settings = {"ranks": ListRank([1, 1, 2]), "rounds": 3}
    _, records, _ = start(training("A"), [1, 2, 3], aggregation="replication", **settings)
    rounds = [r for r in records if r["kind"] == "round" and r["round"]]
    for r in rounds:
        found = {(w["about"], w["client"]) for w in r["warnings"]}
        assert found == {("lone", 2), ("unmoved", 0)}
    said = [r.getMessage() for r in caplog.records]
    assert sum("held by client 2" in line for line in said) == 1
    shown = warnings(RunFiles("run", {}, {}, records))
    assert "Round 1–3: entry 2 of the rank axis" in shown
    assert "Round 1–3: client 0 (node 1): lora_B came back" in shown
    _, records, _ = start(training("AB"), [1, 2, 3], aggregation="flexlora", **settings)
    assert not any("warnings" in r for r in records)  # the product has no entries of one client


def test_only_rules_that_average_over_holders_are_warned_of():
    flags = {name: getattr(rule, "mean_of_holders", False) for name, rule in AGGREGATIONS.items()}
    found = {name for name, flag in flags.items() if flag}
    assert found == {"replication", "rbla", "rb-lora", "raflora", "fedsa"}
