"""What the Triton operators of convolutions share: a layer as they take it, its refresh, its gradients.

What the kernels multiply by comes with the layers, once a meta-step, or is made here: with σ = √(var + eps)

    W_eff = γ/σ ⊙ Φ_S1 ⊙ W        t = (b + Φ_S2 − mean)·γ/σ + β

The operators take Φ_S1 and Φ_S2 too, only to return their gradients. Weight, bias and norm are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.contracts import ChannelNorm, ConvOperands, Epilogue, FrozenFilters
from ..kernels.reference.effective_weights import stored_scale
from ..kernels.triton import takes_tf32
from . import routes
from ._effective_weights_triton import refresh
from ._epilogue_codes import ACTIVATIONS
from ._library import triton_runs
from ._ss_conv_native import geometry, side_padding
from .routes import LayerShape


class Layer(NamedTuple):
    """A convolution as the operators take it, in the order of `LAYER`.

    Attributes:
        weight: W_eff [O, k, k, I'] of the images' dtype, I' the input channels as the kernels pad them.
        rotated: for the input gradient, [I, k, k, O].
        folded: t [O], float32.
        taps: W [O, k, k, I], None unless Φ_S1 takes a gradient.
        var, gamma, eps: of the norm that is folded in; var is None where there is none.
        scale, shift: Φ_S1 and Φ_S2, or None.
        padding: on all sides.
        cudnn: whether its products are cuDNN's: its route, the same on the way back.
    """

    weight: Tensor
    rotated: Tensor
    folded: Tensor
    taps: Tensor | None
    var: Tensor | None
    gamma: Tensor | None
    eps: float
    scale: Tensor | None
    shift: Tensor | None
    padding: int
    cudnn: bool

    @property
    def numbers(self) -> tuple[float, int, bool]:
        """What is no tensor, for `with_tensors`."""
        return self.eps, self.padding, self.cudnn

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Without the numbers, for `with_tensors`."""
        return (*self[:6], self.scale, self.shift)

    @classmethod
    def with_tensors(cls, tensors: Sequence[Tensor | None], eps: float, padding: int, cudnn: bool) -> Layer:
        """The layer of these `tensors` and `numbers`."""
        weight, rotated, folded, taps, var, gamma, scale, shift = tensors
        assert weight is not None and rotated is not None and folded is not None  # noqa: PT018  # one statement narrows all
        return cls(weight, rotated, folded, taps, var, gamma, eps, scale, shift, padding, cudnn)

    @property
    def norm(self) -> ChannelNorm | None:
        """What the gradients of Φ read of the norm."""
        return None if self.var is None else ChannelNorm(None, self.var, self.gamma, None, self.eps)

    @property
    def dtype(self) -> torch.dtype:
        """Of Φ and its gradients."""
        given = [t for t in (self.shift, self.scale) if t is not None]
        return given[0].dtype if given else self.folded.dtype

    @property
    def by_filter(self) -> bool:
        """Whether Φ_S1 is one value a filter."""
        return self.scale is not None and self.scale.shape[1] != self.rotated.shape[0]


LAYER = (
    "Tensor {0}weight, Tensor {0}rotated, Tensor {0}folded, Tensor? {0}taps, Tensor? {0}var, Tensor? {0}gamma, "
    "float {0}eps, Tensor? {0}scale, Tensor? {0}shift, int {0}padding, "
    "bool {0}cudnn"
)
N_LAYER = len(Layer._fields)


def runs(
    convs: Sequence[ConvOperands], x: Tensor | None, epilogue: Epilogue, residual: Tensor | None, fold: bool
) -> tuple[bool, str]:
    """Whether the Triton kernels run these convolutions, and why (not); `x` may be left open."""
    tensors = [t for conv in convs for t in (conv.filters.weight, *vectors(conv).values())]
    can, reason = triton_runs(*(t for t in (x, residual, *tensors) if t is not None))
    if not can:
        return False, reason
    for conv in convs:
        if refusal := geometry(conv.filters, "Triton"):
            return False, refusal
        if conv.norm is not None and not fold:
            return False, "fold=False asks for the bits of a convolution followed by its norm"
        if torch.is_grad_enabled():
            frozen = {"weight": conv.filters.weight, **vectors(conv)}
            for name, tensor in frozen.items():
                if name not in ("scale", "shift") and tensor is not None and tensor.requires_grad:
                    return False, f"{name} requires a gradient; the Triton kernels return those of Φ"
    if epilogue.activation != "none" and epilogue.slope < 0:
        return False, f"slope {epilogue.slope}; the Triton kernel's activation must not fall"
    if x is not None and residual is not None and x.dtype != residual.dtype:
        return False, f"x is {x.dtype}, the residual {residual.dtype}"
    exact = x is not None and x.dtype == torch.float32 and x.device.type == "cuda"
    if exact and not takes_tf32():
        return False, "float32 without TF32 (torch.backends.cudnn.conv.fp32_precision) has no tensor cores"
    return True, reason


def explained(convs: Sequence[ConvOperands], x: Tensor | None) -> str:
    """The route of each layer on a GPU and where it comes from, as `why` tells it; empty where `x` is left open."""
    if x is None or x.device.type != "cuda":
        return ""
    layers_by_route: dict[routes.Choice, list[str]] = {}
    for conv in convs:
        shape = LayerShape.of(x, conv.filters.weight)
        layers_by_route.setdefault(routes.choose(shape, x.device), []).append(str(shape))
    return "; ".join(
        f"route {choice.route} ({choice.reason}) of {' and of '.join(dict.fromkeys(shapes))}"
        for choice, shapes in layers_by_route.items()
    )


def vectors(conv: ConvOperands) -> dict[str, Tensor | None]:
    """The tensors of a convolution beside its weight, by name."""
    norm = conv.norm or ChannelNorm(None, None)
    return {
        "bias": conv.filters.bias,
        "scale": conv.scale,
        "shift": conv.shift,
        "mean": norm.mean,
        "var": norm.var,
        "gamma": norm.weight,
        "beta": norm.bias,
    }


def flat(epilogue: Epilogue) -> tuple[int, float, bool]:
    """An epilogue as operators take it."""
    return ACTIVATIONS.index(epilogue.activation), epilogue.slope, epilogue.pool


def unflat(activation: int, slope: float, pool: bool) -> Epilogue:
    """The other way."""
    return Epilogue(ACTIVATIONS[activation], slope, pool)  # type: ignore[arg-type]  # one of its words


def layers(convs: Sequence[ConvOperands], x: Tensor) -> list[Layer]:
    """The layers as the operators take them, for images of x's dtype and size; norms, where they have one, folded.

    Each layer's route is asked for here, once: autograd runs the way back in a thread that sees nothing forced.
    """
    dtype = x.dtype
    kept = [_kept(conv, dtype) for conv in convs]
    missing = [conv for conv, own in zip(convs, kept, strict=True) if own is None]
    refreshed = iter(refresh(missing, dtype, fold=True) if missing else ())
    made = []
    for conv, own in zip(convs, kept, strict=True):
        weight, rotated, folded = next(refreshed) if own is None else own
        trained = torch.is_grad_enabled() and conv.scale is not None and conv.scale.requires_grad
        norm = conv.norm or ChannelNorm(None, None, eps=0.0)
        made.append(
            Layer(
                weight=weight,
                rotated=rotated,
                folded=folded,
                taps=taps(conv.filters) if trained else None,
                var=norm.var,
                gamma=norm.weight,
                eps=float(norm.eps),
                scale=conv.scale,
                shift=conv.shift,
                padding=side_padding(conv.filters),
                cudnn=_takes_cudnn(*LayerShape.of(x, conv.filters.weight), x.device),
            )
        )
    return made


def _takes_cudnn(
    n_in: int, n_out: int, height: int, width: int, taps: int, dtype: str, device: torch.device
) -> bool:
    """Whether the route is cuDNN; what is compiled keeps the route that it was compiled with."""
    return routes.route(LayerShape(n_in, n_out, height, width, taps, dtype), device) == "cudnn"


# What `torch.compiler.assume_constant_result` does, which would import the compiler with this package.
_takes_cudnn._dynamo_marked_constant = True  # type: ignore[attr-defined]  # no attribute that stubs know


def _kept(conv: ConvOperands, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
    """This meta-step's weights in both layouts and its shift, where they came with the layer for such images."""
    effective = conv.effective
    if effective is None or effective.packed is None or effective.folded != (conv.norm is not None):
        return None
    forward, rotated = effective.packed
    return (forward, rotated, effective.shift) if forward.dtype == dtype else None


def taps(filters: FrozenFilters) -> Tensor:
    """The frozen weight as [O, k, k, I], made once a `FrozenFilters`; what is compiled makes it in its graph."""
    kept = filters.derived
    compiled = torch.compiler.is_compiling()
    if "taps_of_channels" in kept and not compiled:
        return kept["taps_of_channels"]
    with torch.inference_mode(False):
        made = filters.weight.detach().permute(0, 2, 3, 1).contiguous()
    if not compiled:
        kept["taps_of_channels"] = made
    return made


def differentiable(x: Tensor, layer: Layer) -> Tensor:
    """conv(x, W_eff) + t as PyTorch expressions of x, Φ_S1 and Φ_S2, for derivatives of derivatives."""
    ratio = None if layer.norm is None else stored_scale(layer.norm)
    if layer.taps is None:
        weight = layer.weight[..., : x.shape[1]].permute(0, 3, 1, 2)
    else:
        assert layer.scale is not None
        weight = layer.taps.permute(0, 3, 1, 2) * layer.scale
        weight = weight if ratio is None else weight * ratio.view(-1, 1, 1, 1)
    shift = layer.folded
    if layer.shift is not None:
        # Its value is in `folded`; this adds the derivative.
        moved = layer.shift - layer.shift.detach()
        shift = shift + (moved if ratio is None else moved * ratio)
    return F.conv2d(x, weight.to(x.dtype), shift.to(x.dtype), padding=layer.padding)


def output_size(x: Tensor, layer: Layer) -> tuple[int, int]:
    """Height and width before the pooling."""
    side = layer.weight.shape[1]
    height, width = (length + 2 * layer.padding - side + 1 for length in x.shape[2:])
    return height, width


def empty_images(like: Tensor, *shape: Any) -> Tensor:
    """Channels-last images of the dtype and on the device of others."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def unwound(
    grad: Tensor,
    codes: Tensor,
    x: Tensor,
    layer: Layer,
    *,
    epilogue: Epilogue,
    needs_scale: bool,
    output: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of z, of the residual, of Φ_S1 ([O, I] or [O]; None unless needed) and of Φ_S2 [O]."""
    from ..kernels.triton.epilogue_backward import SavedOutput, unwind
    from ..kernels.triton.partial_sums import contracted
    from ..kernels.triton.scale_gradient import filter_products, scale_gradient

    saved = None
    if needs_scale and layer.by_filter:
        assert layer.scale is not None
        saved = SavedOutput(layer.scale, output, residual, layer.folded)
    back = unwind(
        grad,
        codes,
        epilogue=epilogue,
        size=output_size(x, layer),
        norm=layer.norm,
        dtype=layer.dtype,
        saved=saved,
        later=needs_scale and not layer.by_filter,
    )
    scale_grad = back.scale
    if needs_scale:
        assert layer.taps is not None
        operands: dict[str, Any] = {"padding": layer.padding, "norm": layer.norm}
        if back.scale is None or back.lost is None:
            product = contracted if layer.cudnn else scale_gradient
            scale_grad = product(x, back.inner, layer.taps, **operands, dtype=layer.dtype, sums=back.sums)
        else:
            filter_products(x, back.inner, layer.taps, **operands, lost=back.lost, scale_grad=back.scale)
    return back.inner, back.residual, scale_grad, back.shift


def shaped(scale_grad: Tensor | None, layer: Layer) -> Tensor | None:
    """dL/dΦ_S1 in the shape of Φ_S1."""
    return None if scale_grad is None or layer.scale is None else scale_grad.view(layer.scale.shape)


def channels_last(t: Tensor) -> Tensor:
    """Dense channels-last images."""
    return t.contiguous(memory_format=torch.channels_last)
