"""The way back through activation and pooling, with its sums, in Triton's interpreter against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mtl_fast.kernels.contracts import ChannelNorm, Epilogue
from mtl_fast.kernels.triton import epilogue_backward
from mtl_fast.kernels.triton.epilogue_backward import SavedOutput, unwind
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import Saved, assert_within, poisoned, root_sum_of_squares

EPS32 = torch.finfo(torch.float32).eps
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
# n, channels, height, width
SIZES = {
    "one": (1, 1, 2, 2),
    "odd": (2, 5, 7, 5),
    "prime": (3, 67, 3, 5),
    "even": (2, 64, 6, 4),
    "row": (2, 17, 2, 9),
}
by_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
EPILOGUES = {
    f"{activation}{' pooled' if pool else ''}": Epilogue(activation, 0.1, pool)  # type: ignore[arg-type]
    for activation in ("none", "before_residual", "after_residual")
    for pool in (False, True)
}
by_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES.keys())


def norm_of(n_channels: int) -> ChannelNorm:
    random = Random(5, torch.float32)
    gamma = poisoned(random.normal(n_channels))
    return ChannelNorm(random.normal(n_channels), poisoned(random.positive(n_channels)), gamma, None)


def ratio(norm: ChannelNorm | None) -> torch.Tensor | float:
    return 1.0 if norm is None else (norm.weight / (norm.var + norm.eps).sqrt()).double()


def run(saved: Saved, norm: ChannelNorm | None, by_output: SavedOutput | None = None) -> Any:
    return unwind(
        saved.grad,
        saved.codes,
        epilogue=saved.epilogue,
        size=saved.size,
        norm=norm,
        dtype=torch.float32,
        saved=by_output,
    )


def copied(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The error of a value that is copied, at most times the slope: its rounding, and one of the slope itself."""
    info = torch.finfo(dtype)
    return info.eps * (expected.abs() + info.smallest_normal)


@DTYPES
@by_size
@by_epilogue
def test_gradients_before_the_epilogue(
    dtype: torch.dtype, size: tuple[int, int, int, int], epilogue: Epilogue
) -> None:
    saved = Saved(size, epilogue, dtype, residual=True)
    norm = norm_of(size[1])
    got = run(saved, norm)
    inner = saved.inner()
    expected = saved.scattered(inner)
    assert got.inner.is_contiguous(memory_format=torch.channels_last)
    assert_within(got.inner, expected, copied(expected, dtype), "G")
    skipped = saved.grad.double() if epilogue.activation == "before_residual" else inner
    expected = saved.scattered(skipped)
    assert_within(got.residual, expected, copied(expected, dtype), "residual")
    n_terms = inner[:, 0].numel() + 8
    bound = EPS32 * n_terms**0.5 * root_sum_of_squares(inner) * abs(ratio(norm))
    assert_within(got.shift, inner.sum(dim=(0, 2, 3)) * ratio(norm), bound, "shift")
    assert got.scale is None


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_any_slope(slope: float) -> None:
    saved = Saved((2, 5, 5, 4), Epilogue("after_residual", slope, pool=True), torch.float32, residual=False)
    expected = saved.scattered(saved.inner())
    assert_within(run(saved, None).inner, expected, copied(expected, torch.float32), "G")


def test_slope_zero_stops_an_infinite_gradient() -> None:
    saved = Saved((2, 5, 4, 4), Epilogue("after_residual", 0.0), torch.float32, residual=False)
    saved.grad.fill_(float("inf"))
    got = run(saved, None).inner
    assert torch.equal(got == 0, (saved.codes & 4) == 0)
    assert torch.equal(got.isinf(), (saved.codes & 4) != 0)


def by_output_case(
    saved: Saved, dtype: torch.dtype, factor: float = 1.0
) -> tuple[SavedOutput, ChannelNorm, torch.Tensor, torch.Tensor]:
    """The kernel's operands; Σ G·(z − t)/Φ_S1 in float64; the size of the errors that y's rounding makes of it."""
    n_channels = saved.z.shape[1]
    random = Random(6, torch.float32)
    scale = random.positive(n_channels, 1, 1, 1) * factor
    scale[::2] *= -1
    shift = random.normal(n_channels)
    given = SavedOutput(poisoned(scale), saved.y, saved.residual, poisoned(shift))
    wide = [t.double().view(1, -1, 1, 1) for t in (scale, shift)]
    inner = saved.inner()
    terms = inner * (saved.at_codes(saved.z) - wide[1]) / wide[0]
    # y was rounded once; undoing the slope enlarges that.
    r = torch.zeros_like(saved.z) if saved.residual is None else saved.residual.double()
    up = torch.where((saved.codes & 4) != 0, 1.0, 1 / saved.epilogue.slope) if saved.epilogue.slope else 1.0
    parts = saved.y.double().abs() * up + saved.at_codes(r).abs() * up + wide[1].abs()
    n_terms = inner[:, 0].numel() + 8
    bound = (torch.finfo(dtype).eps + EPS32 * n_terms**0.5) * root_sum_of_squares(inner * parts / wide[0])
    return given, norm_of(n_channels), terms.sum(dim=(0, 2, 3)), bound


@DTYPES
@by_size
@by_epilogue
def test_the_scale_of_a_filter(
    dtype: torch.dtype, size: tuple[int, int, int, int], epilogue: Epilogue
) -> None:
    for residual in (False, True):
        check_the_scale_of_a_filter(Saved(size, epilogue, dtype, residual=residual, seed=1), dtype)


def check_the_scale_of_a_filter(saved: Saved, dtype: torch.dtype) -> None:
    given, norm, expected, bound = by_output_case(saved, dtype)
    got = run(saved, norm, given)
    assert_within(got.scale, expected, bound, "scale")
    without = run(saved, norm)
    assert torch.equal(got.inner, without.inner)
    assert got.lost.dtype == torch.uint8


@DTYPES
def test_channels_whose_bits_are_lost_are_marked(dtype: torch.dtype) -> None:
    """z − t a hundredth, or exactly nothing, of what it was subtracted from."""
    saved = Saved((2, 4, 6, 6), EPILOGUES["after_residual"], dtype, residual=True)
    given, norm, *_ = by_output_case(saved, dtype)
    small = saved.z * torch.tensor([1.0, 1e-3, 1.0, 0.0]).view(1, -1, 1, 1) + given.shift.view(1, -1, 1, 1)
    whole = small + saved.residual.double()
    y = saved._act(whole).to(dtype).contiguous(memory_format=torch.channels_last)
    saved.codes = (whole > 0).to(torch.uint8) * 4
    got = run(saved, norm, given._replace(output=y))
    assert got.lost.tolist() == [0, 1, 0, 1]
    scale = given.scale.clone()
    scale[2] = 0
    got = run(saved, norm, given._replace(output=y, scale=scale))
    assert got.lost.tolist() == [0, 1, 1, 1]
    assert got.scale[2].isfinite()


def test_an_empty_batch_gives_zero_sums() -> None:
    shape = (0, 5, 4, 4)
    for epilogue in (EPILOGUES["after_residual pooled"], EPILOGUES["none"]):
        saved = Saved((2, *shape[1:]), epilogue, torch.float32, residual=False)
        got = unwind(
            saved.grad[:0], saved.codes[:0], epilogue=epilogue, size=shape[2:], norm=None, dtype=torch.float32
        )
        assert got.inner.shape == shape
        assert torch.equal(got.shift, torch.zeros(5))


def test_more_windows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program then takes several blocks, the last ones past the end."""
    saved = Saved((3, 17, 13, 11), EPILOGUES["before_residual pooled"], torch.float32, residual=True)
    given, norm, expected, bound = by_output_case(saved, torch.float32)
    config = epilogue_backward.unwind_config(17, True)
    for programs in (1, 2, 7):
        few = replace(config, programs=programs, block_m=8)
        monkeypatch.setattr(epilogue_backward, "unwind_config", lambda *_, few=few: few)
        got = run(saved, norm, given)
        inner = saved.scattered(saved.inner())
        assert_within(got.inner, inner, copied(inner, torch.float32), "G")
        assert_within(got.scale, expected, bound, "scale")


def test_planted_residual_not_subtracted() -> None:
    """The check that passes the kernel refuses one that is not told of the residual."""
    saved = Saved(SIZES["odd"], EPILOGUES["after_residual pooled"], torch.float32, residual=True)
    given, norm, expected, bound = by_output_case(saved, torch.float32)
    assert_within(run(saved, norm, given).scale, expected, bound, "scale")
    with pytest.raises(AssertionError, match="scale"):
        assert_within(run(saved, norm, given._replace(residual=None)).scale, expected, bound, "scale")
