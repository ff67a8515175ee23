"""The product rules against dense float64 numpy, written from the rules in words."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.aggregation import Update, make_aggregator
from strategies.lora import Adapter, AdapterError, LoraPair
from tests.fakes import random_adapter, same

SVD_RULES = ["flexlora", "rb-lora", "raflora"]
EXACT = ["flora", "fedex"]
RULES = [*SVD_RULES, "florist", *EXACT]
SHAPES = {"tall": (9, 4), "wide": (4, 9), "square": (6, 6), "as-wide-as-the-rank": (5, 3)}


def dense(pair, scale=None):
    scale = pair.scale if scale is None else scale
    return scale * pair.B.flatten(1).double().numpy() @ pair.A.flatten(1).double().numpy()


def term(pair, j):
    """Rank-one term j of a pair, j from 0."""
    return pair.scale * np.outer(pair.B.flatten(1)[:, j].double(), pair.A.flatten(1)[j].double())


def oracle(rule, updates, module, old):
    """The full update of one module, from the definitions in words; ``old`` was there before."""
    have = [(a.pairs[module], w) for a, w in updates if module in a.pairs]
    total = sum(w for _, w in updates)
    if rule == "fedex":  # what a client lacks it leaves
        return dense(old) + sum(
            w / total * (dense(p) - dense(old.with_rank(p.rank))) for p, w in have
        )
    if rule in ("flexlora", "florist", "flora"):
        return sum(w / total * dense(p) for p, w in have)
    out = 0.0
    if rule == "rb-lora":  # term by term
        for p, w in have:
            for j in range(p.rank):
                reach = sum(v for q, v in have if q.rank >= j + 1)
                out = out + w / total * total / reach * term(p, j)
        return out
    ends = sorted({p.rank for p, _ in have})  # partition by partition
    for start, end in zip([0, *ends], ends, strict=False):
        reach = [(p, w) for p, w in have if p.rank >= end]
        mass = sum(w for _, w in reach)
        for p, w in reach:
            B, A = p.B.flatten(1)[:, start:end].double(), p.A.flatten(1)[start:end].double()
            out = out + w / mass * p.scale * (B.numpy() @ A.numpy())
    return out


def truncated(D, rank):
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def clients(ranks, *, seed=10, scales=None, shapes=SHAPES):
    scales = scales or [2.0] * len(ranks)
    return [
        random_adapter(r, seed=seed + k, scale=s, shapes=shapes)
        for k, (r, s) in enumerate(zip(ranks, scales, strict=True))
    ]


def current_of(rank, seed=1, shapes=SHAPES):
    return random_adapter(rank, seed=seed, shapes=shapes)


def whole(result, module):
    """What a client computes with: its adapter, and what was merged into the base."""
    out = dense(result.adapter.pairs[module])
    if result.base_delta is not None and module in result.base_delta.pairs:
        out = out + dense(result.base_delta.pairs[module])
    return out


def close(x, y, size=None, tolerance=1e-5):
    size = np.linalg.norm(y) if size is None else size
    assert np.linalg.norm(x - y) <= tolerance * size + 1e-12


def assert_no_dead_entries(adapter):
    for pair in adapter.pairs.values():
        A, B = pair.A.flatten(1).norm(dim=1), pair.B.flatten(1).norm(dim=0)
        assert bool((A + B > 0).all())


def check(rule, current, updates, result):
    for module, old in current.pairs.items():
        D = oracle(rule, updates, module, old)
        pair = result.adapter.pairs[module]
        assert pair.scale == old.scale
        assert pair.A.dtype == pair.B.dtype == torch.float32
        if rule in EXACT:
            size = sum(w * np.linalg.norm(dense(a.pairs[module])) for a, w in updates)
            size = size / sum(w for _, w in updates) + np.linalg.norm(dense(old))
            close(whole(result, module), D, size)
        elif rule == "florist":
            S = np.linalg.svd(D, compute_uv=False) ** 2
            assert S[: pair.rank].sum() >= (0.95 - 1e-6) * S.sum()
            assert S[: pair.rank - 1].sum() < (0.95 + 1e-6) * S.sum()
            close(dense(pair), truncated(D, pair.rank), np.linalg.norm(D))
        else:
            most = max([old.rank, *(a.ranks[module] for a, _ in updates)])
            assert pair.rank == min(most, *D.shape)
            # every leading slice is the best approximation of its rank
            for r in range(1, pair.rank + 1):
                got = np.linalg.norm(dense(pair.with_rank(r)) - D)
                least = np.linalg.norm(truncated(D, r) - D)
                assert got**2 - least**2 < 1e-9 * np.linalg.norm(D) ** 2
    assert_no_dead_entries(result.adapter)


@pytest.mark.parametrize("rule", RULES)
@given(
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    weights=st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5),
    scales=st.lists(st.sampled_from([0.25, 1.0, 2.0, 3.0]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_rule_equals_the_oracle(rule, ranks, weights, scales, seed):
    current = current_of(4)
    adapters = clients(ranks, seed=seed + 2, scales=scales[: len(ranks)])
    updates = list(zip(adapters, weights, strict=False))
    check(rule, current, updates, make_aggregator(rule).aggregate(current, updates))


@pytest.mark.parametrize("rule", RULES)
def test_many_clients_take_the_dense_route(rule):
    current = current_of(4)
    updates = list(zip(clients([1, 2, 3, 4] * 100), range(1, 401), strict=True))
    check(rule, current, updates, make_aggregator(rule).aggregate(current, updates))


@pytest.mark.parametrize("rule", RULES)
def test_modules_missing_at_some_clients(rule):
    current = current_of(4)
    a, b = clients([2, 4])
    part = Adapter({m: p for m, p in a.pairs.items() if m not in ("tall", "wide")}, a.dense)
    rest = Adapter({m: p for m, p in b.pairs.items() if m != "wide"}, b.dense)
    updates = [(part, 3.0), (rest, 1.0)]
    result = make_aggregator(rule).aggregate(current, updates)
    assert result.adapter.pairs["wide"] is current.pairs["wide"]
    if result.base_delta is not None:
        assert "wide" not in result.base_delta.pairs
    D = oracle(rule, updates, "tall", current.pairs["tall"])
    factor = 1.0 if rule in ("rb-lora", "raflora") else 0.25  # a share of ALL clients
    kept = 0.75 * dense(current.pairs["tall"]) if rule == "fedex" else 0.0
    close(D, kept + factor * dense(b.pairs["tall"]))
    tolerance = 0.3 if rule == "florist" else 1e-5
    close(whole(result, "tall"), D, tolerance=tolerance)


@pytest.mark.parametrize("rule", RULES)
def test_convolutions_and_embeddings(rule):
    g = torch.Generator().manual_seed(3)

    def adapter(r):
        def normal(*shape):
            return torch.randn(shape, generator=g)

        return Adapter(
            {
                "conv": LoraPair(normal(r, 3, 2, 2), normal(5, r, 1, 1), 2.0),
                "conv1d": LoraPair(normal(r, 3, 3), normal(7, r, 1), 2.0),
                "table": LoraPair(normal(r, 11), normal(6, r), 2.0, embedding=True),
            }
        )

    current, updates = adapter(4), [(adapter(2), 1.0), (adapter(4), 2.0)]
    result = make_aggregator(rule).aggregate(current, updates)
    check(rule, current, updates, result)
    again = Adapter.from_state_dict(result.adapter.to_state_dict(), 2.0)
    assert same(again, result.adapter)
    for part in (result.adapter, result.base_delta):
        if part is not None:
            assert not part.differences(current)
            assert part.pairs["table"].embedding


@pytest.mark.parametrize("rule", RULES)
def test_permutation_scaling_and_splitting_change_nothing(rule):
    current = current_of(4)
    adapters, weights = clients([2, 4, 3, 1]), [4.0, 1.0, 2.0, 3.0]
    updates = list(zip(adapters, weights, strict=True))
    base = make_aggregator(rule).aggregate(current, updates)
    variants = {
        "permuted": [updates[i] for i in (3, 1, 0, 2)],
        "scaled": [(a, 1000 * w) for a, w in updates],
        "tiny": [(a, 1e-12 * w) for a, w in updates],
        "split": [(adapters[0], 2.0), *updates[1:], (adapters[0], 2.0)],
    }
    for variant in variants.values():
        result = make_aggregator(rule).aggregate(current, variant)
        for module in SHAPES:
            close(whole(result, module), whole(base, module))
            if rule not in EXACT:  # the factors too: signs and order are settled
                for x, y in ((result, base),):
                    torch.testing.assert_close(
                        x.adapter.pairs[module].A, y.adapter.pairs[module].A, rtol=0, atol=1e-3
                    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("copies", [1, 3])
def test_equal_clients_give_their_own_update(rule, copies):
    current = current_of(6)
    (update,) = clients([3], scales=[0.5])
    options = {"energy": 1.0} if rule == "florist" else {}
    aggregator = make_aggregator(rule, **options)
    result = aggregator.aggregate(current, [(update, 2.0)] * copies)
    for module, pair in update.pairs.items():
        old = current.pairs[module]
        left = dense(old) - dense(old.with_rank(3)) if rule == "fedex" else 0.0
        close(whole(result, module), left + dense(pair))
    if rule == "fedex":
        assert result.base_delta is None  # the mean is exact: nothing to merge
    assert_no_dead_entries(result.adapter)


@pytest.mark.parametrize("rule", SVD_RULES)
def test_full_rank_is_exact(rule):
    current = current_of(6)
    updates = list(zip(clients([6, 2, 4, 6]), [1.0, 5.0, 2.0, 3.0], strict=True))
    result = make_aggregator(rule).aggregate(current, updates)
    for module in SHAPES:
        D = oracle(rule, updates, module, current.pairs[module])
        close(dense(result.adapter.pairs[module]), D, tolerance=2e-6)


def test_equal_ranks_make_the_three_averages_one():
    current = current_of(3)
    updates = list(zip(clients([3, 3, 3]), [1.0, 2.0, 5.0], strict=True))
    flex, *others = (make_aggregator(r).aggregate(current, updates).adapter for r in SVD_RULES)
    for other in others:
        for module in SHAPES:
            close(dense(other.pairs[module]), dense(flex.pairs[module]))


def test_raflora_as_read_here_is_rb_lora():
    current = current_of(6)
    updates = list(zip(clients([6, 2, 4, 1]), [1.0, 7.0, 2.5, 3.0], strict=True))
    rb, ra = (make_aggregator(r).aggregate(current, updates).adapter for r in SVD_RULES[1:])
    for module in SHAPES:
        close(dense(rb.pairs[module]), dense(ra.pairs[module]))


@pytest.mark.parametrize("rule", SVD_RULES)
def test_spare_entries_change_nothing_and_can_be_trained(rule):
    shapes = {"m": (12, 10)}
    current = current_of(8, shapes=shapes)
    updates = [(a, 1.0) for a in clients([1, 2], shapes=shapes)]
    pair = make_aggregator(rule).aggregate(current, updates).adapter.pairs["m"]
    assert pair.rank == 8
    assert torch.equal(pair.B[:, 3:], torch.zeros(12, 5))
    torch.testing.assert_close(pair.A[3:].norm(dim=1), torch.full((5,), 3**-0.5))
    assert float((pair.A[3:] @ pair.A[:3].T).abs().max()) < 1e-5
    B = pair.B.clone().requires_grad_()
    ((B @ pair.A) @ torch.ones(10)).square().sum().backward()
    assert bool((B.grad.norm(dim=0) > 0).all())
    # rank 0: everybody's B is still zero
    start = Adapter({"m": LoraPair(current.pairs["m"].A, torch.zeros(12, 8), 2.0)})
    for each in (*SVD_RULES, "florist", "fedex"):
        result = make_aggregator(each).aggregate(start, [(start, 1.0), (start.with_rank(2), 1.0)])
        assert np.linalg.norm(whole(result, "m")) == 0
        assert_no_dead_entries(result.adapter)


@pytest.mark.parametrize("rule", [*SVD_RULES, "florist"])
def test_rounds_go_on(rule):
    """A client trains what it got, from any leading slice; nothing shrinks or dies."""
    current = current_of(4)
    for seed in range(4):
        sent = [current.with_rank({m: min(r, k) for m, k in current.ranks.items()}) for r in (1, 4)]
        noise = [random_adapter(1, seed=seed + k, shapes=SHAPES) for k in range(2)]
        updates = [
            Adapter({
                m: LoraPair(p.A + n.pairs[m].A[0], p.B + n.pairs[m].B, p.scale)
                for m, p in s.pairs.items()
            })
            for s, n in zip(sent, noise, strict=True)
        ]  # fmt: skip
        current = make_aggregator(rule).aggregate(current, [(u, 1.0) for u in updates]).adapter
        assert_no_dead_entries(current)
        if rule != "florist":
            assert current.ranks == {m: min(4, *s) for m, s in SHAPES.items()}


def test_florist_energy():
    current, updates = current_of(4), [(a, 1.0) for a in clients([4, 4, 2])]
    low, high, full = (
        make_aggregator("florist", energy=e).aggregate(current, updates).adapter
        for e in (0.3, 0.9, 1.0)
    )
    for module, (m, n) in SHAPES.items():
        assert low.ranks[module] <= high.ranks[module] <= full.ranks[module] == min(m, n)
    assert len(set(high.ranks.values())) > 1  # each module has its own
    for energy in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
            make_aggregator("florist", energy=energy)


def test_flora_stacks_with_data_weights_and_starts_afresh():
    shapes = {"m": (30, 20)}
    current = current_of(4, shapes=shapes)
    adapters, weights = clients([2, 3], shapes=shapes), [1.0, 3.0]
    result = make_aggregator("flora").aggregate(current, list(zip(adapters, weights, strict=True)))
    stack = result.base_delta.pairs["m"]
    a, b = (x.pairs["m"] for x in adapters)
    torch.testing.assert_close(stack.A, torch.cat([0.25 * a.A, 0.75 * b.A]))
    assert torch.equal(stack.B, torch.cat([a.B, b.B], dim=1))
    fresh = result.adapter.pairs["m"]
    assert fresh.rank == 4
    assert not fresh.B.any()
    assert 0.9 / 20**0.5 < float(fresh.A.abs().max()) <= 1 / 20**0.5
    assert result.adapter.dense.keys() == current.dense.keys()


def test_flora_draws_from_the_seed_and_the_round():
    current, updates = current_of(4), [(a, 1.0) for a in clients([2, 3])]

    def fresh(seed=42, server_round=0, these=updates):
        aggregator = make_aggregator("flora", seed=seed)
        aggregator.server_round = server_round
        return Adapter(aggregator.aggregate(current, these).adapter.pairs)

    torch.manual_seed(7)
    first = fresh()
    torch.manual_seed(8)
    assert same(first, fresh())
    assert same(first, fresh(these=updates[:1]))
    assert not same(first, fresh(seed=1))
    assert not same(first, fresh(server_round=1))


def test_flora_recompresses_without_loss():
    current = current_of(4)
    updates = list(zip(clients([4] * 50), range(1, 51), strict=True))
    result = make_aggregator("flora").aggregate(current, updates)
    for module, (m, n) in SHAPES.items():
        assert result.base_delta.ranks[module] <= min(m, n)
        close(whole(result, module), oracle("flora", updates, module, None))


def test_fedex_residual_keeps_its_digits_when_clients_barely_moved():
    shapes = {"m": (30, 20)}
    current = current_of(4, shapes=shapes)
    start = current.pairs["m"]
    g = torch.Generator().manual_seed(0)
    step = 1e-2
    updates = [
        (
            Adapter({
                "m": LoraPair(
                    start.A + step * torch.randn(4, 20, generator=g),
                    start.B + step * torch.randn(30, 4, generator=g),
                    2.0,
                )
            }),
            1.0,
        )
        for _ in range(3)
    ]  # fmt: skip
    result = make_aggregator("fedex").aggregate(current, updates)
    A = np.mean([u.pairs["m"].A.double().numpy() for u, _ in updates], axis=0)
    B = np.mean([u.pairs["m"].B.double().numpy() for u, _ in updates], axis=0)
    residual = oracle("fedex", updates, "m", start) - 2.0 * B @ A
    assert np.linalg.norm(residual) < 1e-3 * np.linalg.norm(2.0 * B @ A)
    close(dense(result.base_delta.pairs["m"]), residual, tolerance=1e-3)
    assert result.base_delta.ranks["m"] <= 2 * 4


def test_fedex_leaves_what_a_client_lacks_as_it_is():
    current = current_of(5)
    a, b = clients([2, 4])
    result = make_aggregator("fedex").aggregate(current, [(a, 1.0), (b, 3.0)])
    for module, old in current.pairs.items():
        pair, one, two = (x.pairs[module] for x in (result.adapter, a, b))
        whole_a = torch.cat([one.A, old.A[2:]]), torch.cat([one.B, old.B[:, 2:]], 1)
        whole_b = torch.cat([two.A, old.A[4:]]), torch.cat([two.B, old.B[:, 4:]], 1)
        torch.testing.assert_close(pair.A, 0.25 * whole_a[0] + 0.75 * whole_b[0])
        torch.testing.assert_close(pair.B, 0.25 * whole_a[1] + 0.75 * whole_b[1])


@pytest.mark.parametrize("rule", RULES)
def test_no_updates_leave_the_adapter(rule):
    current = current_of(3)
    result = make_aggregator(rule).aggregate(current, [])
    assert same(result.adapter, current)
    assert result.base_delta is None


@pytest.mark.parametrize("rule", RULES)
def test_bad_updates_leave_no_trace_and_inputs_are_not_changed(rule):
    current, (good, other) = current_of(3), clients([3, 2])
    nan = Adapter({m: LoraPair(p.A * math.nan, p.B, 2.0) for m, p in good.pairs.items()})
    before = [t.clone() for t in (*current.tensors(), *good.tensors())]
    aggregator = make_aggregator(rule)
    state = aggregator.init(current)
    aggregator.add(state, Update(good, 1.0))
    with pytest.raises(AdapterError, match="NaN or Inf"):
        aggregator.add(state, Update(nan, 1.0))
    live = Adapter({m: LoraPair(p.A.clone(), p.B.clone(), 2.0) for m, p in other.pairs.items()})
    aggregator.add(state, Update(live, 1.0))
    for pair in live.pairs.values():  # one model that trains client after client
        pair.A.fill_(7.0)
        pair.B.fill_(7.0)
    result = aggregator.finish(state)
    expected = make_aggregator(rule).aggregate(current, [(good, 1.0), (other, 1.0)])
    for module in SHAPES:
        close(whole(result, module), whole(expected, module))
    after = [*current.tensors(), *good.tensors()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_summed_in_float32(rule):
    current, updates = current_of(4), [(a.to(torch.bfloat16), 1.0) for a in clients([2, 4, 4])]
    check(rule, current, updates, make_aggregator(rule).aggregate(current, updates))
