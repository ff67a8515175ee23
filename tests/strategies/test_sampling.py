"""Samplers alone: coins, proportions, norms."""

import json

import numpy as np
import pytest
import torch

from strategies.clients import Client
from strategies.lora import Adapter, LoraPair
from strategies.sampling import (
    SAMPLERS,
    FractionSampling,
    IndependentSampling,
    Outlook,
    StatisticalSampling,
    WeightedSampling,
    make_sampler,
)
from strategies.trained import Trained
from tests.fakes import random_adapter


def clients(*indices):
    return [Client(1000 - 7 * i, i) for i in indices]


def outlook(weights, *, indices=None, server_round=1):
    everyone = clients(*(range(len(weights)) if indices is None else indices))
    a = np.array(weights, float)
    return Outlook(server_round, everyone, a / a.sum(), [8] * len(a), None, (0.0, 1.0), False, 8)


def draws(sampler, everyone, times, seed=0):
    """Return who joined, one row a round, shape (times, n)."""
    joined = np.zeros((times, len(everyone)), bool)
    for t in range(times):
        chosen = set(sampler.sample(everyone, t + 1, np.random.default_rng([seed, t])))
        joined[t] = [client in chosen for client in everyone]
    return joined


def test_every_sampler_is_found_by_name():
    assert set(SAMPLERS) == {"fraction", "independent", "weighted", "statistical", "planned"}
    for name in SAMPLERS:
        assert name in make_sampler(name).summary()
    with pytest.raises(ValueError, match="did you mean 'weighted'"):
        make_sampler("weigthed")


# ----- a number of clients --------------------------------------------------------------------


def test_exactly_so_many_clients_without_replacement():
    everyone = clients(*range(12))
    sampler = FractionSampling(clients=5)
    joined = draws(sampler, everyone, 2000)
    assert (joined.sum(axis=1) == 5).all()
    error = np.sqrt(5 / 12 * 7 / 12 / 2000)
    assert np.abs(joined.mean(axis=0) - 5 / 12).max() < 4 * error
    assert sampler.sample(everyone[:3], 1, np.random.default_rng(0)) == everyone[:3]
    assert sampler.probabilities(everyone) is None
    with pytest.raises(ValueError, match="clients: expected 0"):
        FractionSampling(clients=-1)


# ----- coins ----------------------------------------------------------------------------------


def test_coins_are_bernoulli_and_independent():
    q = np.array([0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
    everyone = clients(*range(6))
    joined = draws(IndependentSampling(q.tolist()), everyone, 4000)
    assert (np.abs(joined.mean(axis=0) - q) <= 4 * np.sqrt(q * (1 - q) / 4000)).all()
    assert joined[:, 5].all()
    assert not joined.all(axis=1).all()
    # Pairs: E[I J] = q_i q_j.
    both = (joined[:, :, None] & joined[:, None, :]).mean(axis=0)
    expected = np.outer(q, q)
    error = np.sqrt(expected * (1 - expected) / 4000)
    off = ~np.eye(6, dtype=bool)
    assert (np.abs(both - expected)[off] <= 4 * error[off] + 1e-12).all()


def test_inverse_probability_weights_are_unbiased():
    rng = np.random.default_rng(5)
    a, q, x = rng.dirichlet(np.ones(8)), rng.uniform(0.1, 1, 8), rng.normal(size=(8, 3))
    everyone = clients(*range(8))
    sampler = IndependentSampling(dict(enumerate(q.tolist())))
    joined = draws(sampler, everyone, 3000, seed=3)
    sums = joined @ (a[:, None] / sampler.probabilities(everyone)[:, None] * x)
    error = sums.std(axis=0) / np.sqrt(3000)
    assert (np.abs(sums.mean(axis=0) - a @ x) < 4 * error).all()


def test_a_coin_does_not_depend_on_who_else_is_there():
    everyone = clients(*range(30))
    some = [client for client in everyone if client.index % 3]
    renumbered = [Client(client.node_id + 5, client.index) for client in everyone]
    for sampler in (IndependentSampling(0.4), IndependentSampling([0.4] * 30)):
        for t in range(20):
            chosen = {c.index for c in sampler.sample(everyone, 1, np.random.default_rng(t))}
            fewer = {c.index for c in sampler.sample(some, 1, np.random.default_rng(t))}
            assert fewer == {i for i in chosen if i % 3}
            again = {c.index for c in sampler.sample(renumbered, 1, np.random.default_rng(t))}
            assert again == chosen


def test_nobody_may_join_and_nobody_may_be_there():
    sampler = IndependentSampling(1e-9)
    assert sampler.sample(clients(0, 1, 2), 1, np.random.default_rng(0)) == []
    for name in ("independent", "weighted", "statistical", "planned"):
        assert make_sampler(name).probabilities([]).shape == (0,)
        assert make_sampler(name).sample([], 1, np.random.default_rng(0)) == []


def test_probabilities_go_by_client_index():
    listed = IndependentSampling([0.1, 0.2, 0.3])
    assert listed.probabilities(clients(2, 0)).tolist() == [0.3, 0.1]
    mapped = IndependentSampling({7: 0.5, 3: 1})
    assert mapped.probabilities(clients(3, 7)).tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"3 probabilities.*none for client 5 \(node 965\)"):
        listed.probabilities(clients(0, 5))
    with pytest.raises(ValueError, match="client 4"):
        mapped.sample(clients(4), 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": 0}, "q: "),
        ({"q": 1.01}, "q: "),
        ({"q": float("nan")}, "q: "),
        ({"q": []}, "got none"),
        ({"q": [0.5, 0.0]}, "for client 1"),
        ({"q": {4: -1}}, "for client 4"),
        ({"estimator": "best"}, "estimator: expected one of auto, unbiased, ratio"),
        ({"server_rate": 0}, "server_rate"),
        ({"estimator": "ratio", "server_rate": 2.0}, "estimator = 'ratio'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IndependentSampling(**options)


@pytest.mark.parametrize("name", ["weighted", "statistical"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction"),
        ({"fraction": 0.1, "q_min": 0.2}, "q_min.*0.1"),
        ({"q_min": 0}, "q_min"),
    ],
)
def test_bad_shares_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(name, **options)


# ----- proportions ------------------------------------------------------------------------------


def test_weighted_follows_the_data():
    a = np.random.default_rng(1).lognormal(0, 1, 40)
    sampler = WeightedSampling(0.2)
    view = outlook(a)
    sampler.prepare(view)
    q = sampler.probabilities(view.clients)
    assert q.sum() == pytest.approx(8)
    free = (q < 1) & (q > sampler.q_min)
    assert free.sum() > 20
    assert np.ptp(q[free] / a[free]) < 1e-9 * q[free][0] / a[free][0]
    assert (a[q == 1] >= a[free].max()).all() if (q == 1).any() else True
    joined = draws(sampler, view.clients, 1500)
    assert abs(joined.sum(axis=1).mean() - 8) < 4 * np.sqrt((q * (1 - q)).sum() / 1500)


def test_a_share_of_everyone_is_everyone():
    for name in ("weighted", "statistical"):
        sampler = make_sampler(name, fraction=1.0)
        view = outlook([1, 5, 2])
        sampler.prepare(view)
        assert sampler.sample(view.clients, 1, np.random.default_rng(0)) == list(view.clients)
        uniform = make_sampler(name, fraction=0.3, q_min=0.3)
        uniform.prepare(view)
        assert uniform.probabilities(view.clients) == pytest.approx([0.3] * 3)


def test_weighted_says_when_it_was_not_prepared():
    sampler = WeightedSampling(0.5)
    sampler.prepare(outlook([1, 1]))
    with pytest.raises(ValueError, match=r"client 2 .*prepare"):
        sampler.sample(clients(0, 1, 2), 1, np.random.default_rng(0))


# ----- norms -------------------------------------------------------------------------------------


def moved(adapter, step, seed):
    """Return the adapter after a random step of a given norm over everything."""
    g = torch.Generator().manual_seed(seed)
    noise = {k: torch.randn(t.shape, generator=g) for k, t in adapter.to_state_dict().items()}
    size = torch.cat([t.flatten() for t in noise.values()]).norm()
    state = {k: t + noise[k] * (step / size) for k, t in adapter.to_state_dict().items()}
    return Adapter.from_state_dict(state, {m: p.scale for m, p in adapter.pairs.items()})


def reply(index, step, seed=0):
    sent = random_adapter(4, seed=seed)
    return Trained(clients(index)[0], moved(sent, step, seed + 50), sent, {}, 1)


def test_statistical_follows_weights_and_norms():
    sampler = StatisticalSampling(0.3)
    a = np.array([1.0, 2.0, 3.0, 4.0])
    view = outlook(a)
    sampler.prepare(view)  # nothing known: by weight
    assert sampler.probabilities(view.clients) == pytest.approx(1.2 * a / 10)
    for index, step in ((0, 3.0), (1, 0.5), (2, 1.0)):
        sampler.observe(reply(index, step, seed=index))
    sampler.prepare(view)
    products = a * [3.0, 0.5, 1.0, 1.5]  # client 3 is taken for the mean of the others
    assert sampler.probabilities(view.clients) == pytest.approx(
        1.2 * products / products.sum(), rel=1e-5
    )
    restored = StatisticalSampling(0.3)
    restored.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    restored.prepare(view)
    assert restored.probabilities(view.clients).tolist() == (
        sampler.probabilities(view.clients).tolist()
    )


def test_norms_are_smoothed():
    sampler = StatisticalSampling(0.5, smoothing=0.25)
    for step in (4.0, 8.0, 0.0):
        sampler.observe(reply(1, step))
    assert sampler.state_dict()["norms"]["1"] == pytest.approx((4 * 0.75 + 8 * 0.25) * 0.75)


def test_no_change_at_all_leaves_the_weights():
    sampler = StatisticalSampling(0.5)
    sampler.observe(reply(0, 0.0))
    view = outlook([1, 3])
    sampler.prepare(view)
    assert sampler.probabilities(view.clients) == pytest.approx([0.25, 0.75])


def test_a_norm_counts_factors_at_the_sent_scale_and_missing_entries():
    A, B = torch.randn(3, 5), torch.randn(4, 3)
    sent = Adapter({"m": LoraPair(A, B, 2.0)})
    client = clients(0)[0]
    # The same function at another scale did not move; less rank lost its last entry.
    sampler = StatisticalSampling()
    sampler.observe(Trained(client, sent.with_scale(0.5), sent, {}, 1))
    assert sampler.state_dict()["norms"]["0"] == pytest.approx(0, abs=1e-6)
    sampler = StatisticalSampling()
    sampler.observe(Trained(client, sent.with_rank(2), sent, {}, 1))
    lost = torch.cat([A[2], B[:, 2]]).norm()
    assert sampler.state_dict()["norms"]["0"] == pytest.approx(float(lost), rel=1e-6)
    broken = Adapter({"m": LoraPair(A * float("inf"), B, 2.0)})
    with pytest.raises(ValueError, match="norm inf"):
        sampler.observe(Trained(client, broken, sent, {}, 1))
    assert sampler.state_dict()["norms"]["0"] == pytest.approx(float(lost), rel=1e-6)
