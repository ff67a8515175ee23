"""The compact SVD against numpy's dense one in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.lora.lowrank import (
    ProductSum,
    cheaper_dense,
    compact_svd,
    complete,
    dense_svd,
    in_parallel,
)


def factors(m, n, rho, *, seed=0, decay=0.0):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rho, n, generator=g), torch.randn(m, rho, generator=g)
    return A, B * torch.logspace(0, -decay, rho)


def dense(A, B):
    return B.double().numpy() @ A.double().numpy()


def oracle(D, rank):
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], S


def rebuilt(svd):
    return ((svd.U * svd.S) @ svd.Vh).double().numpy()


def relative(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


SHAPES = [(40, 30, 5), (30, 40, 5), (32, 32, 8), (12, 50, 12), (50, 12, 12), (8, 8, 30), (5, 9, 1)]


@pytest.mark.parametrize("form", ["compact", "dense"])
@pytest.mark.parametrize(("m", "n", "rho"), SHAPES)
@pytest.mark.parametrize("decay", [0.0, 3.0, 6.0])
def test_equals_the_dense_svd(form, m, n, rho, decay):
    A, B = factors(m, n, rho, decay=decay)
    D = dense(A, B)
    for rank in {1, min(3, rho), min(m, n, rho)}:
        if form == "dense":
            svd = dense_svd(torch.from_numpy(D), rank)
        else:
            svd = compact_svd(A, B, rank)
        best, S = oracle(D, rank)
        kept = len(svd.S)
        assert kept <= rank
        np.testing.assert_allclose(svd.S.numpy(), S[:kept], rtol=1e-5, atol=1e-6 * S[0])
        assert relative(rebuilt(svd), best) < 2e-6
        error, least = np.linalg.norm(rebuilt(svd) - D), np.linalg.norm(best - D)
        assert error**2 - least**2 < 1e-11 * np.linalg.norm(D) ** 2  # Eckart and Young
        well = int((svd.S / svd.S[0] > 1e-3).sum())
        for Q in (svd.U[:, :well], svd.Vh[:well].T):
            torch.testing.assert_close(Q.T @ Q, torch.eye(well, dtype=Q.dtype), rtol=0, atol=1e-6)


def test_compact_is_as_exact_as_qr_in_float64():
    A, B = factors(300, 200, 60, decay=4)
    D = dense(A, B)
    best, _ = oracle(D, 60)
    assert relative(rebuilt(compact_svd(A, B)), D) < 1e-6
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    P, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    qr32 = ((Qb @ (P * S)) @ (Vh @ Qa.T)).double().numpy()
    assert relative(rebuilt(compact_svd(A, B)), best) <= relative(qr32, best)


def test_the_numerical_rank_is_found():
    A, B = factors(30, 20, 4)
    repeated = compact_svd(torch.cat([A, A, A]), torch.cat([B, 2 * B, -B / 3], dim=1))
    assert len(repeated.S) == 4
    assert relative(rebuilt(repeated), dense(A, B) * (1 + 2 - 1 / 3)) < 1e-6
    assert len(compact_svd(torch.cat([A, A]), torch.cat([B, -B], dim=1)).S) == 0
    assert len(compact_svd(A, torch.zeros_like(B)).S) == 0
    assert len(dense_svd(torch.zeros(4, 3)).S) == 0
    unused = compact_svd(torch.cat([A, 1e6 * A]), torch.cat([B, 0 * B], dim=1))
    assert len(unused.S) == 4


@pytest.mark.parametrize("big", [1e3, 1e6, 1e9])
def test_unbalanced_factors_cost_no_digits(big):
    A, B = factors(40, 30, 6)
    size = torch.tensor([big, 1 / big, 1.0, big, 1.0, 1 / big])
    D = dense(A, B)
    assert relative(rebuilt(compact_svd(A * size[:, None], B / size)), D) < 2e-6


def test_signs_do_not_depend_on_the_route():
    A, B = factors(25, 20, 6)
    routes = [
        compact_svd(A, B),
        compact_svd(-A.flip(0), -B.flip(1)),
        dense_svd(B.double() @ A.double()),
        dense_svd((B.double() @ A.double()), 6),
    ]
    for svd in routes:
        assert bool((svd.U.gather(0, svd.U.abs().argmax(0, keepdim=True)) > 0).all())
        torch.testing.assert_close(svd.U[:, :6], routes[0].U, rtol=0, atol=1e-5)
        torch.testing.assert_close(svd.Vh[:6], routes[0].Vh, rtol=0, atol=1e-5)


def test_energy_keeps_the_fewest_values():
    A, B = factors(40, 30, 12, decay=1)
    squares = np.linalg.svd(dense(A, B), compute_uv=False)[:12] ** 2
    part = np.cumsum(squares) / squares.sum()
    for energy in (0.01, 0.5, 0.9, 0.95, 0.999, 1.0):
        expected = int(np.argmax(part >= energy - 1e-12)) + 1
        assert len(compact_svd(A, B, energy=energy).S) == expected
    assert len(compact_svd(A, B, 2, energy=1.0).S) == 2


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    lossless=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_a_running_sum_is_the_sum(ranks, m, n, lossless, seed):
    total, expected = ProductSum(m, n, lossless=lossless), np.zeros((m, n))
    for k, rank in enumerate(ranks):
        A, B = factors(m, n, rank, seed=seed + k)
        weight = float(k + 1)
        total.add(A, B, weight)
        expected += weight * dense(A, B)
    A, B = total.factors()
    if lossless:
        assert len(A) <= min(m, n)
    scale = sum((k + 1) * np.linalg.norm(dense(*factors(m, n, r, seed=seed + k)))
                for k, r in enumerate(ranks))  # fmt: skip
    assert np.linalg.norm(dense(A, B) - expected) < 2e-6 * scale
    assert np.linalg.norm(rebuilt(total.svd()) - expected) < 2e-6 * scale


def test_weights_may_differ_by_rank_entry():
    A, B = factors(9, 7, 3)
    total = ProductSum(9, 7)
    total.add(A, B, torch.tensor([1.0, 0.0, -2.0]))
    expected = dense(A[:1], B[:, :1]) - 2 * dense(A[2:], B[:, 2:])
    assert relative(rebuilt(total.svd()), expected) < 1e-6


def test_memory_is_bounded_and_nothing_is_aliased():
    total = ProductSum(16, 16)
    A, B = factors(16, 16, 4)
    for _ in range(300):
        total.add(A, B, 1.0)
        A, B = A.add_(0), B.add_(0)
        stacked = 0 if not total._A else total.stacked()[0].shape[0]
        assert stacked < 256
    before = rebuilt(total.svd())
    A.zero_()
    B.zero_()
    np.testing.assert_array_equal(before, rebuilt(total.svd()))
    assert relative(before, 300 * dense(*factors(16, 16, 4))) < 1e-5


def test_the_dense_form_is_chosen_by_cost():
    assert not cheaper_dense(4096, 4096, 248)
    assert not cheaper_dense(768, 768, 248)
    assert cheaper_dense(768, 768, 768)
    assert cheaper_dense(10, 4096, 20)
    assert not cheaper_dense(4096, 4096, 2048)


def test_completed_rows_are_new_directions():
    like = torch.randn(6, 12, generator=torch.Generator().manual_seed(5))
    basis = compact_svd(*factors(9, 12, 3)).Vh.float()
    for start in (basis, basis[:0]):
        for candidates in (like, like[:4], torch.zeros(6, 12), basis.repeat(2, 1)):
            rows = complete(start, candidates, 6)
            assert torch.equal(rows[: len(start)], start)
            new = rows[len(start) :]
            torch.testing.assert_close(new @ new.T, torch.eye(len(new)) / 3, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                new @ start.T, torch.zeros(len(new), len(start)), rtol=0, atol=1e-5
            )
    # a candidate that is orthogonal already keeps its direction
    e = torch.eye(12)
    assert torch.allclose(complete(e[:3], e[:6], 6)[3:], e[3:6] / 3**0.5)
    assert torch.equal(complete(basis, like, 2), basis)  # nothing to add
    assert complete(factors(9, 12, 3)[0], like, 12).shape == (12, 12)


def test_parallel_work_keeps_the_order_and_the_thread_count():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert in_parallel(lambda x: x * x, range(10)) == [x * x for x in range(10)]
            assert in_parallel(lambda x: x, []) == []
            with pytest.raises(ZeroDivisionError):
                in_parallel(lambda x: 1 / x, [1, 0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
