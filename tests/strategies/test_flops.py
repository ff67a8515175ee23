import pytest
import torch
from torch import nn
from torch.nn import functional

from strategies.wallclock import rank_flops, training_flops


def test_flops_of_a_linear_layer_by_hand():
    layer, x = nn.Linear(7, 5), torch.ones(3, 7)
    product = 2 * 3 * 7 * 5
    assert training_flops(lambda: layer(x)) == product
    # The way back: the gradient of the weight; that of the input only if somebody wants it.
    assert training_flops(lambda: layer(x).sum().backward()) == 2 * product
    x.requires_grad_()
    assert training_flops(lambda: layer(x).sum().backward()) == 3 * product


def test_flops_of_attention_are_counted_on_the_cpu():
    q = torch.ones(1, 2, 16, 8, requires_grad=True)
    product = 2 * 2 * 16 * 16 * 8
    step = lambda: functional.scaled_dot_product_attention(q, q, q).sum().backward()  # noqa: E731
    assert training_flops(step) == 2 * product + 4 * product


def lora_step(rank, batch=3, m=7, n=5):
    base = torch.ones(n, m)
    a, b = torch.ones(rank, m, requires_grad=True), torch.ones(n, rank, requires_grad=True)
    x = torch.ones(batch, m)
    return lambda: (x @ base.T + x @ a.T @ b.T).sum().backward()


def test_lora_costs_a_base_and_a_part_linear_in_the_rank():
    base, per_rank = rank_flops(lora_step, 1, 8)
    assert base == 2 * 3 * 7 * 5
    # Forward A and B; back: dB, d(xA), dA.
    assert per_rank == 2 * 3 * (7 + 5 + 5 + 5 + 7)
    assert training_flops(lora_step(4)) == base + 4 * per_rank


def test_flops_errors():
    with pytest.raises(ValueError, match="got none that PyTorch counts"):
        training_flops(lambda: torch.ones(3) + 1)
    with pytest.raises(ValueError, match="1 ≤ low < high, got 4 and 4"):
        rank_flops(lora_step, 4, 4)
    with pytest.raises(ValueError, match="grows linearly"):
        rank_flops(lambda rank: lora_step(20 - rank))
