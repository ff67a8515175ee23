from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import functional

from strategies import dropout
from strategies.dropout import QuickDropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_many_are_dropped_and_the_mean_stays(p, dtype):
    x = torch.ones(30, 101, 33, dtype=dtype, requires_grad=True)
    with QuickDropout(1):
        out = functional.dropout(x, p)
    assert out.dtype == dtype
    assert out.shape == x.shape
    dropped = float((out == 0).float().mean())
    assert dropped == pytest.approx(p, abs=0.01)
    kept = out[out != 0].detach().float()
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-2, atol=0)
    assert float(out.detach().float().mean()) == pytest.approx(1, abs=0.05 if p > 0.5 else 0.02)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out)  # the same are dropped on the way back


def test_values_are_dropped_independently():
    with QuickDropout(3):
        out = functional.dropout(torch.ones(400_000), 0.5) / 2
        again = functional.dropout(torch.ones(400_000), 0.5) / 2
    for lag in range(1, 9):  # four values come of one number
        assert float((out[lag:] * out[:-lag]).mean()) == pytest.approx(0.25, abs=0.005)
    assert float((out * again).mean()) == pytest.approx(0.25, abs=0.005)


def test_same_seed_same_numbers_whatever_else_draws():
    def drawn(seed):
        with QuickDropout(seed):
            return functional.dropout(torch.ones(100))

    first = drawn(5)
    torch.manual_seed(0)
    torch.rand(7)
    assert torch.equal(first, drawn(5))
    assert not torch.equal(first, drawn(6))
    before = torch.get_rng_state()
    drawn(5)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_no_dropout_is_left_alone():
    x = torch.arange(5.0)
    with QuickDropout(0):
        assert torch.equal(functional.dropout(x, 0.5, training=False), x)
        assert torch.equal(functional.dropout(x, 0.0), x)
        assert torch.equal(functional.dropout(x, 1.0), torch.zeros(5))
        y = x.clone()
        assert functional.dropout(y, 0.5, inplace=True) is y
        with pytest.raises(ValueError, match="between 0 and 1"):
            functional.dropout(x, 1.5)
        module = torch.nn.Dropout(0.5)
        assert float((module(torch.ones(1000)) == 0).float().mean()) == pytest.approx(0.5, abs=0.1)


def attention_inputs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, 6, 8, generator=generator)
    mask = torch.ones(4, 1, 6, 6, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    return q, k, v, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_is_on_average_that_without_dropout(masked, scale):
    q, k, v, mask = attention_inputs()
    mask = mask if masked else None
    expected = functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    times = 3000
    with QuickDropout(0):
        mean = sum(functional.scaled_dot_product_attention(q, k, v, mask, 0.1, scale=scale)
                   for _ in range(times)) / times  # fmt: skip
    torch.testing.assert_close(mean, expected, atol=0.06, rtol=0)


def test_attention_equals_the_dense_formula():
    """Of one key that is attended to, what is left is the value or nothing."""
    q, k, v, mask = attention_inputs()
    mask[...] = False
    mask[..., 2] = True
    with QuickDropout(0):
        out = functional.scaled_dot_product_attention(q, k, v, mask, 0.25)
    for result in out.flatten(0, 1).flatten(0, 1):
        assert torch.all(result == 0) or torch.any(
            torch.all(torch.isclose(result, v[:, :, 2].reshape(-1, 8) / 0.75), -1)
        )
    assert 0 < float((out == 0).float().mean()) < 0.5


@pytest.mark.parametrize("odd", [{"is_causal": True}, {"attn_mask": torch.zeros(6, 6)}])
def test_attention_of_other_kinds_is_torchs(odd):
    q, k, v, _ = attention_inputs()
    torch.manual_seed(0)
    expected = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2, **odd)
    torch.manual_seed(0)
    with QuickDropout(0):
        assert torch.equal(
            functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2, **odd), expected
        )


@pytest.mark.parametrize("tokens", [6, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_dropout_is_torchs(tokens, dtype, monkeypatch):
    """Of short texts in bfloat16 by another formula: the same but for rounding."""
    used, original = [], dropout.sdpa_kernel
    monkeypatch.setattr(
        dropout, "sdpa_kernel", lambda backend: used.append(backend) or original(backend)
    )
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 2, tokens, 8, generator=generator).to(dtype)
    grads, outputs = [], []
    for mode in (contextlib.nullcontext(), QuickDropout(0)):
        q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
        with mode:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.square().sum().backward()
        outputs.append(out.detach().float())
        grads.append(q.grad.float())
    other = dtype == torch.bfloat16 and tokens == 6
    assert bool(used) == other
    tolerance = {"rtol": 0.05, "atol": 0.05} if other else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(*outputs, **tolerance)
    torch.testing.assert_close(*grads, **tolerance)
