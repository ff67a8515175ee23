"""Replies to an older model: what a rule makes of them, against sums of dense matrices."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from strategies.aggregation import AGGREGATIONS, Download, Replication, Update, make_aggregator
from strategies.aggregation.late import refuse_late
from strategies.lora import Adapter
from strategies.promises import declares
from tests.fakes import random_adapter

RANK = 4
SHAPES = {"tall": (9, 4), "wide": (4, 9)}  # of rank 4 at most: nothing is lost by a cut
LATE = [name for name, rule in AGGREGATIONS.items() if declares(rule, "late")]
EXACT = {"florist": {"energy": 1.0}, "fedmomentum": {"energy": 1.0}}


def model(seed, rank=RANK):
    return random_adapter(rank, seed=seed, shapes=SHAPES)


def rule_of(name):
    rule = make_aggregator(name, **EXACT.get(name, {}))
    rule.server_round = 3
    return rule


def dense(result, base=0.0):
    """Return what the model is: the products, with what was merged into the base."""
    found = {m: pair.delta() for m, pair in result.adapter.pairs.items()}
    if result.base_delta is not None:
        for m, pair in result.base_delta.pairs.items():
            found[m] = found[m] + pair.delta()
    return found


def close(one, other):
    return all(torch.allclose(one[k], other[k], atol=2e-4, rtol=1e-4) for k in one | other)


def test_which_rules_can():
    assert {"fedit", "zero-padding", "rbla", "replication", "flexlora", "florist", "rb-lora",
            "raflora", "flora", "fedex", "fedmomentum", "ffa", "fedsa"} <= set(LATE)  # fmt: skip
    for name in ("hetlora", "rolora", "fedsvd", "fslora", "fold"):
        assert "does not declare" in refuse_late(make_aggregator(name))
    assert refuse_late(Replication(holder_weights="quality"))
    assert refuse_late(make_aggregator("rbla", align=True))
    robust = make_aggregator("rbla")
    robust.protect("median")
    assert "compares" in refuse_late(robust)


def updates(name, current, *, late):
    """Return one reply in time of rank 4 and one of rank 2 (4 for rules of equal ranks)."""
    low = RANK if make_aggregator(name).equal_ranks else 2
    start = model(1)  # the older model
    sent = start.with_rank(low)
    own, theirs = model(2), model(3).with_rank(low)
    if "A" not in make_aggregator(name).uploaded():  # A never changes
        own, theirs, sent = (with_factor_a(x, current) for x in (own, theirs, sent))
    return [
        Update(own, 3.0, sent=Download(current)),
        Update(theirs, 2.0, sent=Download(sent), late=late),
    ]


def with_factor_a(adapter, other):
    pairs = {m: replace(p, A=other.pairs[m].with_rank(p.rank).A) for m, p in adapter.pairs.items()}
    return Adapter(pairs, adapter.dense)


@pytest.mark.parametrize("name", LATE)
def test_of_the_current_model_it_is_as_if_it_were_in_time(name):
    current = model(0)
    first, second = updates(name, current, late=1.0)
    sent = Download(current.with_rank(second.adapter.rank))
    late = rule_of(name).aggregate(current, [first, replace(second, sent=sent)])
    in_time = rule_of(name).aggregate(current, [first, replace(second, sent=sent, late=None)])
    assert close(dense(late), dense(in_time))
    assert close(late.adapter.dense, in_time.adapter.dense)


@pytest.mark.parametrize("name", LATE)
def test_whoever_changed_nothing_sends_the_current_model(name):
    current = model(0)
    first, second = updates(name, current, late=0.3)
    still = replace(second, adapter=second.sent.adapter)
    here = replace(second, adapter=current.with_rank(second.adapter.rank), late=None)
    late = rule_of(name).aggregate(current, [first, still])
    assert close(dense(late), dense(rule_of(name).aggregate(current, [first, here])))


@pytest.mark.parametrize("part", [1.0, 0.25])
@pytest.mark.parametrize("name", ["flexlora", "florist", "flora", "fedmomentum"])
def test_products_move_by_the_change_of_the_product(name, part):
    current = model(0)
    first, second = updates(name, current, late=part)
    found = dense(rule_of(name).aggregate(current, [first, second]))
    for m in SHAPES:
        own, theirs, sent, now = (
            a.pairs[m].delta().double()
            for a in (first.adapter, second.adapter, second.sent.adapter,
                      current.with_rank(second.adapter.rank))
        )  # fmt: skip
        wanted = (3 * own + 2 * (now + part * (theirs - sent))) / 5
        assert torch.allclose(found[m].double(), wanted, atol=1e-3)


@pytest.mark.parametrize("part", [1.0, 0.25])
@pytest.mark.parametrize("name", ["rbla", "replication", "zero-padding"])
def test_averages_move_entry_by_entry(name, part):
    current = model(0)
    first, second = updates(name, current, late=part)
    found = rule_of(name).aggregate(current, [first, second]).adapter
    for m in SHAPES:
        for factor, axis in (("A", 0), ("B", 1)):
            own, theirs, sent, now = (
                np.moveaxis(getattr(a.pairs[m], factor).double().numpy(), axis, 0)
                for a in (first.adapter, second.adapter, second.sent.adapter, current)
            )
            got = np.moveaxis(getattr(found.pairs[m], factor).numpy(), axis, 0)
            for j in range(RANK):
                total, mass = 3 * own[j], 3.0
                if j < 2:
                    total = total + 2 * (now[j] + part * (theirs[j] - sent[j]))
                if j < 2 or name == "zero-padding":
                    mass = 5.0
                np.testing.assert_allclose(got[j], total / mass, atol=1e-5)
    for key in current.dense:
        first_, theirs, sent, now = (
            a.dense[key] for a in (first.adapter, second.adapter, second.sent.adapter, current)
        )
        wanted = (3 * first_ + 2 * (now + part * (theirs - sent))) / 5
        assert torch.allclose(found.dense[key], wanted, atol=1e-5)


@pytest.mark.parametrize("name", LATE)
def test_alone_it_moves_the_model_by_its_discount(name):
    """As FedAsync: what a weight alone could not do, since it divides itself."""
    current = model(0)
    _, second = updates(name, current, late=0.0)
    nothing = rule_of(name).aggregate(current, [second])
    stays = replace(second, adapter=current.with_rank(second.adapter.rank), late=None)
    assert close(dense(nothing), dense(rule_of(name).aggregate(current, [stays])))
