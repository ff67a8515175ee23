"""The averaging rules against a brute-force oracle, entry by entry in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.aggregation import AGGREGATIONS, Update, make_aggregator
from strategies.lora import Adapter, AdapterError, LoraPair
from tests.fakes import random_adapter, same

HETEROGENEOUS = ["zero-padding", "rbla", "replication"]
ALL = ["fedit", *HETEROGENEOUS]


def holders(updates, module, j):
    return [(a.pairs[module], w) for a, w in updates if module in a.pairs and a.ranks[module] > j]


def oracle(rule, current, updates):
    """Return {module: (A, B)} one rank entry at a time, from the definitions in words."""
    out = {}
    total = sum(w for _, w in updates)
    for module, old in current.pairs.items():
        m, n = old.B.shape[0], old.A.shape[1]
        rank = max([old.rank, *(a.ranks.get(module, 0) for a, _ in updates)])
        A, B = np.zeros((rank, n)), np.zeros((m, rank))
        for j in range(rank):
            have = holders(updates, module, j)
            mass = sum(w for _, w in have)
            for side, target in (("A", A), ("B", B)):

                def entry(pair, side=side, j=j, s=old.scale):
                    s = pair.scale / s if side == "B" else 1.0
                    x = pair.A[j] if side == "A" else pair.B[:, j] * s
                    return x.double().numpy()

                if not have and rule != "zero-padding":
                    value = entry(old.with_rank(rank))
                elif rule == "replication":  # literally: fill in, then average over all
                    filled = sum((w / mass * entry(p) for p, w in have), 0.0)
                    value = sum(w / total * entry(p) for p, w in have)
                    value = value + (total - mass) / total * filled
                else:
                    divisor = {"rbla": mass, "zero-padding": total, "fedit": total}[rule]
                    value = sum((w * entry(p) for p, w in have), np.zeros(1)) / divisor
                if side == "A":
                    target[j] = value
                else:
                    target[:, j] = value
        out[module] = (A, B)
    return out


def assert_matches(rule, current, updates, result):
    for module, (A, B) in oracle(rule, current, updates).items():
        pair = result.pairs[module]
        np.testing.assert_allclose(pair.A.numpy(), A, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(pair.B.numpy(), B, rtol=2e-5, atol=1e-6)


def clients(ranks, *, seed=10, scales=None, **options):
    scales = scales or [2.0] * len(ranks)
    return [
        random_adapter(r, seed=seed + k, scale=s, **options)
        for k, (r, s) in enumerate(zip(ranks, scales, strict=True))
    ]


@pytest.mark.parametrize("rule", HETEROGENEOUS)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    weights=st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5),
    scales=st.lists(st.sampled_from([0.25, 1.0, 2.0, 3.0]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_rule_equals_the_oracle(rule, ranks, weights, scales, seed):
    current = random_adapter(6, seed=1)
    adapters = clients(ranks, seed=seed + 2, scales=scales[: len(ranks)])
    updates = list(zip(adapters, weights, strict=False))
    result = make_aggregator(rule).aggregate(current, updates)
    assert_matches(rule, current, updates, result.adapter)


@pytest.mark.parametrize("rule", HETEROGENEOUS)
def test_modules_missing_at_some_clients(rule):
    current = random_adapter(4, seed=1)
    a, b, c = clients([2, 4, 3])
    part = Adapter({m: p for m, p in a.pairs.items() if m != "tall"}, a.dense)
    nobody = [
        Adapter({m: p for m, p in x.pairs.items() if m != "wide"}, x.dense) for x in (part, b, c)
    ]
    updates = list(zip(nobody, [3.0, 1.0, 2.0], strict=True))
    result = make_aggregator(rule).aggregate(current, updates).adapter
    expected = oracle(rule, current, updates)
    for module in ("tall", "square"):
        np.testing.assert_allclose(result.pairs[module].A, expected[module][0], rtol=1e-5)
    assert result.pairs["wide"] is current.pairs["wide"]


@pytest.mark.parametrize("rule", ALL)
def test_equal_ranks_give_federated_averaging(rule):
    current = random_adapter(4, seed=1)
    adapters, weights = clients([4, 4, 4]), [1.0, 2.0, 5.0]
    result = make_aggregator(rule).aggregate(current, zip(adapters, weights, strict=True)).adapter
    for key, value in result.to_state_dict().items():
        mean = np.average(
            [a.to_state_dict()[key].double().numpy() for a in adapters], axis=0, weights=weights
        )
        np.testing.assert_allclose(value.numpy(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", HETEROGENEOUS)
def test_permutation_scaling_and_splitting_change_nothing(rule):
    current = random_adapter(6, seed=1)
    adapters, weights = clients([2, 6, 3, 1]), [4.0, 1.0, 2.0, 3.0]
    updates = list(zip(adapters, weights, strict=True))

    def run(these):
        return make_aggregator(rule).aggregate(current, these).adapter

    base = run(updates)
    variants = {
        "permuted": [updates[i] for i in (3, 1, 0, 2)],
        "scaled": [(a, 1000 * w) for a, w in updates],
        "tiny": [(a, 1e-12 * w) for a, w in updates],
        "split": [(adapters[0], 2.0), *updates[1:], (adapters[0], 2.0)],
    }
    for name, variant in variants.items():
        for key, value in run(variant).to_state_dict().items():
            torch.testing.assert_close(
                value, base.to_state_dict()[key], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m
            )


def test_replication_equals_rbla_under_data_weights():
    current = random_adapter(8, seed=1)
    updates = list(zip(clients([8, 2, 4, 2, 1]), [1.0, 7.0, 2.5, 3.0, 9.0], strict=True))
    rbla = make_aggregator("rbla").aggregate(current, updates).adapter
    assert same(rbla, make_aggregator("replication").aggregate(current, updates).adapter)


def test_replication_weighs_holders_by_quality():
    current = random_adapter(2, seed=1)
    low, first, second = clients([1, 2, 2])
    updates = [Update(low, 2.0, 0.1), Update(first, 1.0, 0.9), Update(second, 1.0, 0.3)]
    result = make_aggregator("replication", holder_weights="quality").aggregate(current, updates)
    for module in current.pairs:
        rows = [a.pairs[module].A[1].double() for a in (first, second)]
        replica = (0.9 * rows[0] + 0.3 * rows[1]) / 1.2
        expected = (2 * replica + rows[0] + rows[1]) / 4
        torch.testing.assert_close(result.adapter.pairs[module].A[1].double(), expected)
    # equal quality weights everybody alike; with equal data weights that is rbla again
    equal = [Update(u.adapter, 1.0, 0.5) for u in updates]
    again = make_aggregator("replication", holder_weights="quality").aggregate(current, equal)
    rbla = make_aggregator("rbla").aggregate(current, equal)
    for key, value in again.adapter.to_state_dict().items():
        torch.testing.assert_close(value, rbla.adapter.to_state_dict()[key])
    with pytest.raises(ValueError, match="needs a quality above 0, got None"):
        make_aggregator("replication", holder_weights="quality").aggregate(current, [(low, 1.0)])


def test_zero_padding_dilutes_and_replication_does_not():
    """The published motivation, in one number: nine clients of rank 1, one of rank 4."""
    shapes = {"m": (8, 8)}
    strong = random_adapter(4, seed=5, shapes=shapes)
    weak = clients([1] * 9, shapes=shapes)
    updates = [(a, 1.0) for a in [strong, *weak]]
    current = random_adapter(4, seed=1, shapes=shapes)
    padded = make_aggregator("zero-padding").aggregate(current, updates).adapter
    kept = make_aggregator("replication").aggregate(current, updates).adapter
    own = strong.pairs["m"].A[3]
    torch.testing.assert_close(padded.pairs["m"].A[3], own / 10)
    torch.testing.assert_close(kept.pairs["m"].A[3], own)


def test_unheld_rows_keep_the_global_value():
    current = random_adapter(6, seed=1)
    updates = [(a, 1.0) for a in clients([2, 3])]
    for rule in ("rbla", "replication"):
        result = make_aggregator(rule).aggregate(current, updates).adapter
        for module, pair in result.pairs.items():
            assert torch.equal(pair.A[3:], current.pairs[module].A[3:])
            assert torch.equal(pair.B[:, 3:], current.pairs[module].B[:, 3:])


@pytest.mark.parametrize("rule", ALL)
def test_no_updates_leave_the_adapter(rule):
    current = random_adapter(3, seed=1)
    assert same(make_aggregator(rule).aggregate(current, []).adapter, current)


@pytest.mark.parametrize("rule", ALL)
def test_bad_updates_are_refused_and_leave_no_trace(rule):
    current = random_adapter(3, seed=1)
    good = random_adapter(3, seed=2)
    nan = Adapter(
        {m: LoraPair(p.A.clone().fill_(math.nan), p.B, 2.0) for m, p in good.pairs.items()},
        good.dense,
    )
    shape = random_adapter(3, seed=3, shapes={"tall": (9, 5)})
    with pytest.raises(AdapterError, match="ranks disagree"):  # rank 1 is not broadcast
        LoraPair(good.pairs["tall"].A[:1], good.pairs["tall"].B, 2.0)
    aggregator = make_aggregator(rule)
    state = aggregator.init(current)
    for adapter, weight, message in (
        (nan, 1.0, "NaN or Inf"),
        (shape, 1.0, r"has shape \(3, 5\), expected \(r, 4\)"),
        (good, 0.0, "weight above 0"),
        (good, -1.0, "weight above 0"),
        (good, math.nan, "weight above 0"),
        (good, math.inf, "weight above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregator.add(state, Update(adapter, weight))
    aggregator.add(state, Update(good, 1.0))
    result = aggregator.finish(state).adapter
    for key, value in result.to_state_dict().items():
        torch.testing.assert_close(value, good.to_state_dict()[key])


def test_fedit_refuses_unequal_ranks():
    current = random_adapter(4, seed=1)
    with pytest.raises(AdapterError, match=r"equal ranks only.*rank 2 for 'tall'"):
        make_aggregator("fedit").aggregate(current, [(random_adapter(2, seed=2), 1.0)])


def test_half_precision_is_summed_in_float32():
    current = random_adapter(2, seed=1)
    ones = Adapter(
        {
            m: LoraPair(torch.ones_like(p.A), torch.ones_like(p.B), 2.0)
            for m, p in current.pairs.items()
        },
        current.dense,
    ).to(torch.float16)
    # 4096 + 1 is 4096 in float16: a float16 sum would stop growing
    result = make_aggregator("rbla").aggregate(current, [(ones, 1.0)] * 5000).adapter
    for pair in result.pairs.values():
        assert pair.A.dtype == torch.float32
        torch.testing.assert_close(pair.A, torch.ones_like(pair.A))


def test_inputs_are_not_changed():
    current, update = random_adapter(4, seed=1), random_adapter(2, seed=2)
    before = [t.clone() for t in (*current.tensors(), *update.tensors())]
    for rule in HETEROGENEOUS:
        make_aggregator(rule).aggregate(current, [(update, 1.0), (update, 3.0)])
    after = [*current.tensors(), *update.tensors()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_for_rank_is_the_leading_slice():
    result = make_aggregator("rbla").aggregate(
        random_adapter(4, seed=1), [(random_adapter(4, seed=2), 1.0)]
    )
    assert same(result.for_rank(2), result.adapter.with_rank(2))


def test_the_registry_suggests():
    assert set(ALL) <= set(AGGREGATIONS)
    with pytest.raises(ValueError, match="did you mean 'replication'"):
        make_aggregator("replicaton")


def test_rules_that_change_factors_refuse_dora_magnitudes():
    plain = random_adapter(2, seed=1)
    dora = Adapter(plain.pairs, {**plain.dense, "tall.lora_magnitude_vector": torch.ones(9)})
    refused = {name for name in AGGREGATIONS if not make_aggregator(name).supports_dora}
    averaging = {"fedit", "zero-padding", "hetlora", "rbla", "replication", "support"}
    assert refused == set(AGGREGATIONS) - averaging
    for name in AGGREGATIONS:
        make_aggregator(name).check(plain)
        if name in refused:
            with pytest.raises(ValueError, match="train without DoRA"):
                make_aggregator(name).check(dora)
        else:
            make_aggregator(name).check(dora)
