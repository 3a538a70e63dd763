"""What follows a convolution that another library computed: shift, residual, activation, pooling and codes, in one pass.

y = pool(act(z + t + residual))        order and place of the activation: `Epilogue`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import Epilogue
from .encoder_layers import DTYPES, encoder_layers
from .launch import Launch, Work, n_bytes, observed
from .ss_conv_epilogue import coded, dense, finish, images, locate, output_sizes, placed, shifted


# One compilation serves every size of batch and map.
@triton.jit(do_not_specialize=["n_rows", "height", "width"])
def epilogue_kernel(
    p_z,
    p_shift,
    p_residual,
    p_out,
    p_codes,
    n_rows,
    height,
    width,
    N_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_m = tl.program_id(0)
    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # A pixel reads itself only: the one tap of a 1×1 convolution.
    o_pixel, _, m_row = locate(o_m, n_rows, height, width, height, width, PADDING=0, SIDE=1, POOL=POOL)
    p_b_z = p_z + o_pixel[:, None] * N_OUT + o_n[None, :]
    b_z = tl.load(p_b_z, mask=(m_row != 0)[:, None] & (o_n < N_OUT)[None, :], other=0.0).to(tl.float32)
    b_z, _ = shifted(b_z, None, o_n, None, p_shift, N_OUT=N_OUT)
    finish(
        b_z, pid_m, o_n, o_pixel, n_rows, p_residual, p_out, p_codes,
        N_OUT=N_OUT, ACTIVATION=ACTIVATION, SLOPE=SLOPE, POOL=POOL, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip


@dataclass(frozen=True)
class EpilogueConfig:
    """How the pass over the images is cut up; it is bound by memory.

    Attributes:
        block_m: rows a block, four a window with pooling: with `block_n` channels 16 values a thread.
        block_n: channels a block: 128 bytes of a half type in a row, a whole line.
        num_warps: more would leave a thread less than one load of 16 bytes.
    """

    block_m: int
    block_n: int
    num_warps: int = 4


def epilogue_config(n_channels: int) -> EpilogueConfig:
    """The configuration for images of so many channels."""
    block_n = min(64, max(16, triton.next_power_of_2(n_channels)))
    return EpilogueConfig(block_m=2048 // block_n, block_n=block_n)


def finished(
    z: Tensor, shift: Tensor, *, residual: Tensor | None = None, epilogue: Epilogue, save: bool
) -> tuple[Tensor, Tensor | None]:
    """This module's equation in one launch.

    Args:
        z: [N, O, H, W] float32, float16 or bfloat16, channels-last preferred.
        shift: t, fp32 [O].
        residual: [N, O, H, W] of z's dtype, or None.
        epilogue: what follows.
        save: return the codes that the way back reads.

    Returns:
        (y [N, O, H', W'] channels-last of z's dtype, codes as `ss_conv.forward` returns them).
    """
    z, n_out = dense(z), z.shape[1]
    height, width, final_height, final_width, n_rows = output_sizes(z, 1, 0, epilogue)
    output = images(z, n_out, final_height, final_width)
    codes = images(z, n_out, final_height, final_width, torch.uint8) if coded(epilogue, save=save) else None
    if not output.numel():
        return output, codes
    residual = None if residual is None else dense(residual)
    config = epilogue_config(n_out)
    # What pooling drops is not read.
    read = n_rows * n_out * z.element_size()
    Launch(
        kernel=epilogue_kernel,
        grid=(triton.cdiv(n_rows, config.block_m), triton.cdiv(n_out, config.block_n)),
        arguments={
            "p_z": z,
            "p_shift": shift,
            "p_residual": residual,
            "p_out": output,
            "p_codes": codes,
            "n_rows": n_rows,
            "height": height,
            "width": width,
        },
        constants={
            "N_OUT": n_out,
            "ACTIVATION": placed(epilogue, alone=residual is None),
            "SLOPE": epilogue.slope,
            "POOL": epilogue.pool,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        num_warps=config.num_warps,
        num_stages=1,
        work=Work(
            flop=3 * n_rows * n_out,
            read=read * (1 if residual is None else 2) + n_bytes(shift),
            written=n_bytes(output, codes),
        ),
    ).run()
    return output, codes


def shipped() -> Iterator[tuple[str, Launch]]:
    """What follows every convolution of the shipped encoders, in both forms, with and without codes."""
    for layer in encoder_layers():
        for name, dtype in DTYPES.items():
            z, shift = layer.images(layer.n_out, dtype), torch.empty(layer.n_out, device="meta")
            if layer.n_taps == 1:
                with observed() as launches:
                    finished(z, shift, epilogue=Epilogue(), save=False)
                yield f"{launches[0].name}/{layer.name} {name}", launches[0]
                continue
            residual = torch.empty_like(z) if layer.last else None
            for form in ("after_residual", "before_residual"):
                for use, save in (("training", True), ("evaluation", False)):
                    after = Epilogue(form, 0.1, pool=layer.last)
                    with observed() as launches:
                        finished(z, shift, residual=residual, epilogue=after, save=save)
                    end = " pooled" if layer.last else ""
                    yield f"{launches[0].name}/{layer.name} {form}{end} {use} {name}", launches[0]
