"""Support, alignment, donors, fedsvd, fedmomentum and fold, by their definitions."""

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from strategies.aggregation import Download, Population, Update, make_aggregator
from strategies.aggregation.aligning import rotation
from strategies.lora import Adapter, LoraPair
from strategies.model import GlobalModel
from strategies.packing import Packing
from strategies.promises import declares
from tests.fakes import random_adapter, same

RANKS, WEIGHTS = [2, 5, 3, 2], [1.0, 2.0, 0.5, 4.0]


def updates(ranks=RANKS, *, seed=10):
    found = [random_adapter(r, seed=seed + k) for k, r in enumerate(ranks)]
    return list(zip(found, WEIGHTS, strict=False))


def aggregated(name, current, given, **options):
    rule = make_aggregator(name, **options)
    rule.server_round = options.pop("server_round", 2)
    return rule.aggregate(current, given)


def assert_same(one, other, **tolerance):
    assert one.ranks == other.ranks
    for module, pair in one.pairs.items():
        torch.testing.assert_close(pair.A, other.pairs[module].A, **tolerance)
        torch.testing.assert_close(pair.B, other.pairs[module].B, **tolerance)


# ----- support


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0])
def test_support_is_the_holders_mean_times_a_power_of_their_share(gamma):
    current, given = random_adapter(6, seed=1), updates()
    result = aggregated("support", current, given, gamma=gamma).adapter
    for module, j in itertools.product(current.pairs, range(6)):
        have = [(a.pairs[module], w) for a, w in given if a.ranks[module] > j]
        mass = sum(w for _, w in have)
        if not have:  # nobody holds the sixth entry
            wanted = current.pairs[module].A[j]
        else:
            mean = sum(w * p.A[j] for p, w in have) / mass
            wanted = mean * (mass / sum(WEIGHTS)) ** gamma
        torch.testing.assert_close(result.pairs[module].A[j], wanted)


@pytest.mark.parametrize(("gamma", "limit"), [(0.0, "rbla"), (1.0, "zero-padding")])
def test_support_has_its_neighbours_as_limits(gamma, limit):
    current, given = random_adapter(5, seed=1), updates()
    result = aggregated("support", current, given, gamma=gamma).adapter
    assert_same(result, aggregated(limit, current, given).adapter)


def test_support_of_equal_ranks_and_of_one_client_is_their_mean():
    current = random_adapter(3, seed=1)
    for given in (updates([3, 3, 3]), updates([3])):
        result = aggregated("support", current, given).adapter
        assert_same(result, aggregated("fedit", current, given).adapter)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_gamma_outside_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma: expected 0"):
        make_aggregator("support", gamma=gamma)


# ----- replication from the highest rank


def test_the_highest_rank_alone_donates():
    current, given = random_adapter(5, seed=1), updates()
    result = aggregated("replication", current, given, donors="highest").adapter
    total, (top, _) = sum(WEIGHTS), given[1]
    for module, j in itertools.product(current.pairs, range(5)):
        wanted = sum(
            w / total * (a if a.ranks[module] > j else top).pairs[module].B[:, j] for a, w in given
        )
        torch.testing.assert_close(result.pairs[module].B[:, j], wanted)


def test_two_ranks_have_the_same_donors_either_way():
    current, given = random_adapter(4, seed=1), updates([2, 4, 4, 2])
    for weights in ("data", "quality"):
        given = [Update(a, w, quality=1 + w) for a, w in updates([2, 4, 4, 2])]
        one, other = (
            aggregated("replication", current, given, donors=donors, holder_weights=weights).adapter
            for donors in ("holders", "highest")
        )
        assert_same(one, other)


def test_donors_that_depend_on_the_draw_refuse_coins():
    assert (
        "largest rank of a round" in make_aggregator("replication", donors="highest").refuse_coins()
    )
    with pytest.raises(ValueError, match="donors: expected 'holders' or 'highest', got 'all'"):
        make_aggregator("replication", donors="all")


# ----- alignment


def rotated(adapter, seed):
    """The same products in another basis."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for module, p in adapter.pairs.items():
        Q = torch.from_numpy(np.linalg.qr(rng.normal(size=(p.rank, p.rank)))[0]).float()
        pairs[module] = LoraPair(Q.T @ p.A, p.B @ Q, p.scale)
    return Adapter(pairs, adapter.dense)


def test_the_rotation_is_that_of_procrustes():
    rng = np.random.default_rng(3)
    A, reference = rng.normal(size=(4, 9)), rng.normal(size=(4, 9))
    R, _ = orthogonal_procrustes(A.T, reference.T)
    Q = rotation(torch.from_numpy(A @ reference.T))
    np.testing.assert_allclose(Q.numpy(), R, atol=1e-6)


@pytest.mark.parametrize("name", ["fedit", "zero-padding", "rbla", "replication", "support"])
@pytest.mark.parametrize("server_round", [2, 3])
def test_clients_that_differ_by_a_rotation_average_to_what_they_share(name, server_round):
    current = random_adapter(4, seed=1)
    given = [(rotated(current, k), 1.0) for k in range(3)]
    rule = make_aggregator(name, align=True)
    rule.server_round = server_round
    result = rule.aggregate(current, given).adapter
    for module, pair in current.pairs.items():
        torch.testing.assert_close(result.pairs[module].delta(), pair.delta(), rtol=1e-4, atol=1e-5)
    rule.server_round = 1  # B was zero: there is nothing to turn towards
    plain = make_aggregator(name).aggregate(current, given).adapter
    assert same(rule.aggregate(current, given).adapter, plain)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_turn_leaves_every_product_and_other_tensor_as_it_was(strength):
    current, (client, _) = random_adapter(5, seed=1), updates()[2]
    sent = Download(current.with_rank(3))
    rule = make_aggregator("rbla", align=strength)
    rule.server_round = 4
    turned = rule.fold(rule.init(current), Update(client, 1.0, sent=sent)).adapter
    for module, pair in client.pairs.items():
        torch.testing.assert_close(turned.pairs[module].delta(), pair.delta(), rtol=1e-4, atol=1e-5)
        away = (pair.A - sent.adapter.pairs[module].A).norm()
        assert (turned.pairs[module].A - sent.adapter.pairs[module].A).norm() < away
    assert turned.dense == client.dense


def test_a_reference_of_zeros_turns_nothing():
    zero = random_adapter(3, seed=1)
    zero = Adapter({m: LoraPair(p.A * 0, p.B * 0, p.scale) for m, p in zero.pairs.items()})
    client = Adapter(random_adapter(3, seed=2).pairs)
    for server_round in (2, 3):
        rule = make_aggregator("fedit", align=True)
        rule.server_round = server_round
        assert_same(rule.aggregate(zero, [(client, 1.0)]).adapter, client, rtol=1e-5, atol=1e-6)


def test_who_turns_promises_no_mean_of_numbers():
    assert declares(make_aggregator("fedit"), "linear")
    turned = make_aggregator("fedit", align=0.5)
    assert not declares(turned, "linear")
    assert not declares(turned, "mean_of_all")
    assert declares(turned, "unbiased")
    with pytest.raises(ValueError, match="align: expected true, false or a number from 0 to 1"):
        make_aggregator("rbla", align=2)


# ----- fedsvd and fedmomentum


def test_fedsvd_keeps_the_product_of_ffa_with_an_orthonormal_a():
    shapes = {"m": (12, 9)}
    current = random_adapter(4, seed=1, shapes=shapes)
    given = [(random_adapter(r, seed=10 + r, shapes=shapes), 1.0) for r in (2, 4)]
    new = aggregated("fedsvd", current, given).adapter.pairs["m"]
    old = aggregated("ffa", current, given).adapter.pairs["m"]
    torch.testing.assert_close(new.delta(), old.delta(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new.A @ new.A.T, torch.eye(4), rtol=1e-4, atol=1e-5)
    lengths = new.B.norm(dim=0)
    assert bool((lengths[:-1] >= lengths[1:]).all())


def test_fedsvd_of_a_zero_b_still_can_be_trained():
    pair = random_adapter(3, seed=1, shapes={"m": (6, 5)}).pairs["m"]
    fresh = Adapter({"m": LoraPair(pair.A, pair.B * 0, 1.0)})
    new = aggregated("fedsvd", fresh, [(fresh, 1.0)]).adapter.pairs["m"]
    assert not bool(new.B.any())
    assert torch.linalg.matrix_rank(new.A) == 3


@pytest.mark.parametrize("energy", [1.0, 0.9])
def test_fedmomentum_loses_no_more_of_the_mean_product_than_its_energy(energy):
    shapes = {"m": (12, 14)}
    current = random_adapter(3, seed=1, shapes=shapes)
    given = [(random_adapter(3, seed=10 + k, shapes=shapes), 1.0 + k) for k in range(3)]
    result = aggregated("fedmomentum", current, given, energy=energy)
    dense = sum(w * a.pairs["m"].delta().double().numpy() for a, w in given) / 6
    kept = (result.adapter.pairs["m"].delta() + result.base_delta.pairs["m"].delta()).double()
    singular = np.linalg.svd(dense, compute_uv=False) ** 2
    lost = np.linalg.norm(dense - kept.numpy()) ** 2
    if energy == 1:
        assert lost < 1e-9 * singular.sum()
    else:
        assert 0 < lost <= (1 - energy) * singular.sum() * (1 + 1e-4)
    lead = np.linalg.svd(result.adapter.pairs["m"].delta().numpy(), compute_uv=False)[:3]
    np.testing.assert_allclose(lead**2, singular[:3], rtol=1e-4)


def test_fedmomentum_of_equal_clients_puts_nothing_into_the_base():
    current = random_adapter(3, seed=1)
    result = aggregated("fedmomentum", current, [(current, 1.0)] * 3, energy=1.0)
    for module in result.base_delta.pairs if result.base_delta else ():
        assert float(result.base_delta.pairs[module].norm()) < 1e-4


# ----- fold


def drawn(rule, current, ranks):
    """What each client is sent, and what it sends back when it has moved every number."""
    given = []
    for k, rank in enumerate(ranks):
        sent = rule.download(current, rank, np.random.default_rng([7, k]))
        moved = {
            m: LoraPair(p.A + k + 1, p.B - k - 1, p.scale) for m, p in sent.adapter.pairs.items()
        }
        given.append((sent, Update(Adapter(moved, current.dense), WEIGHTS[k], sent=sent)))
    return given


def test_what_a_client_trains_and_what_it_holds_are_the_whole_model():
    current = random_adapter(6, seed=1)
    for sent, _ in drawn(make_aggregator("fold"), current, RANKS):
        for module, pair in current.pairs.items():
            whole = sent.adapter.pairs[module].delta() + sent.fixed.pairs[module].delta()
            torch.testing.assert_close(whole, pair.delta(), rtol=1e-5, atol=1e-5)
            assert sent.adapter.pairs[module].scale == pair.scale


def test_a_term_is_the_mean_over_who_trained_it():
    rule, current = make_aggregator("fold"), random_adapter(6, seed=1)
    given = drawn(rule, current, RANKS)
    result = rule.aggregate(current, [update for _, update in given]).adapter
    for module, j in itertools.product(current.pairs, range(6)):
        terms = [
            (u.weight, u.adapter.pairs[module].A[list(sent.entries[module]).index(j)])
            for sent, u in given
            if j in sent.entries[module]
        ]
        wanted = current.pairs[module].A[j]
        if terms:
            wanted = sum(w * a for w, a in terms) / sum(w for w, _ in terms)
        torch.testing.assert_close(result.pairs[module].A[j], wanted)


def test_fold_of_equal_full_ranks_is_fedit():
    rule, current, given = make_aggregator("fold"), random_adapter(4, seed=1), updates([4, 4, 4])
    sent = rule.download(current, 4, np.random.default_rng(0))
    assert sent.fixed is None
    assert same(sent.adapter, current)
    result = rule.aggregate(current, [Update(a, w, sent=sent) for a, w in given]).adapter
    assert_same(result, aggregated("fedit", current, given).adapter)


def test_fold_is_unbiased_over_coins_and_draws():
    """The mean over all of them is ``X + Σ a_n r_n Δ_n / Σ a_n r_n``."""
    a, q, ranks, R = [0.5, 0.2, 0.3], [0.4, 0.8, 0.6], [2, 1, 3], 3
    rule, current = make_aggregator("fold"), random_adapter(R, seed=1, shapes={"m": (3, 2)})
    old = current.pairs["m"]
    moves = [random_adapter(R, seed=20 + n, shapes={"m": (3, 2)}).pairs["m"] for n in range(3)]

    def update(n, entries):
        index = torch.tensor(entries)
        sent = LoraPair(old.A[index], old.B[:, index], old.scale)
        got = LoraPair(sent.A + moves[n].A[index], sent.B + moves[n].B[:, index], old.scale)
        download = Download(Adapter({"m": sent}, current.dense), {"m": index})
        return Update(Adapter({"m": got}, current.dense), a[n] / q[n], sent=download)

    everybody = Population(dict(zip(ranks, a, strict=True)))
    options = [[update(n, s) for s in itertools.combinations(range(R), ranks[n])] for n in range(3)]
    mean = torch.zeros_like(old.A, dtype=torch.float64)
    for coins in itertools.product([False, True], repeat=3):
        chance = np.prod([p if c else 1 - p for p, c in zip(q, coins, strict=True)])
        here = [o for o, c in zip(options, coins, strict=True) if c]
        for chosen in itertools.product(*here):
            share = chance / np.prod([len(o) for o in here])
            mean += share * rule.aggregate(current, chosen, everybody).adapter.pairs["m"].A.double()
    expected = sum(w * r * m.A for w, r, m in zip(a, ranks, moves, strict=True))
    expected = old.A + expected / sum(w * r for w, r in zip(a, ranks, strict=True))
    torch.testing.assert_close(mean, expected.double(), rtol=1e-5, atol=1e-5)


def test_fold_wants_to_know_which_terms_came():
    rule, current = make_aggregator("fold"), random_adapter(4, seed=1)
    with pytest.raises(ValueError, match="nothing says which of the 4 they are"):
        rule.aggregate(current, updates([2]))


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_fixed_terms_travel_as_merges_and_are_not_sent_back(wire):
    rule = make_aggregator("fold")
    packing = Packing(rule, GlobalModel(random_adapter(6, seed=1)), wire, 1)
    parcel = packing.train(2, lambda: np.random.default_rng(0))
    names = list(parcel.sent().record)
    assert any(name.startswith("merged.") for name in names)
    assert not any(name.startswith("merged.") for name in parcel.expected)
    assert parcel.rank == 2
    whole = packing.train(6, lambda: np.random.default_rng(0))
    assert not any(name.startswith("merged.") for name in whole.sent().record)
