"""Private updates: the mechanism against plain numpy, the accountant against integrals."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from strategies.aggregation import AGGREGATIONS, make_aggregator
from strategies.lora import Adapter, factor_of
from strategies.privacy import (
    Fixed,
    Gaussian,
    Poisson,
    Privacy,
    PrivacyAccountant,
    add_noise,
    central_epsilon,
    clip_displacement,
    clip_update,
    epsilon,
    local_epsilon,
    refuse_amplification,
    refuse_private,
    top_up,
)
from strategies.privacy.mechanism import CLIP_KEY, NOISE_KEY
from strategies.ranks import AutoRank, ListRank, QualityRank, SelfPruningRank, UniformRank
from strategies.sampling import FractionSampling, make_sampler
from strategies.wire import WIRE_DTYPES, decode, encode
from tests.fakes import random_adapter, same

dp_accounting = pytest.importorskip("dp_accounting")
DELTA = 1e-5


def flat(tensors):
    """One float64 vector, in the order of the keys."""
    return np.concatenate([tensors[k].numpy().astype(np.float64).ravel() for k in sorted(tensors)])


def state(seed, rank=3):
    return random_adapter(rank, seed=seed).to_state_dict()


def uploaded(tensors, factors):
    return {k: t for k, t in tensors.items() if factor_of(k) is None or factor_of(k) in factors}


# ----- clipping ------------------------------------------------------------------------


@pytest.mark.parametrize("factors", ["AB", "A", "B", ""])
@pytest.mark.parametrize("norm", [1e-3, 0.7, 5.0])
def test_everything_that_leaves_is_clipped_together(factors, norm):
    start, trained = state(1), uploaded(state(2), factors)
    clipped, before = clip_displacement(start, trained, norm)
    x, y = flat({k: start[k] for k in trained}), flat(trained)
    length = np.linalg.norm(y - x)
    assert before == pytest.approx(length, rel=1e-12)
    assert length > norm  # or nothing is tested here
    np.testing.assert_allclose(flat(clipped), x + (y - x) * norm / length, atol=1e-6)
    assert clipped.keys() == trained.keys()


def test_what_is_within_the_norm_stays_to_the_last_bit():
    start, trained = state(1), state(2)
    clipped, before = clip_displacement(start, trained, 1e3)
    assert before < 1e3
    assert all(torch.equal(clipped[k], trained[k]) for k in trained)


def test_an_update_is_clipped_at_the_rank_and_scale_it_is_compared_at():
    sent, trained = random_adapter(4, seed=1, scale=2.0), random_adapter(2, seed=2, scale=4.0)
    clipped, before = clip_update(sent, trained, 1.0)
    start, own = sent.with_rank(2).to_state_dict(), trained.with_scale(2.0).to_state_dict()
    distance = np.linalg.norm(flat(own) - flat(start))
    assert before == pytest.approx(distance)
    assert np.linalg.norm(flat(clipped.to_state_dict()) - flat(start)) == pytest.approx(1.0)
    assert {pair.scale for pair in clipped.pairs.values()} == {2.0}
    kept, _ = clip_update(sent, trained, 2 * distance)
    assert same(kept, trained)


def test_a_diverged_update_is_left_for_validation_to_refuse():
    sent, trained = random_adapter(3, seed=1), random_adapter(3, seed=2)
    bad = trained.to_state_dict()
    bad["head.bias"] = torch.tensor([1.0, math.nan, 0.0])
    got, norm = clip_update(sent, Adapter.from_state_dict(bad, 2.0, check_finite=False), 1.0)
    assert math.isnan(norm)
    assert got.non_finite() == ["'head.bias' holds NaN or Inf"]


def test_an_unknown_start_is_refused():
    start, trained = state(1), state(2)
    del start["head.bias"]
    with pytest.raises(ValueError, match=r"'head.bias' is to leave .* nothing was received"):
        clip_displacement(start, trained, 1.0)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) was received"):
        clip_displacement(state(1, rank=4), trained, 1.0)
    with pytest.raises(ValueError, match="norm: expected a number above 0"):
        clip_displacement(trained, trained, 0.0)


# ----- noise ---------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [None, np.random.default_rng(5)])
def test_noise_is_normal_and_independent(generator):
    zeros = {"a": torch.zeros(500, 401), "b": torch.zeros(200_501)}  # odd numbers as well
    noisy = add_noise(zeros, 0.3, generator)
    for tensor in noisy.values():
        assert tensor.dtype == torch.float32
        assert stats.kstest(tensor.numpy().ravel() / 0.3, "norm").pvalue > 1e-6
    a, b = noisy["a"].numpy().ravel(), noisy["b"].numpy()[:200_500]
    limit = 5 / math.sqrt(200_500)
    assert abs(np.corrcoef(a, b)[0, 1]) < limit
    half = len(a) // 2  # where the sines of the same radii begin
    assert abs(np.corrcoef(a[:half], a[half : 2 * half])[0, 1]) < limit * math.sqrt(2)
    assert abs(np.corrcoef(a[:half] ** 2, a[half : 2 * half] ** 2)[0, 1]) < limit * math.sqrt(2)


def test_noise_follows_a_generator_and_nothing_else():
    privacy, start, trained = Privacy(1.0, 0.5), state(1), state(2)

    def seeded(seed):
        torch.manual_seed(7)  # what a run seeds must not matter
        return flat(privacy.apply(start, trained, np.random.default_rng(seed)))

    def fresh():
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        return flat(privacy.apply(start, trained))

    np.testing.assert_array_equal(seeded(3), seeded(3))
    assert not np.any(seeded(3) == seeded(4))
    assert not np.any(fresh() == fresh())


def test_noise_hides_every_number_that_leaves_and_no_other():
    start, trained = state(1), uploaded(state(2), "B")
    sent = Privacy(1.0, 0.5).apply(start, trained, np.random.default_rng(1))
    assert sent.keys() == trained.keys()
    clipped, _ = clip_displacement(start, trained, 1.0)
    noise = flat(sent) - flat(clipped)
    assert np.all(noise != 0)
    expected = np.random.default_rng(1)  # the same stream, tensor by tensor
    for key in trained:
        own = sent[key].double() - clipped[key].double()
        drawn = 0.5 * expected.standard_normal(own.numel()).reshape(own.shape)
        np.testing.assert_allclose(own.numpy(), drawn, atol=1e-6)


def test_a_diverged_client_sends_pure_noise():
    start, trained = state(1), state(2)
    trained["head.bias"] = torch.tensor([1.0, math.inf, 0.0])
    sent = Privacy(1.0, 0.5).apply(start, trained, np.random.default_rng(1))
    assert np.isfinite(flat(sent)).all()
    idle = Privacy(1.0, 0.5).apply(start, {k: start[k] for k in trained}, np.random.default_rng(1))
    np.testing.assert_array_equal(flat(sent), flat(idle))


@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_private_updates_travel_on_every_wire_type(wire):
    start = decode(encode(state(1), wire), wire)
    sent = Privacy(2.0, 0.1).apply(start, state(2), np.random.default_rng(1))
    got = decode(encode(sent, wire), wire)
    largest = max(float(t.abs().max()) for t in sent.values())
    np.testing.assert_allclose(flat(got), flat(sent), atol=largest / 127)


def test_a_node_may_insist_on_more_than_the_server_asks_for():
    config = {CLIP_KEY: 1.0, NOISE_KEY: 0.5, "server-round": 1}
    assert Privacy.asked({}) is None
    assert Privacy.asked(config) == Privacy(1.0, 0.5)
    assert Privacy(1.0, 0.5).settings() == {CLIP_KEY: 1.0, NOISE_KEY: 0.5}
    assert Privacy.asked(config, {NOISE_KEY: 0.5, CLIP_KEY: 1.0}) == Privacy(1.0, 0.5)
    for message, node, match in (
        ({}, {NOISE_KEY: 0.5}, r"insists on dp-noise-multiplier = 0.5 or more.*says 0"),
        (config, {NOISE_KEY: 0.6}, r"insists on dp-noise-multiplier = 0.6"),
        (config, {CLIP_KEY: 0.1}, r"insists on dp-clip = 0.1 or less.*says 1"),
        ({NOISE_KEY: 0.5}, None, "dp-clip: expected a finite number above 0"),
        ({CLIP_KEY: 1.0, NOISE_KEY: math.nan}, None, "says nan"),
        ({CLIP_KEY: 1.0, NOISE_KEY: -1.0}, None, "says -1"),
    ):
        with pytest.raises(ValueError, match=match):
            Privacy.asked(message, node)


# ----- accounting: no sampling ---------------------------------------------------------


def normal(x, mean, sigma):
    return np.exp(-(((x - mean) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))


def hockey_stick(p, q, value, sigma):
    """∫ max(0, p − e^ε q), on a fine grid: the definition of δ(ε), and nothing else."""
    x = np.linspace(-40 * sigma - 3, 40 * sigma + 3, 400_001)
    return integrate.simpson(np.maximum(0.0, p(x) - math.exp(value) * q(x)), x=x)


@pytest.mark.parametrize(("multiplier", "rounds"), [(2.0, 1), (4.0, 9), (8.0, 3), (1.0, 2)])
def test_a_gaussian_mechanism_has_the_delta_it_says(multiplier, rounds):
    found = local_epsilon(multiplier, DELTA, rounds)
    # Independent rounds with displacements 1 and −1 are one with √k times their distance.
    sigma, reach = multiplier, math.sqrt(rounds)
    delta = hockey_stick(
        lambda x: normal(x, reach, sigma), lambda x: normal(x, -reach, sigma), found, sigma
    )
    assert delta == pytest.approx(DELTA, rel=1e-4)
    package = dp_accounting.get_epsilon_gaussian(multiplier / (2 * math.sqrt(rounds)), DELTA)
    assert found == pytest.approx(package, rel=1e-7)
    assert found >= package


def test_hiding_a_removal_costs_half_the_distance():
    removed = local_epsilon(2.0, DELTA, 5, neighbours="remove")
    assert removed == pytest.approx(local_epsilon(4.0, DELTA, 5))
    with pytest.raises(ValueError, match="'replace' or 'remove', got 'add'"):
        local_epsilon(2.0, DELTA, 5, neighbours="add")


def test_rounds_by_chance_have_the_mean_delta():
    z, rounds, q, delta = 6.0, 50, 0.2, 1e-2
    found = local_epsilon(z, delta, rounds, probability=q)
    rng = np.random.default_rng(0)
    # The privacy loss itself, drawn: after k rounds it is normal with mean k/2σ², variance k/σ².
    k = rng.binomial(rounds, q, 2_000_000)
    sigma = z / 2
    loss = rng.normal(k / (2 * sigma**2), np.sqrt(k) / sigma)
    drawn = np.maximum(0.0, -np.expm1(found - loss))
    error = drawn.std() / math.sqrt(len(drawn))
    assert drawn.mean() == pytest.approx(delta, abs=5 * error)
    assert local_epsilon(z, delta, 10) < found < local_epsilon(z, delta, 50)
    assert local_epsilon(z, delta, rounds, probability=1.0) == local_epsilon(z, delta, rounds)
    assert local_epsilon(z, delta, rounds, probability=0.0) == 0


# ----- accounting: independent coins ---------------------------------------------------


def renyi(q, sigma, alpha):
    """Rényi divergence of order α of the sampled Gaussian, by its defining integral."""

    def density(x):
        ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
        return math.exp(alpha * ratio + stats.norm.logpdf(x, 0, sigma))

    reach = alpha + 30 * sigma
    value, _ = integrate.quad(density, -30 * sigma, reach, limit=500, points=[0, alpha / 2, alpha])
    return math.log(value) / (alpha - 1)


# What is published under δ = 1e-5 by the moments accountant: Abadi et al. 2016 (arXiv
# 1607.00133, section 4: q = 0.01, σ = 4, 10,000 steps), and Bu et al. 2020 (Harvard Data
# Science Review, figure 4: batches of 256 of 60,000 rows; 70 epochs at σ = 0.7).
PUBLISHED = [(0.01, 4.0, 10_000, 1.26), (256 / 60_000, 0.7, round(70 * 60_000 / 256), 8.68)]


@pytest.mark.parametrize(("q", "sigma", "rounds", "published"), PUBLISHED)
def test_published_values_of_the_sampled_gaussian(q, sigma, rounds, published):
    orders = [*range(2, 33)] if sigma > 1 else [1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8]
    curve = {a: rounds * renyi(q, sigma, a) for a in orders}
    # The conversion of the day reproduces what was printed …
    then = min(r + math.log(1 / DELTA) / (a - 1) for a, r in curve.items())
    assert then == pytest.approx(published, rel=0.02)
    # … that of Canonne, Kamath and Steinke (2020) what the accountant says now …
    now = min(r + math.log1p(-1 / a) - math.log(DELTA * a) / (a - 1) for a, r in curve.items())
    found = central_epsilon(sigma, DELTA, rounds, sampling="poisson", probability=q)
    assert found == pytest.approx(now, rel=0.01)
    # … and a tight accountant says less, but not much.
    tight = dp_accounting.pld.PLDAccountant()
    event = dp_accounting.GaussianDpEvent(sigma)
    tight.compose(dp_accounting.PoissonSampledDpEvent(q, event), rounds)
    assert 0.85 * found < tight.get_epsilon(DELTA) < found


def test_coins_at_their_ends():
    always = central_epsilon(3.0, DELTA, 20, sampling="poisson", probability=1.0)
    assert always == pytest.approx(local_epsilon(6.0, DELTA, 20))
    assert central_epsilon(3.0, DELTA, 20, sampling="poisson", probability=0.0) == 0
    assert central_epsilon(0.0, DELTA, 20, sampling="poisson", probability=0.5) == math.inf
    rates = [0.01, 0.1, 0.3, 0.6, 0.9, 1.0]
    found = [central_epsilon(3.0, DELTA, 20, sampling="poisson", probability=q) for q in rates]
    assert found == sorted(found)


def test_the_noise_of_a_draw_is_topped_up_to_the_same_sum():
    rng = np.random.default_rng(0)
    q, clip, z = np.array([0.2, 0.5, 0.9]), 1.0, 0.7
    w = np.full(3, 1 / 3) / q
    total = z * clip * math.sqrt((w**2).sum())
    for joined in ([], [0], [1, 2], [0, 1, 2]):
        rest = top_up(w[joined], z * clip, total)
        own = (rng.normal(0, z * clip, (40_000, len(joined))) * w[joined]).sum(axis=1)
        assert (own + rng.normal(0, rest, 40_000)).std() == pytest.approx(total, rel=0.02)
    assert top_up([1.0], 0.0, 2.0) == 2.0
    with pytest.raises(ValueError, match="clients' noise alone is"):
        top_up(w, z * clip, 0.9 * total)


# ----- accounting: fixed size ----------------------------------------------------------


@pytest.mark.parametrize(("clients", "sample"), [(2, 1), (100, 99), (50, 5)])
@pytest.mark.parametrize("z", [1.0, 4.0])
def test_fixed_size_covers_the_worst_pair_of_data_sets(clients, sample, z):
    """Everyone else stands still; client n moves by C, or by −C after its data are replaced."""
    q, delta = sample / clients, 1e-3
    found = central_epsilon(z, delta, 1, sampling="fixed", clients=clients, sample=sample)
    worst = hockey_stick(
        lambda x: q * normal(x, 1, z) + (1 - q) * normal(x, 0, z),
        lambda x: q * normal(x, -1, z) + (1 - q) * normal(x, 0, z),
        found,
        z,
    )
    assert worst <= delta
    unsampled = central_epsilon(z, delta, 1, sampling="all")
    assert found <= unsampled
    if sample == 99:  # a sensitivity of C instead of 2C would be caught here
        assert central_epsilon(2 * z, delta, 1, sampling="all") < 0.75 * found


def test_fixed_size_is_the_bound_of_wang_balle_and_kasiviswanathan():
    q, sigma, alpha, rounds = 0.1, 5.0, 2, 10
    # Theorem 9 of arXiv 1808.00087 at order 2, where it is short.
    e2 = alpha / (2 * sigma**2)
    rdp = math.log1p(q**2 * min(4 * math.expm1(e2), 2 * math.exp(e2)))
    accountant = dp_accounting.rdp.RdpAccountant(
        [alpha], dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    event = dp_accounting.GaussianDpEvent(sigma)
    accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(100, 10, event), rounds)
    bound = rounds * rdp + math.log1p(-1 / alpha) - math.log(DELTA * alpha) / (alpha - 1)
    assert accountant.get_epsilon(DELTA) == pytest.approx(bound)
    assert epsilon({Fixed(sigma, 100, 10): rounds}, DELTA) <= bound


@pytest.mark.parametrize("sampling", ["all", "fixed", "poisson"])
def test_more_noise_and_fewer_rounds_give_less_away(sampling):
    def spent(z, rounds, delta=DELTA):
        return central_epsilon(
            z, delta, rounds, sampling=sampling, clients=20, sample=4, probability=0.2
        )

    assert spent(8, 10) < spent(4, 10) < spent(2, 10)
    assert spent(4, 0) == 0 < spent(4, 1) < spent(4, 10) < spent(4, 100)
    assert spent(4, 10, delta=1e-3) < spent(4, 10)
    assert spent(0, 1) == math.inf


def test_bad_numbers_are_refused():
    for match, call in (
        ("delta: expected", lambda: local_epsilon(1, 0.0, 1)),
        ("rounds: expected 0 or more, got -1", lambda: local_epsilon(1, DELTA, -1)),
        ("probability: expected 0 to 1", lambda: local_epsilon(1, DELTA, 1, probability=1.5)),
        ("noise multiplier: expected", lambda: epsilon({Gaussian(math.nan): 1}, DELTA)),
        (r"sample: expected 1 to .* \(5\), got 6", lambda: epsilon({Fixed(1, 5, 6): 1}, DELTA)),
        ("got both", lambda: epsilon({Fixed(1, 5, 2): 1, Poisson(1, 0.5): 1}, DELTA)),
        ("got 'some'", lambda: central_epsilon(1, DELTA, 1, sampling="some")),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# ----- the accountant of a run ---------------------------------------------------------


def test_the_ledger_of_full_participation():
    accountant = PrivacyAccountant(4.0, DELTA)
    assert accountant.local_epsilon() == accountant.central_epsilon() == 0
    for _ in range(10):
        accountant.record([0, 1, 2])
        accountant.record_fixed(3, 3, 3, summed=True, amplified=True)
    accountant.record([1])
    assert accountant.local_epsilon(0) == local_epsilon(4.0, DELTA, 10)
    assert accountant.local_epsilon() == local_epsilon(4.0, DELTA, 11)
    expected = central_epsilon(4.0 * math.sqrt(3), DELTA, 10, sampling="all")
    assert accountant.central_epsilon() == pytest.approx(expected)


def test_secrecy_counts_only_in_rounds_where_all_answered():
    def spent(answered, **claims):
        accountant = PrivacyAccountant(4.0, DELTA)
        for i in range(10):
            accountant.record([0, 1 + i % 9])
            accountant.record_fixed(10, 2, answered, **claims)
        return accountant.central_epsilon()

    best = spent(2, summed=True, amplified=True)
    assert best == epsilon({Fixed(4.0 * math.sqrt(2) / 2, 10, 2): 10}, DELTA)
    assert best < spent(2, summed=False, amplified=True) < spent(1, summed=True, amplified=True)
    for claims in ({"answered": 2, "amplified": False}, {"answered": 0, "amplified": True}):
        assert spent(summed=True, **claims) == local_epsilon(4.0, DELTA, 10)


def test_who_is_asked_rarely_weighs_more_and_may_lose_most():
    accountant = PrivacyAccountant(0.5, DELTA)
    rates = {0: 0.05, 1: 0.5}
    weights = {n: 0.5 / q for n, q in rates.items()}
    for _ in range(20):
        accountant.record([0, 1])
        accountant.record_poisson(rates, weights, 20.0)
    each = [accountant.central_epsilon(n) for n in (0, 1)]
    assert each[0] == pytest.approx(epsilon({Poisson(2.0, 0.05): 20}, DELTA), rel=1e-12)
    assert each[1] == pytest.approx(epsilon({Poisson(20.0, 0.5): 20}, DELTA), rel=1e-12)
    assert each[0] > each[1]
    assert accountant.central_epsilon() == each[0]


def test_the_ledger_survives_json():
    accountant = PrivacyAccountant(4.0, DELTA)
    accountant.record([0, 3])
    accountant.record_fixed(10, 2, 2, summed=True, amplified=True)
    accountant.record_fixed(10, 2, 1, summed=True, amplified=True)
    again = PrivacyAccountant(4.0, DELTA)
    again.load_state_dict(json.loads(json.dumps(accountant.state_dict())))
    other = PrivacyAccountant(4.0, DELTA)
    other.record_poisson({0: 0.1, 7: 0.2}, {0: 1.0, 7: 0.5}, 3.0)
    for one, two in ((accountant, again), (again, accountant)):
        one.record([3])
        assert one.state_dict() != two.state_dict()
        two.record([3])
        assert one.state_dict() == two.state_dict()
        assert one.central_epsilon() == two.central_epsilon() > 0
    third = PrivacyAccountant(4.0, DELTA)
    third.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert third.state_dict() == other.state_dict()


# ----- what would void it --------------------------------------------------------------


def refused(rule="fedit", ranks=None, sampling=None, evaluate=0.0, **options):
    rule = make_aggregator(rule, **options)
    sampling = sampling or FractionSampling(0.5)
    return refuse_private(rule, ranks or UniformRank(4), sampling, evaluate_fraction=evaluate)


@pytest.mark.parametrize("rule", sorted(AGGREGATIONS))
def test_every_rule_is_post_processing(rule):
    assert refused(rule) == []


def test_data_that_leave_beside_the_updates_are_refused():
    assert refused(ranks=ListRank([4, 8])) == []
    assert refused(ranks=SelfPruningRank(8)) == []
    assert refused(ranks=QualityRank(score_fn=lambda adapter: 1.0)) == []
    (quality,) = refused("replication", holder_weights="quality")
    assert "quality that clients measure" in quality
    (profile,) = refused(ranks=AutoRank())
    assert "'autorank' asks clients for numbers" in profile
    (judged,) = refused(ranks=QualityRank())
    assert "validation-loss" in judged
    (tested,) = refused(evaluate=1.0)
    assert "evaluate_fraction = 0" in tested
    (weighted,) = refused(sampling=make_sampler("weighted"))
    assert "numbers of rows" in weighted
    assert len(refused(ranks=AutoRank(), evaluate=0.1)) == 2


def weakened(rule="fedit", ranks=None, sampling=None, *, secret_draws=True, **claims):
    sampling = sampling or FractionSampling(0.5)
    return refuse_amplification(
        make_aggregator(rule),
        ranks or UniformRank(4),
        sampling,
        secret_draws=secret_draws,
        **claims,
    )


def test_sampling_hides_nobody_who_shows_otherwise():
    unbiased = make_sampler("independent", q=0.2, estimator="unbiased")
    assert weakened() == weakened("flexlora") == weakened("hetlora") == []
    assert weakened(sampling=unbiased, topped_up=True) == []
    for match, problems in (
        ("seed, which is public", weakened(secret_draws=False)),
        ("may differ in rank", weakened(ranks=ListRank([4, 8]))),
        ("single updates", weakened("flora")),
        ("single updates", weakened("fslora")),
        ("server clips", weakened(server_clips=True)),
        ("top it up", weakened(sampling=unbiased)),
        ("not linear", weakened("flexlora", sampling=unbiased, topped_up=True)),
        (
            "ratio estimator",
            weakened(sampling=make_sampler("independent", estimator="ratio"), topped_up=True),
        ),
    ):
        (problem,) = problems
        assert match in problem
    statistical = make_sampler("statistical", estimator="unbiased")
    assert "data decide who joins" in weakened(sampling=statistical, topped_up=True)[0]


@pytest.mark.parametrize("rule", ["fedit", "zero-padding", "rbla", "replication"])
def test_noises_of_a_linear_rule_add_up(rule):
    """What the √m in the accountant rests on: the mean of m noisy updates, weights equal."""
    current = random_adapter(3, seed=0)
    clean = [random_adapter(3, seed=n) for n in (1, 2, 3, 4)]
    rng = np.random.default_rng(0)
    noisy = [
        Adapter.from_state_dict(add_noise(a.to_state_dict(), 1.0, rng), 2.0) for a in clean * 100
    ]
    moved = []
    for i in range(0, len(noisy), 4):
        means = [
            make_aggregator(rule).aggregate(current, [(a, 1.0) for a in group]).adapter
            for group in (noisy[i : i + 4], clean)
        ]
        moved.append(np.subtract(*(flat(a.to_state_dict()) for a in means)))
    assert np.std(moved) == pytest.approx(1 / math.sqrt(4), rel=0.02)


# ----- what must be installed ----------------------------------------------------------


def test_a_client_needs_neither_the_accountant_nor_scipy():
    code = (
        "import sys, strategies, strategies.privacy as p\n"
        "assert not {'dp_accounting', 'scipy'} & sys.modules.keys()\n"
        "sys.modules['dp_accounting'] = None\n"
        "assert p.local_epsilon(1.0, 1e-5, 3) > 0\n"
        "try:\n    p.central_epsilon(1.0, 1e-5, 3, sampling='fixed', clients=9, sample=3)\n"
        "except ImportError as error:\n    assert 'fedlora[privacy]' in str(error)\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
