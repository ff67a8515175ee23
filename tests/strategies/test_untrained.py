"""A round in which every client returns what it got changes nothing, whatever the ranks.

Otherwise entries that few clients hold would fade round by round, until neither factor can be
trained any more.
"""

import numpy as np
import pytest
import torch

from strategies.aggregation import AGGREGATIONS, Population, Update, make_aggregator
from strategies.lora import Adapter, LoraPair
from strategies.model import GlobalModel
from tests.fakes import random_adapter

SHAPES = {"tall": (12, 9), "wide": (8, 14)}
FULL = 8
# As published, a client counts as zero where it lacks an entry: there the mean over all fades.
FADE = {"zero-padding", "hetlora", "flexlora", "florist", "fedmomentum", "support"}
STAY = sorted(set(AGGREGATIONS) - FADE)


def rounds(name, ranks, weights, population=None, count=8):
    """The model before and after rounds in which nobody trains."""
    rule = make_aggregator(name)
    current = random_adapter(FULL, seed=3, shapes=SHAPES)
    if name == "flora":  # begins every round with a product of zero, the first one too
        zero = {m: LoraPair(p.A, torch.zeros_like(p.B), p.scale) for m, p in current.pairs.items()}
        current = Adapter(zero, current.dense)
    model = start = GlobalModel(current)
    for server_round in range(1, count + 1):
        rule.server_round = server_round
        updates = []
        for k, (rank, weight) in enumerate(zip(ranks, weights, strict=True)):
            sent = rule.download(model.adapter, rank, np.random.default_rng([server_round, k]))
            updates.append(Update(sent.adapter, weight, quality=1.0, sent=sent))
        result = rule.aggregate(model.adapter, updates, population)
        model = GlobalModel(result.adapter, model.merging(result.base_delta).merged)
    return start, model


def products(model):
    return {m: p.delta() for m, p in model.combined().pairs.items()}


def same_model(start, model):
    before, after = products(start), products(model)
    return all(torch.allclose(after[m], x, rtol=1e-3, atol=1e-3) for m, x in before.items())


RANKS = [(8, [2] * 9), (5, [1, 3, 3]), (8, [7, 1])]


@pytest.mark.parametrize("name", STAY)
@pytest.mark.parametrize(("largest", "others"), RANKS)
def test_nobody_trains_and_nothing_fades(name, largest, others):
    ranks = [FULL] * 4 if name == "fedit" else [largest, *others]
    weights = [1.0 + k % 3 for k in range(len(ranks))]
    start, model = rounds(name, ranks, weights)
    if largest == FULL or name not in ("rb-lora", "raflora"):  # these drop what nobody holds
        assert same_model(start, model)
    for module, old in start.adapter.pairs.items():
        new = model.adapter.pairs[module]
        before = old.A.norm(dim=1) + old.B.norm(dim=0)
        after = new.A.norm(dim=1) + new.B.norm(dim=0)
        assert float(after.min()) > 0.05 * float(before.min())  # each entry can be trained


@pytest.mark.parametrize("name", ["fedex", "rolora", "ffa", "rbla", "fslora", "fold"])
@pytest.mark.parametrize("ratio", [False, True])
def test_neither_do_coins_that_draw_some_only(name, ratio):
    population = Population({2: 0.7, FULL: 0.3}, ratio=ratio)
    start, model = rounds(name, [2, 2], [0.9, 0.4], population)
    for module, old in start.adapter.pairs.items():
        torch.testing.assert_close(model.adapter.pairs[module].A, old.A)
        torch.testing.assert_close(model.adapter.pairs[module].B, old.B)
    assert not model.merged.pairs


@pytest.mark.parametrize("name", sorted(FADE))
def test_rules_that_count_what_is_missing_as_zero_say_so(name):
    start, model = rounds(name, [FULL] + [2] * 9, [1.0] * 10)
    assert not same_model(start, model)
    start, model = rounds(name, [FULL] * 3, [1.0] * 3)  # equal ranks: nothing is missing
    assert name == "florist" or same_model(start, model)  # it drops what carries little
