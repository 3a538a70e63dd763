"""`convert`: every convolution of any network frozen under scale and shift; `fold`: the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..kernels.contracts import Granularity
from ..ops.effective_weights import effective_weights
from .scale_shift import ScaleShiftConv2d, scale_shift_parameters

Network = TypeVar("Network", bound=nn.Module)
Memo = dict[int, Any]


def convert(model: nn.Module, granularity: Granularity = "kernel", *, backend: str = "auto") -> nn.Module:
    """A frozen copy of `model` in which every `nn.Conv2d` has a scale Φ_S1 and a shift Φ_S2 that learn.

        conv(x, W) + b   becomes   conv(x, W ⊙ Φ_S1) + b + Φ_S2,   Φ_S1 = 1, Φ_S2 = 0 at the start

    (MTL, arXiv 1812.02391, equation 3.) Any stride, dilation, groups, padding and padding mode. At the start the
    copy computes what the model does in evaluation mode: to the bit on the `torch` backend, to rounding where
    the native one runs.

    Everything else is copied as it is and frozen, other kinds of convolutions (`nn.ConvTranspose2d`, `nn.Conv1d`,
    `nn.Conv3d`) too: Φ alone requires a gradient. What the model shares, a layer used twice or a weight of two
    layers, its copy shares; layers that share a weight have a Φ each. A model that reads a layer's weight instead
    of calling the layer goes around its Φ.

    The copy is in evaluation mode, so that its norms use the statistics of pre-training, as a frozen network
    should. `train()` gives batch statistics and dropout back, as of any network.

    A convolution ``name`` keeps the entries ``name.weight`` and ``name.bias`` in the `state_dict` and gets
    ``name.scale`` ([O, I/groups, 1, 1] or [O, 1, 1, 1]) and ``name.shift`` [O]: what the model had saved loads
    with ``strict=False``.

    Args:
        model: the network; it stays as it is. A single `nn.Conv2d` will do.
        granularity: ``kernel``, one scale a k×k kernel, or ``filter``, one an output channel.
        backend: of the converted convolutions. Function transforms pass through ``torch`` only. For `torch.fx` and
            `torch.jit.trace`, `fold` first.

    Raises:
        ValueError: no `nn.Conv2d`, or one that cannot be converted, named: it is a `ScaleShiftConv2d` already,
            computes by a method of its own, has hooks or a parametrised weight, or has not seen an input yet.
    """
    layers = _layers(model, (nn.Conv2d, ScaleShiftConv2d))
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no nn.Conv2d to convert")
    for name, layer in layers.items():
        if reason := _why_not(layer):
            raise ValueError(f"model: {name} {reason}")

    def converted(conv: nn.Conv2d, memo: Memo) -> nn.Module:
        bias = conv.bias is not None
        # On the meta device initial values cost nothing and draw no random numbers.
        with torch.device("meta"):
            made = ScaleShiftConv2d(
                conv.in_channels, conv.out_channels, _taps(conv), bias=bias, **_geometry(conv)
            )
        made.weight = copy.deepcopy(conv.weight, memo)  # type: ignore[assignment] # a parameter, says _why_not
        made.bias = copy.deepcopy(conv.bias, memo)  # type: ignore[assignment]  # a parameter too
        made.backend = backend
        made.enable_scale_shift(granularity)
        return made

    copied = _copied(model, layers, converted).requires_grad_(False).eval()
    for parameter in scale_shift_parameters(copied):
        parameter.requires_grad_(True)
    return copied


def fold(model: Network) -> Network:
    """A copy of a converted network with plain `nn.Conv2d` in place of its scale-and-shift convolutions.

        weight = W ⊙ Φ_S1,   bias = b + Φ_S2   (none where there is neither)

    The same outputs, to the bit on the `torch` backend; the same mode. No convolution in it requires a gradient.

    Args:
        model: what `convert` made, or a module that holds it, such as a `NetworkEncoder`; it stays as it is.

    Raises:
        ValueError: a convolution with a norm of its own, named: it belongs to an encoder that runs its operands.
            One with hooks or a parametrised weight.
    """
    layers = _layers(model, (ScaleShiftConv2d,))
    for name, layer in layers.items():
        if layer.norm is not None:
            raise ValueError(f"model: {name} has a norm of its own; only what convert made can be folded")
        if _is_altered(layer):
            raise ValueError(f"model: {name} {_ALTERED}")
    return _copied(model, layers, _plain)


def _plain(conv: ScaleShiftConv2d, memo: Memo) -> nn.Module:
    (effective,) = effective_weights([conv.operands()], fold=False)
    n_out, n_in = conv.weight.shape[:2]
    bias = conv.bias is not None or conv.shift is not None
    with torch.device("meta"):
        made = nn.Conv2d(n_in * conv.groups, n_out, _taps(conv), bias=bias, **_geometry(conv))
    made.weight = nn.Parameter(effective.weight.clone(), requires_grad=False)
    made.bias = nn.Parameter(effective.shift.clone(), requires_grad=False) if bias else None
    return made.train(conv.training)


def _taps(conv: nn.Conv2d | ScaleShiftConv2d) -> tuple[int, int]:
    height, width = conv.weight.shape[2:]
    return height, width


def _geometry(conv: nn.Conv2d | ScaleShiftConv2d) -> dict[str, Any]:
    """What both kinds of convolution call by the same names."""
    return {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}


def _layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, Any]:
    """The modules of these kinds by name, each once."""
    return {name or "it": layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def _why_not(layer: nn.Conv2d | ScaleShiftConv2d) -> str | None:
    """Why a convolution cannot be converted, to follow its name."""
    if isinstance(layer, ScaleShiftConv2d):
        return (
            "is a ScaleShiftConv2d already; enable_scale_shift starts it anew, fold takes scale and shift in"
        )
    for name in ("forward", "_conv_forward"):
        if getattr(getattr(layer, name), "__func__", None) is not getattr(nn.Conv2d, name):
            return f"is a {type(layer).__name__} whose {name} is its own; put an nn.Conv2d in its place"
    if is_lazy(layer.weight):
        return "has not seen an input yet; run the model once"
    return _ALTERED if _is_altered(layer) else None


_ALTERED = "has hooks or a parametrised weight (weight or spectral norm, pruning); remove them first"


def _is_altered(layer: nn.Module) -> bool:
    """Whether calling it does more than its class says: what stands in its place would not."""
    hooks = [value for name, value in vars(layer).items() if name.endswith("_hooks") and value]
    computed = [
        name for name in ("weight", "bias") if getattr(layer, name) is not layer._parameters.get(name)
    ]
    return bool(hooks or computed)


def _copied(model: Network, layers: dict[str, Any], made: Callable[[Any, Memo], nn.Module]) -> Network:
    """A deep copy with other layers in place of some: wherever the model refers to one, its copy has the other."""
    memo: Memo = {}
    for layer in layers.values():
        memo[id(layer)] = made(layer, memo)
    copied: Network = copy.deepcopy(model, memo)
    return copied
