"""Independent sampling: every rule against its own result under full participation.

The oracle is the rule without sampling, with data weights: the mean of all ``2^n`` draws, each
with its probability, must be that result.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.aggregation import AGGREGATIONS, Download, Population, Update, make_aggregator
from strategies.lora import Adapter, LoraPair
from tests.fakes import random_adapter, same

# The result itself is linear in the updates: (rule, round).
LINEAR = [
    ("fedit", 1),
    ("zero-padding", 1),
    ("rbla", 1),
    ("replication", 1),
    ("support", 1),
    ("ffa", 1),
    ("rolora", 1),
    ("rolora", 2),
    ("fedsa", 1),
]
# The product is, before it is cut; rank 4 keeps all of it in these shapes.
PRODUCT = ["flexlora", "florist", "rb-lora", "raflora", "flora", "fedex", "fedsvd", "fedmomentum"]
SHAPES = {"tall": (9, 4), "wide": (4, 9), "narrow": (3, 5)}
FULL = 4

RANKS, A, Q = [2, 4, 3, 1], [0.4, 0.1, 0.3, 0.2], [0.5, 0.35, 0.7, 1.0]


def adapter(rank, seed):
    """Linear modules, a convolution and a head."""
    g = torch.Generator().manual_seed(1000 + seed)
    plain = random_adapter(rank, seed=seed, shapes=SHAPES)
    A, B = torch.randn(rank, 1, 2, 2, generator=g), torch.randn(3, rank, 1, 1, generator=g)
    return Adapter({**plain.pairs, "conv": LoraPair(A, B, 2.0)}, plain.dense)


def start(rank=FULL):
    return adapter(rank, 1)


def rule_in(name, server_round=1):
    rule = make_aggregator(name, **({"energy": 1.0} if name in ("florist", "fedmomentum") else {}))
    rule.server_round = server_round
    return rule


def population(ranks, a, **options):
    masses = {}
    for r, w in zip(ranks, a, strict=True):
        masses[r] = masses.get(r, 0.0) + w
    return Population(masses, **options)


def trained(ranks, name=""):
    return [adapter(FULL if name == "fedit" else r, 10 + k) for k, r in enumerate(ranks)]


def product(result):
    """What clients compute with, ``W - W0`` of every module, in float64."""
    out = {}
    for module in result.adapter.pairs:
        parts = [result.adapter] + ([result.base_delta] if result.base_delta else [])
        pairs = [p.pairs[module] for p in parts if module in p.pairs]
        out[module] = sum(
            p.scale * (p.B.flatten(1).double() @ p.A.flatten(1).double()).numpy() for p in pairs
        )
    return out


def factors(result):
    return {k: t.double().numpy() for k, t in result.adapter.to_state_dict().items()}


def head(result):
    return {k: t.double().numpy() for k, t in result.adapter.dense.items()}


def draws(q):
    """Every set of clients and its probability."""
    for coins in itertools.product([False, True], repeat=len(q)):
        chance = math.prod(p if c else 1 - p for p, c in zip(q, coins, strict=True))
        if chance > 0:
            yield [n for n, c in enumerate(coins) if c], chance


def sampled(rule, current, updates, a, q, who, *, rate=1.0):
    """The result of one draw."""
    return rule.aggregate(
        current,
        [Update(updates[n], rate * a[n] / q[n]) for n in who],
        population([u.rank for u in updates], a),
    )


def expectation(rule, current, updates, a, q, read, *, rate=1.0):
    mean = {}
    for who, chance in draws(q):
        for key, x in read(sampled(rule, current, updates, a, q, who, rate=rate)).items():
            mean[key] = mean.get(key, 0.0) + chance * x
    return mean


def assert_close(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_allclose(found[key], x, rtol=0, atol=tolerance, err_msg=key)


def moved_by(rate, before, after):
    return {key: x + rate * (after[key] - x) for key, x in before.items()}


# ----- the exact expectation -----------------------------------------------------------


@pytest.mark.parametrize(("name", "server_round"), LINEAR)
@pytest.mark.parametrize("rank", [4, 6])  # without entries that no client ever holds, and with
@pytest.mark.parametrize("rate", [1.0, 0.6])
def test_the_mean_of_all_draws_is_full_participation(name, server_round, rank, rate):
    rank = FULL if name == "fedit" else rank  # equal ranks only
    rule, current, updates = rule_in(name, server_round), start(rank), trained(RANKS, name)
    full = rule.aggregate(current, zip(updates, A, strict=True))
    before = {k: t.double().numpy() for k, t in current.to_state_dict().items()}
    mean = expectation(rule, current, updates, A, Q, factors, rate=rate)
    assert_close(mean, moved_by(rate, before, factors(full)))


@pytest.mark.parametrize("name", PRODUCT)
@pytest.mark.parametrize("rate", [1.0, 0.6])
def test_the_mean_product_of_all_draws_is_full_participation(name, rate):
    rule, current, updates = rule_in(name), start(), trained(RANKS)
    full = rule.aggregate(current, zip(updates, A, strict=True))
    before = rule.aggregate(current, [])
    for read in (product, head):
        mean = expectation(rule, current, updates, A, Q, read, rate=rate)
        assert_close(mean, moved_by(rate, read(before), read(full)), 1e-4)


@pytest.mark.parametrize("name", ["rb-lora", "raflora"])
def test_entries_that_nobody_holds_are_dropped_as_they_are_under_full_participation(name):
    """Only where somebody takes part: an empty draw keeps the model as it is."""
    rule, current, updates = rule_in(name), start(), trained([1, 2, 1])  # entries 2 and 3
    a, q = [0.3, 0.5, 0.2], [1.0, 0.4, 0.7]
    full = rule.aggregate(current, zip(updates, a, strict=True))
    assert_close(expectation(rule, current, updates, a, q, product), product(full), 1e-4)


def test_the_factors_of_fedex_are_unbiased_too():
    rule, current, updates = rule_in("fedex"), start(6), trained(RANKS)  # two without holders
    full = rule.aggregate(current, zip(updates, A, strict=True))
    assert_close(expectation(rule, current, updates, A, Q, factors), factors(full))


@pytest.mark.parametrize("name", [*(n for n, _ in LINEAR if n != "rolora"), *PRODUCT])
@given(
    ranks=st.lists(st.integers(1, FULL), min_size=3, max_size=3),
    weights=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3),
    q=st.lists(st.floats(0.1, 1.0), min_size=3, max_size=3),
    unit=st.sampled_from([1.0, 1e-6, 1e6]),
)
@settings(max_examples=6, deadline=None)
def test_whatever_the_ranks_weights_and_probabilities(name, ranks, weights, q, unit):
    ranks[0] = FULL  # somebody holds every entry
    a = [w / sum(weights) * unit for w in weights]
    rule, current, updates = rule_in(name), start(), trained(ranks, name)
    read = product if name in PRODUCT else factors
    full = rule.aggregate(current, zip(updates, a, strict=True))
    assert_close(expectation(rule, current, updates, a, q, read), read(full), 3e-4)


def test_sketches_and_coins_together():
    """The mean over all sketches and all draws is ``X + Σ a_n k_n/R Δ_n``."""
    a, q, k, R = [0.5, 0.2, 0.3], [0.4, 0.8, 0.6], [2, 1, 3], 4
    current = random_adapter(R, seed=1, shapes={"m": (3, 2)})
    old = current.pairs["m"]
    change = [random_adapter(R, seed=20 + n, shapes={"m": (3, 2)}) for n in range(3)]
    rule = rule_in("fslora")

    def update(n, entries):
        index, scale = torch.tensor(entries), old.scale * R / k[n]
        sent = LoraPair(old.A[index], old.B[:, index], scale)
        moves = change[n].pairs["m"]
        got = LoraPair(sent.A + moves.A[index], sent.B + moves.B[:, index], scale)
        head = {key: t + change[n].dense[key] for key, t in current.dense.items()}
        download = Download(Adapter({"m": sent}, current.dense), {"m": index})
        return Update(Adapter({"m": got}, head), a[n] / q[n], sent=download)

    updates = [[update(n, s) for s in itertools.combinations(range(R), k[n])] for n in range(3)]
    everybody = population(k, a)  # of their sketches' ranks; only the sum counts
    mean = {}
    for who, chance in draws(q):
        sketches = list(itertools.product(*(updates[n] for n in who)))
        for chosen in sketches:
            found = factors(rule.aggregate(current, chosen, everybody))
            for key, x in found.items():
                mean[key] = mean.get(key, 0.0) + chance / len(sketches) * x
    expected = {key: t.double().numpy().copy() for key, t in current.to_state_dict().items()}
    for n in range(3):
        for key, t in change[n].to_state_dict().items():
            share = k[n] / R if "lora" in key else 1.0
            expected[key] += a[n] * share * t.double().numpy()
    assert_close(mean, expected)


# ----- by chance -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "read"), [("rbla", factors), ("zero-padding", factors), ("flexlora", product)]
)
def test_the_mean_of_many_draws_is_within_its_standard_error(name, read):
    rng = np.random.default_rng(5)
    n = 12
    ranks = rng.integers(1, FULL + 1, n).tolist()
    a = rng.dirichlet(np.full(n, 3.0)).tolist()
    q = rng.uniform(0.3, 0.9, n)
    rule, current, updates = rule_in(name), start(), trained(ranks)
    full = read(rule.aggregate(current, zip(updates, a, strict=True)))
    found = {key: [] for key in full}
    for _ in range(300):
        who = np.flatnonzero(rng.random(n) < q)
        for key, x in read(sampled(rule, current, updates, a, q, who)).items():
            found[key].append(x)
    for key, x in full.items():
        values = np.stack(found[key])
        error = values.std(axis=0, ddof=1) / math.sqrt(len(values))
        assert (abs(values.mean(axis=0) - x) < 4 * error + 1e-5).all()
        assert (error > 1e-3).any()  # there was something to average


# ----- the ratio estimator -------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*(n for n, _ in LINEAR), *PRODUCT}))
def test_the_ratio_estimator_is_the_rule_with_other_weights(name):
    rule, current, updates = rule_in(name), start(), trained(RANKS, name)
    weighted = [(updates[n], A[n] / Q[n]) for n in (0, 2)]
    everybody = population(RANKS, A, ratio=True)
    plain, ratio = rule.aggregate(current, weighted), rule.aggregate(current, weighted, everybody)
    assert same(plain.adapter, ratio.adapter)
    assert (plain.base_delta is None) == (ratio.base_delta is None)
    if plain.base_delta is not None:
        assert same(plain.base_delta, ratio.base_delta)


def test_the_ratio_estimator_is_consistent():
    """More clients of the same kinds: its error falls towards 0, like ``1/√n``."""
    rng = np.random.default_rng(3)
    current, kinds, rule = start(), trained(RANKS), rule_in("rbla")
    full = factors(rule.aggregate(current, zip(kinds, A, strict=True)))

    def error(copies, repeats=30):
        out = []
        for _ in range(repeats):
            joined = [int(rng.binomial(copies, p)) for p in Q]
            updates = [
                Update(kinds[n], A[n] / copies / Q[n])
                for n, times in enumerate(joined)
                for _ in range(times)
            ]
            result = rule.aggregate(current, updates, population(RANKS, A, ratio=True))
            out.append(sum(((factors(result)[k] - x) ** 2).sum() for k, x in full.items()))
        return math.sqrt(np.mean(out))

    few, many = error(3), error(75)
    assert many < few / 3.5


def test_the_ratio_estimator_of_equal_clients_is_exact_and_the_unbiased_one_is_not():
    current, one = start(), adapter(FULL, 9)
    for ratio in (True, False):
        everybody = Population({FULL: 1.0}, ratio=ratio)
        result = rule_in("rbla").aggregate(current, [(one, 0.25 / 0.5)], everybody)
        weight = 1.0 if ratio else 0.5
        before = {k: t.double().numpy() for k, t in current.to_state_dict().items()}
        after = {k: t.double().numpy() for k, t in one.to_state_dict().items()}
        assert_close(factors(result), moved_by(weight, before, after))


def test_rules_that_divide_by_holders_use_the_ratio_by_default():
    ratio = {name for name in AGGREGATIONS if make_aggregator(name).default_ratio}
    assert ratio == {"rbla", "replication", "fedsa", "rb-lora", "raflora", "support", "fold"}


# ----- single draws --------------------------------------------------------------------


SUPPORTED = sorted({*(n for n, _ in LINEAR), *PRODUCT, "fslora"})


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("ratio", [False, True])
def test_an_empty_draw_leaves_the_model(name, ratio):
    current = start()
    result = rule_in(name).aggregate(current, [], population(RANKS, A, ratio=ratio))
    assert same(result.adapter, current)
    assert result.base_delta is None


@pytest.mark.parametrize("name", SUPPORTED)
def test_certain_coins_are_full_participation(name):
    ranks = [FULL] * 4 if name == "fslora" else RANKS
    rule, current, updates = rule_in(name), start(), trained(ranks, name)
    full = rule.aggregate(current, zip(updates, A, strict=True))
    result = sampled(rule, current, updates, A, [1.0] * 4, range(4))
    read = product if name in PRODUCT else factors
    assert_close(read(result), read(full))
    assert result.adapter.ranks == full.adapter.ranks


def test_one_client_in_words():
    """``X + a/q (Y - X)``; zero padding moves what the client lacks towards zero."""
    current, update = start(), adapter(2, 9)
    w, everybody = 0.4 / 0.8, Population({2: 0.4, FULL: 0.6})
    result = rule_in("zero-padding").aggregate(current, [(update, w)], everybody).adapter
    rbla = rule_in("rbla").aggregate(current, [(update, w)], everybody).adapter
    for module, old in current.pairs.items():
        got, new = update.pairs[module], result.pairs[module]
        torch.testing.assert_close(new.A[:2], old.A[:2] + w * (got.A - old.A[:2]))
        torch.testing.assert_close(new.A[2:], old.A[2:] * (1 - w))
        torch.testing.assert_close(new.B[:, 2:], old.B[:, 2:] * (1 - w))
        # entries 0 and 1 are held by everybody, of mass 1; of 2 and 3 no holder was drawn
        torch.testing.assert_close(rbla.pairs[module].A[:2], new.A[:2])
        assert torch.equal(rbla.pairs[module].A[2:], old.A[2:])
        assert torch.equal(rbla.pairs[module].B[:, 2:], old.B[:, 2:])


def test_a_draw_of_holders_is_divided_by_all_holders():
    current, update = start(), adapter(FULL, 9)
    everybody = Population({2: 0.6, FULL: 0.4})
    result = rule_in("rbla").aggregate(current, [(update, 0.1 / 0.5)], everybody).adapter
    for module, old in current.pairs.items():
        moved = update.pairs[module].A - old.A
        torch.testing.assert_close(result.pairs[module].A[:2], (old.A + 0.2 / 1.0 * moved)[:2])
        torch.testing.assert_close(result.pairs[module].A[2:], (old.A + 0.2 / 0.4 * moved)[2:])


@pytest.mark.parametrize("name", ["rb-lora", "raflora", "fedsa", "replication"])
def test_a_draw_without_holders_keeps_the_product_of_an_entry(name):
    """The low client returns what it got: then nothing may have changed."""
    current = start()
    everybody = Population({2: 0.5, FULL: 0.5})
    result = rule_in(name).aggregate(current, [(current.with_rank(2), 1.7)], everybody)
    before = product(rule_in(name).aggregate(current, []))
    assert_close(product(result), before)


def test_a_client_of_more_rank_than_the_population_knows_counts_for_itself():
    current, update = start(), adapter(FULL, 9)
    result = rule_in("rbla").aggregate(current, [(update, 0.5)], Population({2: 1.0})).adapter
    for module, got in update.pairs.items():
        torch.testing.assert_close(result.pairs[module].A[2:], got.A[2:])


def test_flora_of_a_start_whose_product_is_zero_stacks_the_updates_alone():
    plain = start(2)
    pairs = {m: LoraPair(p.A, torch.zeros_like(p.B), p.scale) for m, p in plain.pairs.items()}
    current, update, w = Adapter(pairs, plain.dense), adapter(1, 9), 0.3
    result = rule_in("flora").aggregate(current, [(update, w)], Population({1: 1.0}))
    for module, delta in result.base_delta.pairs.items():
        assert delta.rank == 1
        torch.testing.assert_close(delta.delta(), w * update.delta(module))


def test_a_client_without_the_head_leaves_the_head():
    current, update = start(), adapter(FULL, 9)
    part = Adapter(update.pairs)
    everybody = Population({FULL: 1.0})
    result = rule_in("rbla").aggregate(current, [(part, 0.5), (update, 0.25)], everybody).adapter
    for key, old in current.dense.items():
        torch.testing.assert_close(result.dense[key], old + 0.25 * (update.dense[key] - old))


def test_half_precision_is_blended_in_float32():
    current, update = start().to(torch.float16), adapter(2, 9).to(torch.float16)
    wide = current.to(torch.float32), update.to(torch.float32)
    for name in ("rbla", "zero-padding", "flexlora", "fedex"):
        rule, everybody = rule_in(name), population(RANKS, A)
        result = rule.aggregate(current, [(update, 0.5)], everybody)
        assert all(t.dtype == torch.float32 for t in result.adapter.tensors())
        assert_close(product(result), product(rule.aggregate(wide[0], [(wide[1], 0.5)], everybody)))


# ----- refusals ------------------------------------------------------------------------


def test_rules_that_need_what_only_a_reply_says_refuse():
    for rule, reason in (
        (make_aggregator("hetlora"), "norms"),
        (make_aggregator("replication", holder_weights="quality"), "quality"),
    ):
        assert reason in rule.sampling_refusal
        with pytest.raises(ValueError, match=f"{rule.name} with a population: .*{reason}"):
            rule.aggregate(start(), [(adapter(2, 9), 1.0)], population(RANKS, A))
    others = {n for n in AGGREGATIONS if make_aggregator(n).sampling_refusal == ""}
    assert others == {*SUPPORTED, "fold"}


@pytest.mark.parametrize("masses", [{0: 1.0}, {2: -0.1, 3: 1.1}, {2: math.nan}, {2: 0.0}, {}])
def test_a_population_of_nobody_or_of_nonsense_is_refused(masses):
    with pytest.raises(ValueError, match="masses: expected"):
        Population(masses)


def test_mass_at_counts_who_holds_an_entry():
    found = Population({1: 0.2, 4: 0.5, 2: 0.3}).mass_at(5)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.8, 0.5, 0.5, 0.0]).double())
