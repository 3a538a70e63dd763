"""The PTX of the convolution's forward kernels and of its input gradient, executed, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.triton import block_end, ss_conv, ss_conv_product
from mtl_fast.kernels.triton.launch import Launch
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import assert_within, images, poisoned
from tests.gpu.execution.cases import (
    TYPES,
    assert_epilogue,
    by_chip,
    by_type,
    convolved,
    precision,
    rounded,
    taken,
)
from tests.gpu.ptx.launcher import emulated

pytestmark = pytest.mark.proof
COMMON = Epilogue("after_residual", 0.1)
# n, n_in, n_out, height, width, k. "Tails" are several programs of pixels and of channels and several steps along
# the channels of the images, with a rest of each.
LAYERS = {
    "first layer": (2, 3, 64, 5, 7, 3),
    "prime": (2, 37, 67, 5, 3, 3),
    "64": (1, 64, 64, 7, 5, 3),
    "160 in two accumulators": (1, 48, 160, 3, 5, 3),
    "1x1": (2, 64, 128, 3, 5, 1),
    "tails of the first layer": (2, 3, 67, 11, 7, 3),
    "tails": (2, 72, 67, 7, 5, 3),
    "tails of 1x1": (2, 136, 67, 7, 5, 1),
    "320 in two programs": (1, 64, 320, 11, 7, 3),
}
# What takes long is executed in fewer types.
KINDS = {"tails": ("bf16", "tf32"), "320": ("bf16",)}
CASES = [(name, kind) for name in LAYERS for kind in KINDS.get(name.split()[0], TYPES)]
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


@by_chip
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_layers(chip: str, kind: str, name: str) -> None:
    (launch,) = check_layer(chip, kind, LAYERS[name])
    if name.startswith("tails"):
        n, n_in, n_out, height, width, _ = LAYERS[name]
        extents = {"BLOCK_M": n * height * width, "BLOCK_N": n_out}
        # The sum of the first layer is one step.
        extents |= {"BLOCK_K": n_in} if "BLOCK_K" in launch.constants else {}
        for block, extent in extents.items():
            assert extent > launch.constants[block]
            assert extent % launch.constants[block]


# (n, n_in, n_out, height, width, k), and rows and columns of the tile that many images of such a layer take.
TILES = {
    "64": ((2, 64, 64, 11, 7, 3), (128, 64, 0)),
    "128": ((2, 64, 128, 11, 7, 3), (128, 128, 0)),
    "160": ((2, 32, 160, 11, 7, 3), (128, 128, 32)),
}


@by_chip
@pytest.mark.parametrize(("layer", "tile"), TILES.values(), ids=TILES)
def test_tiles_of_many_images(
    chip: str, layer: tuple[int, ...], tile: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ss_conv_product, "FEW_PROGRAMS", 1)
    (launch,) = check_layer(chip, "bf16", layer)
    assert launch.grid == (2,)
    assert tuple(launch.constants[f"BLOCK_{name}"] for name in ("M", "N", "N2")) == tile


def check_layer(chip: str, kind: str, layer: tuple[int, ...]) -> list[Launch]:
    """Values and codes of a layer in the common form; its launches."""
    n, n_in, n_out, height, width, k = layer
    random = Random(1)
    x = images(random, n, n_in, height, width, dtype=TYPES[kind])
    weight, shift = filters(random, n_out, n_in, k, k, dtype=TYPES[kind]), random.normal(n_out).float()
    with precision(kind), emulated(chip) as launches:
        got = ss_conv.forward(x, packed(weight), poisoned(shift), epilogue=COMMON, padding=k // 2, save=True)
    z, bound = convolved(x, weight, k // 2, kind)
    assert_epilogue(got, z + shift.double().view(-1, 1, 1), bound, COMMON, None)
    return launches


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
    launches = check_block_end(chip, kind, form, (2, 32, 17, 40, 5, 7), save=save)
    assert len(launches) == (2 if save and EPILOGUES[form].activation == "before_residual" else 1)


@pytest.mark.parametrize(("chip", "form"), [("sm_80", "common pooled"), ("sm_90", "tensorflow pooled")])
def test_the_end_of_a_block_in_two_accumulators(chip: str, form: str) -> None:
    """Two programs of windows, the last with a rest; two steps along both inputs' channels, with rests too."""
    (launch,) = check_block_end(chip, "bf16", form, (2, 40, 72, 160, 7, 11), save=False)
    assert launch.grid == (2,)
    assert (launch.constants["BLOCK_N2"], launch.constants["BLOCK_OTHER"]) == (32, 64)


def check_block_end(chip: str, kind: str, form: str, size: tuple[int, ...], *, save: bool) -> list[Launch]:
    """Values, codes and what is kept for the way back; the launches. Sizes are N, I, J, O, H, W."""
    n, n_in, n_other, n_out, *image = size
    random, epilogue = Random(3), EPILOGUES[form]
    x, block_input = (images(random, n, c, *image, dtype=TYPES[kind]) for c in (n_in, n_other))
    weight = filters(random, n_out, n_in, 3, 3, dtype=TYPES[kind])
    shortcut = filters(random, n_out, n_other, 1, 1, dtype=TYPES[kind])
    shifts = [random.normal(n_out).float() for _ in range(2)]
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
    z, bound = convolved(x, weight, 1, kind)
    r, more = convolved(block_input, shortcut, 0, kind)
    r += shifts[1].double().view(-1, 1, 1)
    if kept is not None:
        assert_within(kept, r, more + rounded(r, kept.dtype), "residual")
        r, more = kept.double(), torch.zeros_like(more)
    assert_epilogue((output, codes), z + shifts[0].double().view(-1, 1, 1), bound + more, epilogue, r)
    return launches


@by_chip
@by_type
@pytest.mark.parametrize("shortcut", [False, True], ids=["alone", "with the shortcut"])
def test_the_input_gradient(chip: str, kind: str, shortcut: bool) -> None:
    check_input_gradient(chip, kind, (2, 21, 32, 19, 5, 3), shortcut=shortcut)


@by_chip
@pytest.mark.parametrize("kind", ["bf16", "tf32"])
def test_tails_of_the_input_gradient(chip: str, kind: str) -> None:
    (launch,) = check_input_gradient(chip, kind, (2, 67, 72, 72, 7, 5), shortcut=True)
    assert launch.grid == (4,)


def check_input_gradient(chip: str, kind: str, size: tuple[int, ...], *, shortcut: bool) -> list[Launch]:
    """The gradient of the images, with that of a shortcut of theirs; the launches. Sizes are N, I, O, J, H, W."""
    n, n_in, n_out, n_other, *image = size
    random = Random(4)
    grad, other = (images(random, n, c, *image, dtype=TYPES[kind]) for c in (n_out, n_other))
    weight = filters(random, n_out, n_in, 3, 3, dtype=TYPES[kind])
    small = filters(random, n_other, n_in, 1, 1, dtype=TYPES[kind])
    # [I, k, k, O], the taps the other way round.
    rotated = [poisoned(w.flip(2, 3).permute(1, 2, 3, 0).contiguous()) for w in (weight, small)]
    with precision(kind), emulated(chip) as launches:
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
    return launches


def test_tf32_differs_from_float32() -> None:
    """What the bounds of TF32 rest on: the product ignores low bits, and more than float32's errors."""
    random = Random(5)
    x, weight = random.images(1, 64, 3, 3).float(), filters(random, 16, 64, 3, 3, dtype=torch.float32)
    (exact, bound), (cut, _) = convolved(x, weight, 1, "fp32"), convolved(x, weight, 1, "tf32")
    assert ((exact - cut).abs() > 10 * bound).float().mean() > 0.5
    assert not torch.equal(taken(x, "tf32"), x.double())
