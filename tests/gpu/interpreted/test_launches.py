"""A meta-training step on the `triton` backend launches at least 20 times less than the plain program; counted."""

from __future__ import annotations

import pytest

from bench.gpu.launches import ours, plain

WIDTHS = (64, 128, 256, 512)
SMALL = (8, 8, 8, 8)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pixels", [84, 32])
def test_a_step_launches_twenty_times_less(pixels: int) -> None:
    count, reference = ours(WIDTHS, pixels), plain(WIDTHS, pixels)
    assert count.kernels, "the step did not run on our kernels"
    assert 20 * count.launches <= reference.launches, f"{count.kernels} {count.operators}"
    assert count.n_bytes < reference.n_bytes
    # The rule leaves blocks of many channels to PyTorch's convolutions, which count as launches of their own.
    assert count.launches > ours(WIDTHS, pixels, route="triton").launches


def test_every_launch_is_of_a_part_of_the_step() -> None:
    count = ours(SMALL, 32)
    assert set(count.parts) == {
        "images",
        "encoder, forward",
        "encoder, backward",
        "base-learner and loss",
        "update",
    }
    assert count.parts.total() == count.launches


def test_a_layer_of_ours_goes_back_in_four_launches() -> None:
    """Through the epilogue, to the images, and to the gradients of scale and shift: a product, and one sum of both."""
    kernels = ours(SMALL, 32, route="triton").kernels
    n_layers, n_passes = 12, 2
    products = kernels["scale_gradient_kernel"] + kernels["image_scale_gradient_kernel"]
    assert products == kernels["unwind_kernel"] == kernels["products_sum_kernel"] == n_layers
    # Shortcuts are a part of their blocks' last convolutions; the first images have no gradient.
    convolutions = kernels["ss_conv_kernel"] + kernels["ss_conv_first_layer_kernel"]
    assert convolutions == n_layers * n_passes + n_layers - 1
    assert not {"sums_kernel", "epilogue_kernel"} & set(kernels)


def test_the_update_takes_as_many_launches_for_any_number_of_parameters() -> None:
    update = ours(SMALL, 32).parts["update"]
    # Of two groups: counters, Adam, counters back; before it what is finite is looked for.
    assert update == 2 * 3 + 10


def test_a_captured_step_is_one_launch_and_the_copies_of_its_tensors() -> None:
    count = ours(SMALL, 32, replayed=True)
    assert dict(count.kernels) == {"CUDA graph": 1}
    assert dict(count.operators) == {"copy_": 5, "clone": 2}
