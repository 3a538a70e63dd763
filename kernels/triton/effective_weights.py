"""The refresh on a GPU: (γ/σ)·Φ_S1·W and the folded shift of every layer in one launch, in both layouts.

    forward [O, k, k, I']       W_eff[o, i, u, v] = (W·Φ_S1)[o, i, u, v]·γ[o]/σ[o], σ = √(var + eps), zeros from I to I'
    rotated [I, k, k, O]        W_eff[o, i, k−1−u, k−1−v], what the input gradient convolves with
    shift [O] in fp32           (b + Φ_S2 − mean)·γ/σ + β

All layers lie one behind the other in flat buffers: the frozen weights in the forward layout, packed once, and
everything that a meta-step moves, gathered by one `torch.cat`. A program is a tile of one layer; it reads where its
layer lies from a row of a table that depends on shapes only. No address is stored, so a launch can be captured in a
graph, and be executed wherever its tensors are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import ChannelNorm, ConvOperands, FrozenFilters, granularity
from .encoder_layers import DTYPES, WIDTHS
from .launch import Launch, Work, n_bytes, observed
from .ss_conv_epilogue import padded


@triton.jit
def load_vector(p_values, p_at, o_o, m_o, neutral):
    """Channels [BLOCK_O, 1] of the vector that lies where the table says, and whether it is there, not at −1."""
    at = tl.load(p_at)
    return tl.load(p_values + at + o_o, mask=m_o & (at >= 0), other=neutral), at >= 0


@triton.jit
def effective_weights_kernel(
    p_table,
    p_eps,
    p_frozen,
    p_values,
    p_forward,
    p_rotated,
    p_shift,
    N_FIELDS: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One tile [BLOCK_O, BLOCK_I] of one layer, all its taps; `Row` names the fields of the table."""
    p_row = p_table + tl.program_id(0).to(tl.int64) * N_FIELDS
    # Inside a layer 32 bits are enough. Said, what the table holds makes accesses of several elements.
    o_o = (tl.load(p_row).to(tl.int32) + tl.arange(0, BLOCK_O))[:, None]
    o_i = (tl.load(p_row + 1).to(tl.int32) + tl.arange(0, BLOCK_I))[None, :]
    n_out = tl.multiple_of(tl.load(p_row + 2).to(tl.int32), GRAIN)
    n_in = tl.load(p_row + 3).to(tl.int32)
    n_padded = tl.multiple_of(tl.load(p_row + 4).to(tl.int32), 4)
    n_taps = tl.load(p_row + 5).to(tl.int32)
    at_weight = tl.multiple_of(tl.load(p_row + 6), 16)
    at_rotated = tl.multiple_of(tl.load(p_row + 7), 16)
    at_shift, at_scale = tl.load(p_row + 8), tl.load(p_row + 9)
    scale_o, scale_i = tl.load(p_row + 10).to(tl.int32), tl.load(p_row + 11).to(tl.int32)
    m_o, m_i = o_o < n_out, o_i < n_in
    b_var, m_var = load_vector(p_values, p_row + 15, o_o, m_o, 1.0)
    b_gamma, _ = load_vector(p_values, p_row + 16, o_o, m_o, 1.0)
    b_ratio = tl.where(m_var, b_gamma * tl.rsqrt(b_var + tl.load(p_eps + tl.program_id(0))), 1.0)
    m_scale = m_o & m_i & (at_scale >= 0)
    b_scale = tl.load(p_values + at_scale + (o_o * scale_o + o_i * scale_i), mask=m_scale, other=1.0)
    for tap in range(n_taps):
        o_w = (o_o * n_taps + tap) * n_padded + o_i
        m_w = m_o & (o_i < n_padded)
        b_w = tl.load(p_frozen + at_weight + o_w, mask=m_w, other=0.0) * b_scale * b_ratio
        b_w = b_w.to(p_forward.dtype.element_ty)
        tl.store(p_forward + at_weight + o_w, b_w, mask=m_w)
        o_r = (o_i * n_taps + n_taps - 1 - tap) * n_out + o_o
        tl.store(p_rotated + at_rotated + o_r, b_w, mask=m_o & m_i)
    b_bias, _ = load_vector(p_values, p_row + 12, o_o, m_o, 0.0)
    b_own_shift, _ = load_vector(p_values, p_row + 13, o_o, m_o, 0.0)
    b_mean, _ = load_vector(p_values, p_row + 14, o_o, m_o, 0.0)
    b_beta, _ = load_vector(p_values, p_row + 17, o_o, m_o, 0.0)
    b_shift = (b_bias + b_own_shift - b_mean) * b_ratio + b_beta
    # Every tile of the same channels computes it; the first one stores it.
    tl.store(p_shift + at_shift + o_o, b_shift, mask=m_o & (tl.load(p_row + 1) == 0))


@dataclass(frozen=True)
class Configuration:
    """How the layers are cut into programs."""

    # Tiles that are as wide both ways: one layout is stored along its rows, the other along its columns.
    # Of 64×64 each value's place in two layouts would not fit the registers.
    block_o: int = 32
    block_i: int = 32
    num_warps: int = 4
    # The loop over taps is bound by memory and has other programs to wait with.
    num_stages: int = 1


CONFIGURATION = Configuration()
ALIGNMENT = 16  # of a layer in a flat buffer, in elements


class Shape(NamedTuple):
    """All that the table is made from: whole numbers, so that an operator can take them.

    Attributes:
        n_out, n_in, side: of the weight.
        scale: scalars a filter, 0 without a scale, 1 (`filter`) or I (`kernel`).
        bias, shift, folded, gamma, beta: 1 if there; `folded` is mean and variance.
    """

    n_out: int
    n_in: int
    side: int
    scale: int
    bias: int
    shift: int
    folded: int
    gamma: int
    beta: int

    @classmethod
    def each(cls, numbers: Sequence[int]) -> tuple[Shape, ...]:
        """Of all layers' numbers in a row."""
        return tuple(
            cls(*numbers[i : i + len(cls._fields)]) for i in range(0, len(numbers), len(cls._fields))
        )

    @property
    def n_taps(self) -> int:
        """Of a kernel."""
        return self.side * self.side

    @property
    def n_forward(self) -> int:
        """Elements in the forward layout, up to the next layer."""
        return aligned(self.n_out * self.n_taps * padded(self.n_in))

    @property
    def n_rotated(self) -> int:
        """Elements in the rotated layout, up to the next layer."""
        return aligned(self.n_out * self.n_taps * self.n_in)


def aligned(n: int) -> int:
    """n, up to where the next layer begins."""
    return -(-n // ALIGNMENT) * ALIGNMENT


class Row(NamedTuple):
    """What a program reads of its layer; `at_*` are places in flat buffers, −1 of what is not there."""

    first_o: int
    first_i: int
    n_out: int
    n_in: int
    n_padded: int
    n_taps: int
    at_weight: int
    at_rotated: int
    at_shift: int
    at_scale: int
    scale_o: int
    scale_i: int
    at_bias: int
    at_own_shift: int
    at_mean: int
    at_var: int
    at_gamma: int
    at_beta: int


class Plan(NamedTuple):
    """Of one row of layers: the table int64 [programs, fields], eps fp32 [programs], a divisor of every O."""

    table: Tensor
    eps: Tensor
    grain: int


@lru_cache(maxsize=64)
def plan(shapes: tuple[Shape, ...], eps: tuple[float, ...], device: torch.device) -> Plan:
    """Made once for layers of these shapes; in a captured graph it must have been made before."""
    rows: list[Row] = []
    eps_of_rows: list[float] = []
    at_weight = at_rotated = at_shift = at_value = 0
    for layer, layer_eps in zip(shapes, eps, strict=True):
        lengths = (layer.scale * layer.n_out, *(n * layer.n_out for n in _vectors(layer)))
        *starts, end = accumulate(lengths, initial=at_value)
        places = [start if n else -1 for start, n in zip(starts, lengths, strict=True)]
        at_value = end
        for first_o in range(0, layer.n_out, CONFIGURATION.block_o):
            for first_i in range(0, padded(layer.n_in), CONFIGURATION.block_i):
                rows.append(
                    Row(
                        first_o,
                        first_i,
                        layer.n_out,
                        layer.n_in,
                        padded(layer.n_in),
                        layer.n_taps,
                        at_weight,
                        at_rotated,
                        at_shift,
                        places[0],
                        layer.scale,
                        int(layer.scale > 1 or layer.n_in == 1),
                        *places[1:],
                    )
                )
                eps_of_rows.append(layer_eps)
        at_weight += layer.n_forward
        at_rotated += layer.n_rotated
        at_shift += aligned(layer.n_out)
    return Plan(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(eps_of_rows, dtype=torch.float32, device=device),
        4 if all(layer.n_out % 4 == 0 for layer in shapes) else 1,
    )


def _vectors(layer: Shape) -> tuple[int, ...]:
    """Whether b, Φ_S2, mean, variance, γ and β are there, in their order among the values."""
    return layer.bias, layer.shift, layer.folded, layer.folded, layer.gamma, layer.beta


def shape_of(conv: ConvOperands, *, fold: bool) -> tuple[Shape, float]:
    """A layer's shape and its norm's eps."""
    n_out, n_in, side, _ = conv.filters.weight.shape
    scale = 0
    if conv.scale is not None:
        scale = n_in if granularity(conv.scale, conv.filters.weight) == "kernel" else 1
    norm = conv.norm if fold else None
    there = (conv.filters.bias, conv.shift, norm, norm and norm.weight, norm and norm.bias)
    return Shape(n_out, n_in, side, scale, *(int(t is not None) for t in there)), norm.eps if norm else 0.0


def pack(weight: Tensor) -> Tensor:
    """[O, I, k, k] → its forward layout, flat, in fp32, up to where the next layer begins."""
    n_in = weight.shape[1]
    taps = F.pad(weight.detach().float().permute(0, 2, 3, 1), (0, padded(n_in) - n_in)).flatten()
    return F.pad(taps, (0, aligned(taps.numel()) - taps.numel()))


def frozen_weights(layers: Sequence[ConvOperands]) -> Tensor:
    """All weights packed, in a row; of frozen ones made once for these layers in this order.

    Each layer's `FrozenFilters` keeps the row under its own place in it, and the row serves as long as all of them
    keep the same one: it goes when any of them is made anew.
    """
    filters = [conv.filters for conv in layers]
    starts = list(accumulate((f.weight.numel() for f in filters), initial=0))
    keys = [f"packed for the GPU, {start} of {starts[-1]}" for start in starts[:-1]]
    kept = filters[0].derived.get(keys[0])
    trains = any(f.weight.requires_grad for f in filters)
    alike = all(f.derived.get(key) is kept for f, key in zip(filters, keys, strict=True))
    if kept is not None and alike and not trains:
        return kept
    # What is kept serves gradients later, also when it was first asked for in inference mode.
    with torch.inference_mode(False):
        row = torch.cat([pack(f.weight) for f in filters])
    if not trains and not torch.compiler.is_compiling():
        for f, key in zip(filters, keys, strict=True):
            f.derived[key] = row
    return row


def values_of(layers: Sequence[ConvOperands], *, fold: bool) -> Tensor:
    """fp32: Φ_S1, b, Φ_S2, and mean, variance, γ, β where the norm is folded, of each layer in turn."""
    tensors: list[Tensor | None] = []
    for conv in layers:
        tensors += [conv.scale, conv.filters.bias, conv.shift]
        if fold and conv.norm is not None:
            tensors += [conv.norm.mean, conv.norm.var, conv.norm.weight, conv.norm.bias]
    there = [t.detach().flatten().float() for t in tensors if t is not None]
    return torch.cat(there) if there else layers[0].filters.weight.new_empty(0, dtype=torch.float32)


def empty_buffers(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the forward and rotated weights and of the shifts."""
    forward = torch.empty(sum(s.n_forward for s in shapes), dtype=dtype, device=device)
    rotated = torch.empty(sum(s.n_rotated for s in shapes), dtype=dtype, device=device)
    shift = torch.empty(sum(aligned(s.n_out) for s in shapes), dtype=torch.float32, device=device)
    return forward, rotated, shift


def refresh_all(
    frozen: Tensor, values: Tensor, shapes: Sequence[Shape], eps: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The launch: flat forward and rotated weights of `dtype`, flat shifts; what lies between layers is undefined.

    Args:
        frozen, values: of `frozen_weights` and `values_of`.
        shapes, eps: of each layer, in the same order.
        dtype: float32, float16 or bfloat16.
    """
    made = plan(tuple(shapes), tuple(eps), frozen.device)
    forward, rotated, shift = empty_buffers(shapes, dtype, frozen.device)
    Launch(
        kernel=effective_weights_kernel,
        grid=(len(made.table),),
        arguments={
            "p_table": made.table,
            "p_eps": made.eps,
            "p_frozen": frozen,
            "p_values": values,
            "p_forward": forward,
            "p_rotated": rotated,
            "p_shift": shift,
        },
        constants={
            "N_FIELDS": len(Row._fields),
            "GRAIN": made.grain,
            "BLOCK_O": CONFIGURATION.block_o,
            "BLOCK_I": CONFIGURATION.block_i,
        },
        num_warps=CONFIGURATION.num_warps,
        num_stages=CONFIGURATION.num_stages,
        work=Work(
            flop=2 * frozen.numel(),
            read=n_bytes(made.table, made.eps, frozen, values),
            written=n_bytes(forward, rotated, shift),
        ),
    ).run()
    return forward, rotated, shift


def refresh(
    layers: Sequence[ConvOperands],
    dtype: torch.dtype,
    fold: bool,
    *,
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = refresh_all,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The effective weights of all layers, as the convolution kernels read them; values, no gradient.

    Args:
        layers: one or more, each with square taps and one group.
        dtype: of the weights: float32, float16 or bfloat16.
        fold: take the stored norm in, for layers that have one.
        run: what launches the kernel.

    Returns:
        (forward [O, k, k, I'], rotated [I, k, k, O], shift fp32 [O]) of each layer.
    """
    shapes, eps = zip(*(shape_of(conv, fold=fold) for conv in layers), strict=True)
    forward, rotated, shift = run(frozen_weights(layers), values_of(layers, fold=fold), shapes, eps, dtype)
    sizes = ([s.n_forward for s in shapes], [s.n_rotated for s in shapes], [aligned(s.n_out) for s in shapes])
    parts = (t.split(size) for t, size in zip((forward, rotated, shift), sizes, strict=True))
    return [
        (
            f[: s.n_out * s.n_taps * padded(s.n_in)].view(s.n_out, s.side, s.side, padded(s.n_in)),
            r[: s.n_out * s.n_taps * s.n_in].view(s.n_in, s.side, s.side, s.n_out),
            t[: s.n_out],
        )
        for s, f, r, t in zip(shapes, *parts, strict=True)
    ]


def shipped() -> Iterator[tuple[str, Launch]]:
    """All layers of the shipped encoders, both granularities."""
    for widths in WIDTHS:
        for of_scale in ("kernel", "filter"):
            for name, dtype in DTYPES.items():
                with observed() as launches:
                    refresh(list(_encoder(widths, of_scale)), dtype, fold=True)
                yield f"{'-'.join(map(str, widths))} {of_scale} {name}", launches[0]


def _encoder(widths: Sequence[int], of_scale: str) -> Iterator[ConvOperands]:
    """ResNet-12's layers, in fp32 on the meta device: each block's shortcut, then its three convolutions."""
    for n_block, n_out in zip((3, *widths), widths, strict=False):
        for n_in, side in ((n_block, 1), (n_block, 3), (n_out, 3), (n_out, 3)):
            weight = torch.empty(n_out, n_in, side, side, device="meta")
            vector = weight.new_empty(n_out)
            norm = ChannelNorm(vector, vector, vector, vector)
            if side == 1:
                yield ConvOperands(FrozenFilters(weight, vector), norm=norm)
            else:
                scale = weight.new_empty(n_out, n_in if of_scale == "kernel" else 1, 1, 1)
                yield ConvOperands(FrozenFilters(weight, vector, padding=1), scale, vector, norm)
