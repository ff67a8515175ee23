"""HetLoRA and the rules of one factor, against dense float64 numpy written from the rules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.aggregation import AGGREGATIONS, Update, make_aggregator
from strategies.lora import Adapter, AdapterError, LoraPair
from tests.fakes import SHAPES, random_adapter, same

S = 2.0  # the global scale of every test
ONE_FACTOR = [("ffa", 1), ("rolora", 1), ("rolora", 2)]  # the rule and its round
FIXED = {("ffa", 1): "A", ("rolora", 1): "A", ("rolora", 2): "B"}


def rule_in(name, server_round):
    rule = make_aggregator(name)
    rule.server_round = server_round
    return rule


def f64(tensor):
    return tensor.detach().flatten(1).double().numpy()


def dense(pair):
    return pair.scale * f64(pair.B) @ f64(pair.A)


def without(adapter, *modules):
    return Adapter({m: p for m, p in adapter.pairs.items() if m not in modules}, adapter.dense)


def close(x, y, tolerance=1e-5):
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y) + 1e-12


# ----- hetlora -------------------------------------------------------------------------


def hetlora_oracle(current, adapters):
    """Zero padding with the weights of the rule, from dense norms over all modules."""
    norms = [
        np.sqrt(sum(np.linalg.norm(dense(p)) ** 2 for p in a.pairs.values())) for a in adapters
    ]
    out = {}
    for module, old in current.pairs.items():
        rank = max([old.rank, *(a.ranks.get(module, 0) for a in adapters)])
        A, B = np.zeros((rank, old.A.shape[1])), np.zeros((old.B.shape[0], rank))
        for adapter, norm in zip(adapters, norms, strict=True):
            if module in adapter.pairs:
                pair = adapter.pairs[module]
                A[: pair.rank] += norm / sum(norms) * f64(pair.A)
                B[:, : pair.rank] += norm / sum(norms) * f64(pair.B) * pair.scale / old.scale
        out[module] = (A, B)
    return out


@given(
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    weights=st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5),
    scales=st.lists(st.sampled_from([0.25, 1.0, 2.0, 3.0]), min_size=5, max_size=5),
    sizes=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 50.0]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_hetlora_weighs_by_the_norm_of_the_whole_update(ranks, weights, scales, sizes, seed):
    sizes[0] = sizes[0] or 1.0  # all zero is a case of its own
    current, adapters = random_adapter(4, seed=1), []
    for k, r in enumerate(ranks):
        drawn = random_adapter(r, seed=seed + 2 + k, scale=scales[k])
        pairs = {m: LoraPair(p.A, p.B * sizes[k], p.scale) for m, p in drawn.pairs.items()}
        adapters.append(Adapter(pairs, drawn.dense))
    updates = list(zip(adapters, weights, strict=False))
    result = make_aggregator("hetlora").aggregate(current, updates).adapter
    for module, (A, B) in hetlora_oracle(current, adapters).items():
        pair = result.pairs[module]
        assert pair.scale == S
        np.testing.assert_allclose(pair.A, A, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(pair.B, B, rtol=2e-5, atol=1e-5 * max(1, abs(B).max()))
    for key, value in result.dense.items():  # the head is still weighed by data
        head = [a.dense[key].double().numpy() for a in adapters]
        mean = np.average(head, axis=0, weights=weights[: len(head)])
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6)


def test_hetlora_counts_the_norm_over_the_modules_a_client_has():
    current = random_adapter(4, seed=1)
    full, part = random_adapter(4, seed=2), without(random_adapter(2, seed=3), "wide", "tall")
    result = make_aggregator("hetlora").aggregate(current, [(full, 1.0), (part, 9.0)]).adapter
    for module, (A, B) in hetlora_oracle(current, [full, part]).items():
        np.testing.assert_allclose(result.pairs[module].A, A, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.pairs[module].B, B, rtol=1e-5, atol=1e-6)


def test_hetlora_of_permuted_clients_and_of_other_data_weights_is_the_same():
    current = random_adapter(4, seed=1)
    updates = [(random_adapter(r, seed=5 + r), float(w)) for r, w in ((4, 1), (1, 7), (3, 2))]
    base = make_aggregator("hetlora").aggregate(current, updates).adapter
    shuffled = make_aggregator("hetlora").aggregate(current, updates[::-1]).adapter
    reweighed = make_aggregator("hetlora").aggregate(current, [(a, 1.0) for a, _ in updates])
    for module, pair in base.pairs.items():
        for other in (shuffled.pairs[module], reweighed.adapter.pairs[module]):
            torch.testing.assert_close(other.A, pair.A)
            torch.testing.assert_close(other.B, pair.B)
    for key, value in base.dense.items():
        torch.testing.assert_close(shuffled.dense[key], value)
        assert not torch.allclose(reweighed.adapter.dense[key], value)


def test_hetlora_of_one_client_is_that_client():
    current, update = random_adapter(4, seed=1), random_adapter(2, seed=2)
    result = make_aggregator("hetlora").aggregate(current, [(update, 3.0)]).adapter
    padded = update.with_rank(4)
    for key, value in result.to_state_dict().items():
        torch.testing.assert_close(value, padded.to_state_dict()[key])


def test_hetlora_keeps_the_adapter_where_every_b_is_zero():
    current = random_adapter(4, seed=1)
    zeros = []
    for seed, rank in ((2, 2), (3, 4)):
        drawn = random_adapter(rank, seed=seed)
        pairs = {m: LoraPair(p.A, torch.zeros_like(p.B), S) for m, p in drawn.pairs.items()}
        zeros.append(Adapter(pairs, drawn.dense))
    result = make_aggregator("hetlora").aggregate(current, [(a, 1.0) for a in zeros]).adapter
    assert same(Adapter(result.pairs), Adapter(current.pairs))
    # beside one that moved, those that did not weigh nothing
    moved = random_adapter(4, seed=9)
    result = make_aggregator("hetlora").aggregate(current, [(a, 1.0) for a in (*zeros, moved)])
    for module, pair in result.adapter.pairs.items():
        torch.testing.assert_close(pair.A, moved.pairs[module].A)
        torch.testing.assert_close(pair.B, moved.pairs[module].B)


# ----- ffa and rolora ------------------------------------------------------------------


def trained_from(current, rank, fixed, *, seed, scale=S):
    """A client's adapter: the fixed factor as it was sent, the other one trained."""
    drawn = random_adapter(rank, seed=seed, scale=scale)
    sent = current.with_rank(rank)
    pairs = {
        m: LoraPair(sent.pairs[m].A, p.B, scale)
        if fixed == "A"
        else LoraPair(p.A, sent.pairs[m].B, scale)
        for m, p in drawn.pairs.items()
    }
    return Adapter(pairs, drawn.dense)


def fixed_factor(pair, fixed):
    return pair.A if fixed == "A" else pair.B


def assert_exact(rule, fixed, current, updates):
    total = sum(w for _, w in updates)
    result = rule.aggregate(current, updates)
    assert result.base_delta is None
    for module, old in current.pairs.items():
        have = [(a.pairs[module], w) for a, w in updates if module in a.pairs]
        pair = result.adapter.pairs[module]
        if not have:
            assert pair is old
            continue
        moved = sum(w / total * (dense(p) - dense(old.with_rank(p.rank))) for p, w in have)
        close(dense(pair), dense(old) + moved)
        assert pair.scale == old.scale
        assert torch.equal(fixed_factor(pair, fixed), fixed_factor(old, fixed))
    return result.adapter


@pytest.mark.parametrize(("name", "server_round"), ONE_FACTOR)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    weights=st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_one_factor_makes_the_mean_exact(name, server_round, ranks, weights, seed):
    fixed = FIXED[name, server_round]
    current = random_adapter(6, seed=1)
    adapters = [
        trained_from(current, r, fixed, seed=seed + 2 + k, scale=S) for k, r in enumerate(ranks)
    ]
    updates = list(zip(adapters, weights, strict=False))
    assert_exact(rule_in(name, server_round), fixed, current, updates)


@pytest.mark.parametrize(("name", "server_round"), ONE_FACTOR)
def test_one_factor_is_exact_for_clients_of_other_scales(name, server_round):
    fixed = FIXED[name, server_round]
    current = random_adapter(6, seed=1)
    updates = [
        (trained_from(current, r, fixed, seed=r, scale=s), w)
        for r, s, w in ((2, 0.5, 3.0), (6, 2.0, 1.0), (4, 3.0, 2.0))
    ]
    assert_exact(rule_in(name, server_round), fixed, current, updates)


@pytest.mark.parametrize(("name", "server_round"), ONE_FACTOR)
def test_one_factor_is_exact_when_modules_are_missing(name, server_round):
    fixed = FIXED[name, server_round]
    current = random_adapter(6, seed=1)
    a, b, c = (trained_from(current, r, fixed, seed=r) for r in (2, 6, 4))
    updates = [
        (without(a, "tall", "wide"), 3.0),
        (without(b, "wide"), 1.0),
        (without(c, "wide"), 2),
    ]
    assert_exact(rule_in(name, server_round), fixed, current, updates)


@pytest.mark.parametrize(("name", "server_round"), ONE_FACTOR)
def test_one_factor_ignores_order_unit_and_splitting(name, server_round):
    fixed = FIXED[name, server_round]
    current = random_adapter(6, seed=1)
    updates = [(trained_from(current, r, fixed, seed=r), float(r)) for r in (2, 6, 4)]
    base = assert_exact(rule_in(name, server_round), fixed, current, updates)
    first, *others = updates
    for variant in (
        updates[::-1],
        [(a, 1e4 * w) for a, w in updates],
        [(first[0], first[1] / 2), *others, (first[0], first[1] / 2)],
    ):
        result = rule_in(name, server_round).aggregate(current, variant).adapter
        for key, value in result.to_state_dict().items():
            torch.testing.assert_close(value, base.to_state_dict()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "server_round"), ONE_FACTOR)
def test_one_factor_of_convolutions_and_embeddings(name, server_round):
    fixed = FIXED[name, server_round]
    g = torch.Generator().manual_seed(3)
    shapes = {"conv": ((3, 2, 2), 5, (1, 1)), "table": ((11,), 6, ())}

    def drawn(rank):
        return {
            m: LoraPair(
                torch.randn(rank, *n, generator=g),
                torch.randn(rows, rank, *ones, generator=g),
                S,
                embedding=m == "table",
            )
            for m, (n, rows, ones) in shapes.items()
        }

    current = Adapter(drawn(4))
    updates = []
    for rank, weight in ((2, 1.0), (4, 3.0)):
        sent, own = current.with_rank(rank), drawn(rank)
        pairs = {
            m: LoraPair(sent.pairs[m].A, own[m].B, S, p.embedding)
            if fixed == "A"
            else LoraPair(own[m].A, sent.pairs[m].B, S, p.embedding)
            for m, p in own.items()
        }
        updates.append((Adapter(pairs), weight))
    adapter = assert_exact(rule_in(name, server_round), fixed, current, updates)
    assert not adapter.differences(current)
    assert adapter.pairs["table"].embedding


def test_rolora_alternates_and_every_round_is_exact():
    current = random_adapter(6, seed=1)
    rule = make_aggregator("rolora")
    for server_round in range(1, 6):
        rule.server_round = server_round
        trains = "B" if server_round in (1, 3, 5) else "A"
        assert (rule.trained(), rule.uploaded(), rule.downloaded()) == (trains, trains, "AB")
        fixed = "A" if trains == "B" else "B"
        before = current
        updates = [(trained_from(current, r, fixed, seed=server_round + r), r) for r in (1, 6, 3)]
        current = assert_exact(rule, fixed, current, updates)
        for module, pair in current.pairs.items():
            moved = fixed_factor(pair, trains), fixed_factor(before.pairs[module], trains)
            assert not torch.equal(*moved)


def test_ffa_never_touches_a():
    rule = make_aggregator("ffa")
    start = current = random_adapter(6, seed=1)
    for server_round in range(1, 5):
        rule.server_round = server_round
        assert (rule.trained(), rule.uploaded(), rule.downloaded()) == ("B", "B", "AB")
        updates = [(trained_from(current, r, "A", seed=server_round), 1.0) for r in (2, 4)]
        current = assert_exact(rule, "A", current, updates)
    for module, pair in current.pairs.items():
        assert torch.equal(pair.A, start.pairs[module].A)
        assert torch.equal(pair.B[:, 4:], start.pairs[module].B[:, 4:])  # nobody held them


# ----- fedsa ---------------------------------------------------------------------------


@given(
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_fedsa_averages_a_over_its_holders_and_keeps_b(ranks, weights, seed):
    current = random_adapter(5, seed=1)
    adapters = [random_adapter(r, seed=seed + 2 + k) for k, r in enumerate(ranks)]
    updates = list(zip(adapters, weights, strict=False))
    result = make_aggregator("fedsa").aggregate(current, updates).adapter
    for module, old in current.pairs.items():
        pair = result.pairs[module]
        assert torch.equal(pair.B[:, :5], old.B)
        assert not pair.B[:, 5:].any()
        for j in range(max(5, *ranks)):
            rows = [(f64(a.pairs[module].A)[j], w) for a, w in updates if a.ranks[module] > j]
            if rows:
                expected = sum(w * x for x, w in rows) / sum(w for _, w in rows)
                np.testing.assert_allclose(pair.A[j], expected, rtol=2e-5, atol=1e-6)
            else:
                assert torch.equal(pair.A[j], old.A[j])


def test_fedsa_sees_only_a():
    """Whatever B an update carries, the result is the same: it never left the client."""
    rule = make_aggregator("fedsa")
    assert (rule.trained(), rule.uploaded(), rule.downloaded()) == ("AB", "A", "A")
    current, update = random_adapter(4, seed=1), random_adapter(3, seed=2)
    other = Adapter(
        {m: LoraPair(p.A, torch.randn_like(p.B), p.scale) for m, p in update.pairs.items()},
        update.dense,
    )
    results = [rule.aggregate(current, [(a, 1.0)]).adapter for a in (update, other)]
    assert same(*results)


def test_fedsa_modules_missing_at_some_clients():
    current = random_adapter(4, seed=1)
    a, b = random_adapter(4, seed=2), random_adapter(4, seed=3)
    updates = [(without(a, "tall", "wide"), 3.0), (without(b, "wide"), 1.0)]
    result = make_aggregator("fedsa").aggregate(current, updates).adapter
    torch.testing.assert_close(result.pairs["tall"].A, b.pairs["tall"].A)  # b alone holds it
    assert result.pairs["wide"] is current.pairs["wide"]


# ----- all of them ---------------------------------------------------------------------

RULES = ["hetlora", "ffa", "rolora", "fedsa"]


@pytest.mark.parametrize("name", RULES)
def test_bad_updates_are_refused_and_no_updates_change_nothing(name):
    current, good = random_adapter(3, seed=1), random_adapter(3, seed=2)
    assert same(make_aggregator(name).aggregate(current, []).adapter, current)
    nan = Adapter({m: LoraPair(p.A, p.B * torch.nan, S) for m, p in good.pairs.items()})
    rule = make_aggregator(name)
    state = rule.init(current)
    for bad in (nan, random_adapter(3, seed=3, shapes={"tall": (9, 5)}, dense=False)):
        with pytest.raises(AdapterError):
            rule.add(state, Update(bad, 1.0))
    expected = make_aggregator(name).aggregate(current, [(good, 1.0)]).adapter
    rule.add(state, Update(good, 1.0))
    assert same(rule.finish(state).adapter, expected)


@pytest.mark.parametrize("name", RULES)
def test_inputs_are_not_changed_and_sums_are_float32(name):
    current, update = random_adapter(4, seed=1), random_adapter(2, seed=2).to(torch.bfloat16)
    before = [t.clone() for t in (*current.tensors(), *update.tensors())]
    result = make_aggregator(name).aggregate(current, [(update, 1.0), (update, 3.0)]).adapter
    after = [*current.tensors(), *update.tensors()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(t.dtype == torch.float32 for t in result.tensors())


AVERAGES = ["fedit", "zero-padding", "hetlora", "rbla", "replication", "support"]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_dora_is_for_rules_that_average_both_factors(name):
    """Elsewhere the magnitudes would no longer belong to the factors they were trained with."""
    plain = random_adapter(2, seed=1)
    dora = Adapter(plain.pairs, {"tall.lora_magnitude_vector": torch.ones(SHAPES["tall"][0])})
    make_aggregator(name).check(plain)
    if name in AVERAGES:
        make_aggregator(name).check(dora)
        return
    with pytest.raises(ValueError, match=f"{name} changes the factors .* train without DoRA"):
        make_aggregator(name).check(dora)
