"""`ss_conv`: a frozen convolution with scaling and shifting, its stored norm and its epilogue."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..kernels.contracts import ConvOperands, Epilogue
from ..kernels.reference import ss_conv as reference
from . import _check, _ss_conv_native, _ss_conv_triton, _ss_layers_triton
from .backend import choose, register

_BACKENDS = {"native": _ss_conv_native, "triton": _ss_conv_triton}


def _runs(
    backend: str,
    conv: ConvOperands | None = None,
    x: Tensor | None = None,
    epilogue: Epilogue | None = None,
    residual: Tensor | None = None,
    fold: bool = True,
    **_: Any,
) -> tuple[bool, str]:
    return _BACKENDS[backend].runs([conv] if conv else [], x, epilogue or Epilogue(), residual, fold)


def _explained(conv: ConvOperands | None = None, x: Tensor | None = None, **_: Any) -> str:
    return _ss_layers_triton.explained([conv] if conv else [], x)


register("ss_conv", "native", partial(_runs, "native"))
register("ss_conv", "triton", partial(_runs, "triton"), _explained)


def ss_conv(
    x: Tensor,
    conv: ConvOperands,
    *,
    epilogue: Epilogue | None = None,
    residual: Tensor | None = None,
    fold: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Scaling and shifting of a frozen convolution (MTL, arXiv 1812.02391, equation 3):

        z = conv(x, W ⊙ Φ_S1) + b + Φ_S2
        y = pool(act(norm(z) + residual))         the order and place of the activation: `Epilogue`

    Φ_S1 is [O, I/g, 1, 1] (`kernel`) or [O, 1, 1, 1] (`filter`). With G = dL/dz and W̃ = W ⊙ Φ_S1:

        dL/dx = conv_transpose(G, W̃)      dL/dΦ_S2[o] = Σ G[:, o]
        dL/dΦ_S1[o, i] = Σ_uv W[o, i, u, v]·dL/dW̃[o, i, u, v]      (`filter`: summed over i too)

    Gradients reach x, Φ_S1, Φ_S2, the residual; weight, bias and the affine of the norm if they require one.

    Args:
        x: [N, I, H, W] floating, channels-last preferred. Half types take weights of a wider dtype: the effective
            weights are computed in theirs and rounded once.
        conv: the layer's tensors; `conv.norm`, if any, uses its stored statistics. `conv.effective` must be
            this layer's `effective_weights`; it serves where no gradient of Φ is asked for.
        epilogue: what follows; by default nothing.
        residual: [N, O, H', W'], added as the epilogue says.
        fold: multiply the norm into the weight (equal to rounding) instead of applying it after (the bits
            of conv2d followed by batch_norm).
        backend: ``auto`` or a backend's name. ``native`` works on tiles of 2 to 6 pixels: an infinite or NaN
            pixel spreads over its tile. ``triton`` takes frozen weights and norms only.

    Returns:
        [N, O, H', W'], halved by pooling; x's dtype.

    Raises:
        ValueError: shapes that do not fit, both named; an unknown activation.
    """
    epilogue = epilogue or Epilogue()
    _check.images_4d("x", x)
    _check.operands("conv", conv)
    _check.channels("x", x.shape, conv)
    _check.stored_norm("conv", conv)
    _check.epilogue(epilogue, _check.output_shape(x.shape, conv.filters), residual)
    choice = choose("ss_conv", backend, x=x, conv=conv, epilogue=epilogue, residual=residual, fold=fold)
    run = _BACKENDS[choice.backend].ss_conv if choice.backend in _BACKENDS else reference.ss_conv
    return run(x, conv, epilogue=epilogue, residual=residual, fold=fold)


def reads_effective_weights(conv: ConvOperands, *, fold: bool = True, backend: str = "auto") -> bool:
    """Whether a meta-step should compute this layer's `EffectiveWeights`; the native kernel scales filters itself.

    Args:
        fold: as of the convolutions to come; False is also that of batch statistics.
    """
    return choose("ss_conv", backend, conv=conv if fold else conv.without_norm()).backend != "native"
