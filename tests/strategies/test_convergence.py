import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.wallclock.convergence import (
    Pilot,
    estimate_convergence,
    rounds_to_target,
    sampling_variance,
)


def curve(s, beta, length, scale=10.0):
    """A loss curve for which R(loss) = α(loss)/(β − s) exactly, α(loss) = scale·log(2/loss)."""
    return 2.0 * np.exp(-np.arange(length) * (beta - s) / scale)


def test_variance_and_rounds_by_hand():
    # 0.25·2/0.5 + 0.25·1/1
    assert sampling_variance([0.5, 1], [0.5, 0.5], [2, 1]) == pytest.approx(1.25)
    assert sampling_variance([0.5, 0.5], [0.5, 0.5], 1) == pytest.approx(1)
    assert rounds_to_target([0.5, 1], [0.5, 0.5], [2, 1], 3, 2) == pytest.approx(4)


def test_rounds_errors():
    with pytest.raises(ValueError, match=r"variance Σ a² φ / q = 1.25 is not below beta = 1.25"):
        rounds_to_target([0.5, 1], [0.5, 0.5], [2, 1], 3, 1.25)
    with pytest.raises(ValueError, match="alpha and beta must be finite and > 0"):
        rounds_to_target([1], [1], [1], 0, 3)
    with pytest.raises(ValueError, match=r"q must lie in \(0, 1\]"):
        sampling_variance([0, 1], [0.5, 0.5], 1)
    with pytest.raises(ValueError, match="every a must be finite and ≥ 0"):
        sampling_variance([1, 1], [-0.5, 0.5], 1)
    with pytest.raises(ValueError, match="must have one shape"):
        sampling_variance([1, 1], [1, 1, 1], 1)


@given(st.floats(0.5, 20), st.lists(st.floats(0.01, 0.9), min_size=2, max_size=5, unique=True))
def test_exact_curves_give_their_constants(beta, shares):
    s = np.array(shares) * beta
    if (beta - s.min()) / (beta - s.max()) < 1.2:
        s[np.argmax(s)] = 0.95 * beta
    # long curves: interpolating an exponential between whole rounds costs a little
    pilots = [Pilot(x, curve(x, beta, 20_000, 2_000 * beta)) for x in s]
    estimate = estimate_convergence(pilots)
    assert estimate.beta == pytest.approx(beta, rel=1e-3)
    assert estimate.reliable
    assert estimate.residual < 1e-3


def test_two_pilots_follow_the_formula():
    pilots = [Pilot(0.2, [4.0, 3.0, 2.0, 1.0]), Pilot(0.8, [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0])]
    estimate = estimate_convergence(pilots, n_targets=3)
    np.testing.assert_allclose(estimate.targets, [3, 2, 1])
    np.testing.assert_allclose(estimate.rounds, [[1, 2], [2, 4], [3, 6]])
    # β = (1·0.2 − 2·0.8)/(1 − 2) = 1.4, α = R1 (β − s1) = 1.2, 2.4, 3.6
    np.testing.assert_allclose(estimate.betas, 1.4)
    np.testing.assert_allclose(estimate.alphas, [1.2, 2.4, 3.6])
    assert (estimate.alpha, estimate.beta) == (pytest.approx(2.4), pytest.approx(1.4))
    assert estimate.spread == pytest.approx(0)
    assert estimate.residual == pytest.approx(0, abs=1e-12)
    assert "R = 2.4 / (1.4 - s), reliable" in estimate.summary()
    assert len(estimate.summary().splitlines()) == 5
    halfway = estimate_convergence(pilots, n_targets=2)
    np.testing.assert_allclose(halfway.rounds, [[1.5, 3], [3, 6]])


def test_noisy_curves():
    rng = np.random.default_rng(0)
    betas = []
    for _ in range(50):
        pilots = [Pilot(s, curve(s, 1.0, 60) * np.exp(rng.normal(0, 0.05, 60))) for s in (0.1, 0.6)]
        estimate = estimate_convergence(pilots)
        betas.append(estimate.beta)
    assert np.median(betas) == pytest.approx(1.0, rel=0.1)


def test_jumping_loss_is_read_by_its_running_minimum():
    smooth = Pilot(0.8, [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0])
    jumping = Pilot(0.2, [4.0, 3.0, 9.0, 2.0, 7.0, 1.0])
    rounds = estimate_convergence([jumping, smooth], n_targets=3).rounds
    assert rounds[0].tolist() == [1, 2]
    # at round 2 the best loss is still 3, at round 3 it is 2
    assert rounds[1].tolist() == [3, 4]


@pytest.mark.parametrize("losses", [[4.0, 3.0, 2.0, 1.0], [4.0, 2.0, 1.0], [4.0, 2.96, 1.97, 1.0]])
def test_pilots_that_cannot_be_told_apart(losses):
    """The noisier pilot needs as many rounds, or fewer."""
    estimate = estimate_convergence([Pilot(0.2, [4.0, 3.0, 2.0, 1.0]), Pilot(0.5, losses)])
    assert not estimate.reliable
    assert "do not grow with their variance" in estimate.reason
    assert "NOT reliable" in estimate.summary()
    # a fallback that hides just 5 %: R2/R1 = (β − s1)/(β − s2)
    assert (estimate.beta - 0.2) / (estimate.beta - 0.5) == pytest.approx(1.05)
    assert estimate.alpha > 0


def test_disagreeing_losses_are_reported():
    # at first the sampling hardly matters, then it matters a lot
    fast = np.linspace(4, 1, 31)
    slow = np.concatenate([np.linspace(4, 2.5, 17), np.linspace(2.5, 1, 400)[1:]])
    estimate = estimate_convergence([Pilot(0.2, fast), Pilot(0.5, slow)])
    assert not estimate.reliable
    assert "disagree" in estimate.reason


@pytest.mark.parametrize(
    ("pilots", "message"),
    [
        ([Pilot(0.1, [2, 1])], "two pilots or more"),
        ([Pilot(0.1, [2, 1]), Pilot(0.1, [2, 1])], "must differ in their variance"),
        ([Pilot(0.1, [2, 1]), Pilot(-0.1, [2, 1])], "variance of pilot 1"),
        ([Pilot(0.1, [2, np.nan]), Pilot(0.2, [2, 1])], "losses of pilot 0 must be finite"),
        ([Pilot(0.1, [2]), Pilot(0.2, [2, 1])], "losses of pilot 0 .* at least two"),
        ([Pilot(0.1, [9, 5]), Pilot(0.2, [4, 1])], "no loss in common"),
    ],
)
def test_errors(pilots, message):
    with pytest.raises(ValueError, match=message):
        estimate_convergence(pilots)
    with pytest.raises(ValueError, match="n_targets"):
        estimate_convergence([Pilot(0.1, [2, 1]), Pilot(0.2, [2, 1])], n_targets=0)
