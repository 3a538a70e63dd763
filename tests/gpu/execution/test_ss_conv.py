"""The PTX of the convolution's forward kernels and of its input gradient, executed, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.reference.ss_conv import activate
from mtl_fast.kernels.triton import block_end, ss_conv
from mtl_fast.ops._epilogue_codes import PLACE, POSITIVE
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import assert_within, images, poisoned
from tests.gpu.execution.cases import TYPES, by_chip, by_type, convolved, precision, rounded, taken
from tests.gpu.ptx.launcher import emulated
from tests.native_cases import windows

pytestmark = pytest.mark.proof
COMMON = Epilogue("after_residual", 0.1)
# n, n_in, n_out, height, width, k
LAYERS = {
    "first layer": (2, 3, 64, 5, 7, 3),
    "prime": (2, 37, 67, 5, 3, 3),
    "64": (1, 64, 64, 7, 5, 3),
    "160 in two accumulators": (1, 48, 160, 3, 5, 3),
    "1x1": (2, 64, 128, 3, 5, 1),
}
EPILOGUES = {
    "plain": Epilogue(),
    "common pooled": Epilogue("after_residual", 0.1, pool=True),
    "tensorflow pooled": Epilogue("before_residual", 0.1, pool=True),
}


def packed(weight: Tensor) -> Tensor:
    """[O, I, k, k] → [O, k, k, I], three channels padded to four, poisoned around."""
    taps = weight.permute(0, 2, 3, 1).contiguous()
    return poisoned(F.pad(taps, (0, 1)) if taps.shape[3] == 3 else taps)


def filters(random: Random, *shape: int, dtype: torch.dtype) -> Tensor:
    """Weights [O, I, k, k] that keep the size of values."""
    return (random.normal(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5).to(dtype)


def assert_epilogue(
    got: tuple[Tensor, Tensor | None], z: Tensor, bound: Tensor, epilogue: Epilogue, residual: Tensor | None
) -> None:
    """y and its codes against z in float64, known within a bound; a tie within it may fall either way."""
    output, codes = got
    r = torch.zeros_like(z) if residual is None else residual.double()
    first = activate(z, epilogue.slope) if epilogue.activation == "before_residual" else z
    whole = first + r
    sign = z if epilogue.activation == "before_residual" else whole
    if epilogue.activation == "after_residual":
        whole = activate(whole, epilogue.slope)
    # Activation, addition and the folded shift each round once in float32.
    bound = bound + 4 * torch.finfo(torch.float32).eps * (z.abs() + r.abs())
    if epilogue.pool:
        whole, bound, sign = windows(whole), windows(bound), windows(sign)
        if codes is not None:
            place = (codes & PLACE).long()[..., None]
            chosen, worst = whole.gather(-1, place)[..., 0], bound.amax(-1)
            assert (chosen >= whole.amax(-1) - 2 * worst).all(), "places of the maxima"
            sign = sign.gather(-1, place)[..., 0]
        whole, bound = whole.amax(-1), bound.amax(-1)
    if codes is not None:
        sure = sign.abs() > bound
        assert torch.equal((codes & POSITIVE != 0)[sure], (sign > 0)[sure]), "signs"
    assert_within(output, whole, bound + rounded(whole, output.dtype), "output")


@by_chip
@by_type
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers(chip: str, kind: str, layer: tuple[int, ...]) -> None:
    n, n_in, n_out, height, width, k = layer
    random = Random(1)
    x = images(random, n, n_in, height, width, dtype=TYPES[kind])
    weight, shift = filters(random, n_out, n_in, k, k, dtype=TYPES[kind]), random.normal(n_out).float()
    with precision(kind), emulated(chip) as launches:
        got = ss_conv.forward(x, packed(weight), poisoned(shift), epilogue=COMMON, padding=k // 2, save=True)
    assert len(launches) == 1
    z, bound = convolved(x, weight, k // 2, kind)
    assert_epilogue(got, z + shift.double().view(-1, 1, 1), bound, COMMON, None)


@by_chip
@by_type
@pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES)
def test_epilogues_with_a_residual(chip: str, kind: str, epilogue: Epilogue) -> None:
    random = Random(2)
    x, residual = (images(random, 2, c, 5, 7, dtype=TYPES[kind]) for c in (16, 33))
    weight = filters(random, 33, 16, 3, 3, dtype=TYPES[kind])
    with precision(kind), emulated(chip):
        got = ss_conv.forward(
            x, packed(weight), None, residual=residual, epilogue=epilogue, padding=1, save=True
        )
    assert_epilogue(got, *convolved(x, weight, 1, kind), epilogue, residual)


@by_chip
@by_type
@pytest.mark.parametrize("form", ["common pooled", "tensorflow pooled"])
@pytest.mark.parametrize("save", [False, True], ids=["values alone", "saved"])
def test_the_end_of_a_block(chip: str, kind: str, form: str, save: bool) -> None:
    random, epilogue = Random(3), EPILOGUES[form]
    x, block_input = (images(random, 2, c, 5, 7, dtype=TYPES[kind]) for c in (32, 17))
    weight = filters(random, 40, 32, 3, 3, dtype=TYPES[kind])
    shortcut = filters(random, 40, 17, 1, 1, dtype=TYPES[kind])
    shifts = [random.normal(40).float() for _ in range(2)]
    with precision(kind), emulated(chip) as launches:
        output, codes, kept = block_end.forward(
            x,
            packed(weight),
            poisoned(shifts[0]),
            block_input,
            packed(shortcut),
            poisoned(shifts[1]),
            epilogue=epilogue,
            save=save,
        )
    assert len(launches) == (2 if save and epilogue.activation == "before_residual" else 1)
    z, bound = convolved(x, weight, 1, kind)
    r, more = convolved(block_input, shortcut, 0, kind)
    r += shifts[1].double().view(-1, 1, 1)
    if kept is not None:
        assert_within(kept, r, more + rounded(r, kept.dtype), "residual")
        r, more = kept.double(), torch.zeros_like(more)
    assert_epilogue((output, codes), z + shifts[0].double().view(-1, 1, 1), bound + more, epilogue, r)


@by_chip
@by_type
@pytest.mark.parametrize("shortcut", [False, True], ids=["alone", "with the shortcut"])
def test_the_input_gradient(chip: str, kind: str, shortcut: bool) -> None:
    random = Random(4)
    grad, other = (images(random, 2, c, 5, 3, dtype=TYPES[kind]) for c in (32, 19))
    weight = filters(random, 32, 21, 3, 3, dtype=TYPES[kind])
    small = filters(random, 19, 21, 1, 1, dtype=TYPES[kind])
    # [I, k, k, O], the taps the other way round.
    rotated = [poisoned(w.flip(2, 3).permute(1, 2, 3, 0).contiguous()) for w in (weight, small)]
    with precision(kind), emulated(chip):
        got = ss_conv.input_gradient(
            grad,
            rotated[0],
            padding=1,
            other_grad=other if shortcut else None,
            other_rotated=rotated[1] if shortcut else None,
        )
    expected, bound = convolved(grad, weight.flip(2, 3).transpose(0, 1), 1, kind)
    if shortcut:
        more, more_bound = convolved(other, small.transpose(0, 1), 0, kind)
        expected, bound = expected + more, bound + more_bound
    assert_within(got, expected, bound + rounded(expected, got.dtype), "input gradient")


def test_tf32_differs_from_float32() -> None:
    """What the bounds of TF32 rest on: the product ignores low bits, and more than float32's errors."""
    random = Random(5)
    x, weight = random.images(1, 64, 3, 3).float(), filters(random, 16, 64, 3, 3, dtype=torch.float32)
    (exact, bound), (cut, _) = convolved(x, weight, 1, "fp32"), convolved(x, weight, 1, "tf32")
    assert ((exact - cut).abs() > 10 * bound).float().mean() > 0.5
    assert not torch.equal(taken(x, "tf32"), x.double())
