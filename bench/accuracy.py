"""Nothing is timed before its values are right: expected values, derived bounds, and what is wrong in words.

Bounds are relative, to the largest and to the root of the mean square of the expected values alike:
machine epsilon × √(length of the reduction) × the amplification of the algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
# Interpolation points of the largest Winograd tile in use, F(6×6, 3×3), beside the one at infinity.
WINOGRAD_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)


@dataclass(frozen=True)
class Expected:
    """What a contender must return: a float64 tensor and how far float32 may be from it.

    Behind a kink (see `behind_kinks`) a single value may be quite another one: there only the RMS counts.
    """

    value: Tensor
    bound: float
    rms_only: bool = False


def winograd_amplification(points: tuple[float, ...] = WINOGRAD_POINTS, taps: int = 3) -> float:
    """How much larger the rounding of F(m×m, k×k) is than that of direct convolution, for random values.

    y = Aᵀ[(G·w) ⊙ (Bᵀ·x)] in one dimension, so with independent values of variance 1 the products at point ξ have
    the size ‖G_ξ‖·‖B_ξ‖ and their roundings reach output i with the factor A[i, ξ], where the output itself has the
    size √k. Squared for two dimensions; the worst output counts.
    """
    p = torch.tensor(points, dtype=torch.float64)
    n_out = len(points) + 2 - taps  # with the point at infinity
    powers = p[:, None] ** torch.arange(max(n_out, taps))
    others = [p[torch.arange(len(p)) != j] for j in range(len(p))]
    norm_g = [powers[j, :taps].norm() / (p[j] - others[j]).prod().abs() for j in range(len(p))] + [
        p.new_tensor(1)
    ]
    norm_b = [_coefficients(roots).norm() for roots in [*others, p]]
    at = torch.cat([powers[:, :n_out].T, torch.eye(n_out, dtype=torch.float64)[:, -1:]], dim=1)
    size = torch.stack(norm_g) * torch.stack(norm_b)
    return float(((at * size).norm(dim=1) / math.sqrt(taps)).max()) ** 2


def _coefficients(roots: Tensor) -> Tensor:
    """Of the polynomial ∏ (x − r)."""
    c = roots.new_ones(1)
    for r in roots:
        c = torch.cat([c, c.new_zeros(1)]) - r * torch.cat([c.new_zeros(1), c])
    return c


def convolution_bound(length: int, n_layers: int = 1) -> float:
    """Of a 3×3 convolution, or of its gradient, whose sums have `length` terms.

    After `n_layers` of them, one behind the other, independent roundings of the same size have added up.
    """
    return EPS * math.sqrt(length * n_layers) * winograd_amplification()


def behind_kinks(value: Tensor, bound: float, n_kinks: int) -> Expected:
    """A gradient through rectifiers and poolings whose activations have an error of `bound`.

    Of normal values with a relative error δ, a share of δ/π lies on the other side of a kink (the density at zero,
    times the error's mean of one sign). Their gradients are others altogether: the RMS is off by √(δ/π) a kink.
    """
    return Expected(value, bound + math.sqrt(n_kinks * bound / math.pi), rms_only=True)


def mismatch(actual: Mapping[str, Tensor], expected: Mapping[str, Expected]) -> str:
    """What is wrong with the values, or an empty string."""
    wrong = []
    for name, e in expected.items():
        if name not in actual:
            wrong.append(f"{name} is missing")
        elif actual[name].shape != e.value.shape:
            wrong.append(f"{name} has shape {tuple(actual[name].shape)}, expected {tuple(e.value.shape)}")
        else:
            difference = actual[name].detach().double() - e.value
            largest = float(difference.abs().max() / e.value.abs().max())
            rms = float(difference.norm() / e.value.norm())
            # Written so that NaN is wrong.
            if not (rms <= e.bound and (e.rms_only or largest <= e.bound)):
                wrong.append(f"{name} is off by {largest:.1e} (RMS {rms:.1e}), bound {e.bound:.1e}")
    return "; ".join(wrong)
