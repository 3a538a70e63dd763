"""A meta-training step on the `triton` backend launches at least 20 times less than the plain program; counted."""

from __future__ import annotations

import pytest

from bench.gpu.launches import ours, plain

WIDTHS = (64, 128, 256, 512)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pixels", [84, 32])
def test_a_step_launches_twenty_times_less(pixels: int) -> None:
    count, reference = ours(WIDTHS, pixels), plain(WIDTHS, pixels)
    assert count.kernels, "the step did not run on our kernels"
    assert 20 * count.launches <= reference.launches, f"{count.kernels} {count.operators}"
    assert count.n_bytes < reference.n_bytes
