"""`LinearHead`: a linear layer with the starts of MTL."""

from __future__ import annotations

import math

import pytest
import torch

from mtl_fast.nn import LinearHead


@pytest.mark.parametrize(("n", "feature_dim", "n_way"), [(1, 1, 1), (7, 13, 5)])
def test_it_is_linear(n: int, feature_dim: int, n_way: int) -> None:
    head, plain = LinearHead(feature_dim, n_way), torch.nn.Linear(feature_dim, n_way)
    with torch.no_grad():
        head.bias.normal_(generator=torch.Generator().manual_seed(0))
    plain.load_state_dict(head.state_dict())
    x = torch.randn(n, feature_dim, generator=torch.Generator().manual_seed(1))
    assert torch.equal(head(x), plain(x))


def test_a_normal_start_is_kaiming_and_repeats_with_its_generator() -> None:
    def make(seed: int) -> LinearHead:
        return LinearHead(500, 40, generator=torch.Generator().manual_seed(seed))

    weight = make(0).weight
    torch.manual_seed(7)
    assert torch.equal(make(0).weight, weight)
    assert not torch.equal(make(1).weight, weight)
    # The standard deviation of 20,000 draws is within 5 of its own.
    assert abs(float(weight.detach().std()) / math.sqrt(2 / 500) - 1) <= 5 / math.sqrt(2 * weight.numel())
    assert torch.equal(make(0).bias, torch.zeros(40))


def test_a_start_at_zero() -> None:
    head = LinearHead(3, 2, init="zeros")
    assert torch.equal(head(torch.ones(4, 3)), torch.zeros(4, 2))
    assert head.weight.requires_grad


def test_an_unknown_start_is_an_error() -> None:
    with pytest.raises(ValueError, match="init: 'ones' is neither normal nor zeros"):
        LinearHead(3, 2, init="ones")
