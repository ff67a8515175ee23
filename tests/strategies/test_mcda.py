import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pymcdm.methods import TOPSIS
from pymcdm.normalizations import vector_normalization
from pymcdm.weights import critic_weights as pymcdm_critic

from strategies.ranks.mcda import (
    critic_weights,
    ranks_for_budget,
    scores_to_ranks,
    topsis_scores,
)

# pymcdm warns of alternatives that others dominate: of no interest here.
pytestmark = pytest.mark.filterwarnings("ignore:Alternatives with indices")

SHAPES = st.tuples(st.integers(3, 12), st.integers(2, 5))
# A grid of values: differences are either zero or far above rounding noise.
MATRICES = SHAPES.flatmap(lambda s: arrays(float, s, elements=st.integers(1, 10_000).map(float)))


def independent_columns(x):
    """Pymcdm divides 0 by 0 for constant columns and trusts noise in perfect correlations."""
    if (np.ptp(x, axis=0) == 0).any():
        return False
    return (1 - np.corrcoef(x.T))[np.triu_indices(x.shape[1], 1)].min() > 1e-6


@given(MATRICES.filter(independent_columns))
def test_critic_agrees_with_pymcdm(x):
    np.testing.assert_allclose(critic_weights(x), pymcdm_critic(x), rtol=1e-7, atol=1e-12)


@given(MATRICES.filter(independent_columns), st.integers(0, 2**32 - 1))
def test_topsis_agrees_with_pymcdm(x, seed):
    weights = np.random.default_rng(seed).dirichlet(np.ones(x.shape[1]))
    expected = TOPSIS(vector_normalization)(x, weights, np.ones(x.shape[1]))
    np.testing.assert_allclose(topsis_scores(x, weights), expected, rtol=1e-7, atol=1e-9)
    expected = TOPSIS(vector_normalization)(x, pymcdm_critic(x), np.ones(x.shape[1]))
    np.testing.assert_allclose(topsis_scores(x), expected, rtol=1e-6, atol=1e-9)


@given(MATRICES, st.integers(0, 2**32 - 1))
def test_order_of_clients_and_units_of_criteria_change_nothing(x, seed):
    rng = np.random.default_rng(seed)
    order, units = rng.permutation(len(x)), 10 ** rng.uniform(-3, 3, x.shape[1])
    np.testing.assert_allclose(critic_weights(x[order] * units), critic_weights(x), atol=1e-9)
    np.testing.assert_allclose(topsis_scores(x[order] * units), topsis_scores(x)[order], atol=1e-9)


def test_critic_by_hand():
    # z = [[0, 1], [.5, 0], [1, .5]]: equal σ, so equal weights whatever ρ.
    np.testing.assert_allclose(critic_weights([[0, 2], [1, 0], [2, 1]]), [0.5, 0.5])
    # z1 = z2 = [0, .5, 1], z3 = [1, .5, 0]: Σ(1-ρ) = 2, 2, 4.
    x = [[0, 0, 2], [1, 10, 1], [2, 20, 0]]
    np.testing.assert_allclose(critic_weights(x), [0.25, 0.25, 0.5])


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([[1, 7], [2, 7], [3, 7]], [1, 0]),  # a constant column weighs nothing
        ([[4, 7], [4, 7]], [0.5, 0.5]),  # all constant: equal
        ([[4, 7, 1]], [1 / 3] * 3),  # one client
        ([[0, 0], [0, 0]], [0.5, 0.5]),  # zeros
        ([[1, 2, 5], [3, 9, 5]], [0.5, 0.5, 0]),  # two clients that agree
        ([[1, 9], [3, 2]], [0.5, 0.5]),  # two clients that disagree
        ([[0.1 + 0.2, 1], [0.3, 2], [0.3, 5]], [0, 1]),  # constant up to rounding
        ([[-1e300, 1], [1e300, 0], [0, 2]], [0.5, 0.5]),  # z: [0,1,.5] and [.5,0,1]
    ],
)
def test_critic_degenerate(x, expected):
    np.testing.assert_allclose(critic_weights(x), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([[3, 3], [3, 3], [3, 3]], [0.5, 0.5, 0.5]),
        ([[3, 4]], [0.5]),
        ([[0, 0], [0, 0]], [0.5, 0.5]),
        ([[1, 1], [2, 3]], [0, 1]),
        ([[0, 1], [1, 0]], [0.5, 0.5]),
        ([[0, 5], [1, 5], [4, 5]], [0, 0.25, 1]),
        ([[0, 5e299], [2.5e299, 5e299], [1e300, 5e299]], [0, 0.25, 1]),
        ([[0.0], [1e-310], [4e-310]], [0, 0.25, 1]),
    ],
)
def test_topsis_degenerate(x, expected):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        np.testing.assert_allclose(topsis_scores(x), expected, atol=1e-9)


def test_topsis_weights_only_matter_in_proportion():
    x = np.random.default_rng(0).random((6, 3))
    expected = topsis_scores(x, [1, 2, 3])
    np.testing.assert_allclose(topsis_scores(x, [1e-200, 2e-200, 3e-200]), expected)
    np.testing.assert_allclose(topsis_scores(x, [1e300, 2e300, 3e300]), expected)
    # weight only on a column that says nothing
    assert topsis_scores([[1, 2], [1, 3]], [1, 0]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_place(bad):
    x = np.ones((3, 2))
    x[2, 1] = bad
    for function in (critic_weights, topsis_scores):
        with pytest.raises(ValueError, match=r"row \(client\) 2, column \(criterion\) 1"):
            function(x)


@pytest.mark.parametrize("x", [[1.0, 2.0], np.zeros((0, 3)), np.zeros((3, 0))])
def test_not_a_matrix(x):
    with pytest.raises(ValueError, match="expected a matrix"):
        critic_weights(x)


@pytest.mark.parametrize("weights", [[1.0], [1, -1], [0, 0], [np.nan, 1]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        topsis_scores([[1, 2], [3, 4]], weights)


def test_scores_to_ranks_by_hand():
    assert scores_to_ranks([0.2, 0.4, 0.6], 2, 8).tolist() == [2, 5, 8]
    assert scores_to_ranks([0, 0.25, 1], 4, 6).tolist() == [4, 5, 6]  # 4.5 rounds up
    assert scores_to_ranks([0.5, 0.5], 4, 8).tolist() == [6, 6]
    assert scores_to_ranks([0.5], 4, 9).tolist() == [7]
    assert scores_to_ranks([1e300, -1e300], 1, 3).tolist() == [3, 1]
    assert scores_to_ranks([0, 1, 2], 4, 16, caps=[2, 8, 99]).tolist() == [2, 8, 16]
    assert scores_to_ranks([], 4, 16).tolist() == []


@given(
    arrays(float, st.integers(1, 20), elements=st.floats(0, 1)),
    st.integers(1, 20),
    st.integers(0, 60),
)
def test_ranks_are_monotone_and_reach_both_ends(scores, low, width):
    ranks = scores_to_ranks(scores, low, low + width)
    assert (np.diff(ranks[np.argsort(scores)]) >= 0).all()
    if np.ptp(scores) > 1e-9:
        assert (ranks.min(), ranks.max()) == (low, low + width)


def level_shares(scores, total, low, high):
    """Oracle for water-filling: plain bisection on the level."""
    below, above = 0.0, (high / np.where(scores > 0, scores, np.inf)).max() + 1
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (
            (middle, above)
            if np.clip(middle * scores, low, high).sum() < total
            else (below, middle)
        )
    return np.clip(below * scores, low, high)


@settings(deadline=None)
@given(st.data())
def test_budget_is_the_nearest_whole_division(data):
    n = data.draw(st.integers(1, 4))
    low = data.draw(st.integers(1, 3))
    top = data.draw(st.integers(low, 7))
    scores = np.array(data.draw(st.lists(st.integers(1, 30), min_size=n, max_size=n)), float)
    caps = np.array(data.draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)))
    high = np.minimum(caps, top)
    lows = np.minimum(low, high)
    total = data.draw(st.integers(int(lows.sum()), int(high.sum())))
    ranks = ranks_for_budget(scores, total, low, top, caps)
    target = level_shares(scores, total, lows, high)
    feasible = itertools.product(*(range(a, b + 1) for a, b in zip(lows, high, strict=True)))
    best = min(np.sum((np.array(r) - target) ** 2) for r in feasible if sum(r) == total)
    assert ranks.sum() == total
    assert (ranks >= lows).all()
    assert (ranks <= high).all()
    assert np.sum((ranks - target) ** 2) == pytest.approx(best, abs=1e-6)


@settings(deadline=None)
@given(
    arrays(float, st.integers(1, 40), elements=st.floats(0, 1e6)),
    st.integers(1, 8),
    st.integers(0, 60),
    st.floats(0, 1),
)
def test_budget_is_exact_and_monotone(scores, low, width, fill):
    total = len(scores) * low + int(fill * len(scores) * width)
    ranks = ranks_for_budget(scores, total, low, low + width)
    assert ranks.sum() == total
    assert ranks.min() >= low
    assert ranks.max() <= low + width
    order = np.lexsort((-ranks, scores))
    ordered, values = ranks[order], scores[order]
    assert (np.diff(ordered)[np.diff(values) > 0] >= 0).all()
    for value in np.unique(values):
        assert np.ptp(ordered[values == value]) <= 1


def test_budget_by_hand():
    assert ranks_for_budget([1, 2, 3], 12, 1, 64).tolist() == [2, 4, 6]
    assert ranks_for_budget([1, 1, 1], 10, 1, 64).tolist() == [4, 3, 3]
    assert ranks_for_budget([0, 0], 10, 1, 64).tolist() == [5, 5]
    assert ranks_for_budget([0, 1, 0], 20, 1, 10).tolist() == [5, 10, 5]
    assert ranks_for_budget([1, 2, 3], 12, 1, 64, caps=[64, 64, 3]).tolist() == [3, 6, 3]
    assert ranks_for_budget([], 0, 1, 4).tolist() == []


def test_impossible_budgets_say_what_is_possible():
    with pytest.raises(ValueError, match=r"total rank of 40 .* from 6 to 24"):
        ranks_for_budget([1, 2, 3], 40, 2, 8)
    with pytest.raises(ValueError, match=r"total rank of 6\.5 .* from 5 to 17"):
        ranks_for_budget([1, 2, 3], 6.5, 2, 8, caps=[1, 8, 8])
    with pytest.raises(ValueError, match=r"scores must be ≥ 0.*client 1"):
        ranks_for_budget([1, -2], 6, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1], 0, 4), "1 ≤ min_rank ≤ max_rank"),
        (([0.1], 8, 4), "1 ≤ min_rank ≤ max_rank"),
        (([0.1, np.nan], 1, 4), "client 1"),
        (([0.1, 0.2], 1, 4, [3]), "caps must be 2 integers"),
        (([0.1, 0.2], 1, 4, [3.0, 2.5]), "caps must be 2 integers"),
        (([0.1, 0.2], 1, 4, [3, 0]), "client 1 can hold no rank"),
        (([[0.1]], 1, 4), "one score a client"),
    ],
)
def test_bad_rank_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        scores_to_ranks(*arguments)
