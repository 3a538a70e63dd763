"""What is free, what an image needs, and how many images that allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtl_fast.engine.memory import bytes_per_image, free_memory, images_in_flight, in_words
from mtl_fast.nn import Conv4
from tests.engine.cases import make_encoder

CPU = torch.device("cpu")


def system(root: Path, available: int | None, limit: str | None = None, used: str = "0") -> Path:
    """A file system whose kernel tells so many kB available, in a control group of that limit."""
    (root / "proc").mkdir()
    (root / "sys/fs/cgroup").mkdir(parents=True)
    line = "" if available is None else f"MemAvailable:   {available} kB\n"
    (root / "proc/meminfo").write_text(f"MemTotal:       99 kB\n{line}SwapFree: 1 kB\n")
    if limit is not None:
        (root / "sys/fs/cgroup/memory.max").write_text(limit + "\n")
        (root / "sys/fs/cgroup/memory.current").write_text(used + "\n")
    return root


@pytest.mark.parametrize(
    ("available", "limit", "used", "free"),
    [
        (10, None, "0", 10240),
        (10, "max", "0", 10240),
        (10, "9000", "2000", 7000),
        (10, "99000", "2000", 10240),
        (10, "2000", "3000", 0),
        (None, "9000", "2000", 7000),
        (None, None, "0", None),
    ],
)
def test_free_memory_is_what_the_kernel_and_the_control_group_leave(
    tmp_path: Path, available: int | None, limit: str | None, used: str, free: int | None
) -> None:
    assert free_memory(CPU, system(tmp_path, available, limit, used)) == free


def test_a_system_that_does_not_tell_has_no_figure(tmp_path: Path) -> None:
    assert free_memory(CPU, tmp_path) is None


@pytest.mark.parametrize(
    ("fitting", "images"), [(1000, 160), (160, 160), (159, 128), (100, 64), (3, 9), (0, 9), (None, 160)]
)
def test_all_images_where_they_fit_else_a_power_of_two(fitting: int | None, images: int) -> None:
    """Half of the memory counts; 9 images cannot be taken apart."""
    free = None if fitting is None else 2 * 50 * fitting + 49
    assert images_in_flight(160, 9, 50, free) == images


def test_an_image_of_a_known_network() -> None:
    """Conv-4 in double precision: what autograd keeps of each layer, on the torch backend."""
    encoder = Conv4(4, image_size=16).double().eval()
    encoder.backend = "torch"
    found = bytes_per_image(encoder, 16, torch.float64)
    # Each layer keeps its input for the weights, the activation's output, and the pooling's indices, of eight bytes too.
    layers = [(3, 16), (4, 8), (4, 4), (4, 2)]
    kept = sum(8 * (n_in * size**2 + 4 * size**2 + 4 * (size // 2) ** 2) for n_in, size in layers)
    transient = 4 * 8 * 4 * 16**2
    assert found == kept + transient


def test_nothing_is_kept_for_a_frozen_encoder_and_less_in_half_precision() -> None:
    frozen, learning = (make_encoder(learn=learn, dtype=torch.float32) for learn in ("head", "kernel"))
    few, many = (bytes_per_image(encoder, 16, torch.float32) for encoder in (frozen, learning))
    assert few < many
    assert few == 4 * 16 * 16 * 4 * 4, "four times the largest maps"
    # Its images and maps are half as large, its weights' operands and places of maxima are not.
    half = bytes_per_image(learning, 16, torch.bfloat16)
    assert many / 2 <= half < many


def test_measuring_leaves_everything_as_it_was() -> None:
    encoder = make_encoder(dtype=torch.float32)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    bytes_per_image(encoder, 16, torch.float32, n_groups=1)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


def test_bytes_in_words() -> None:
    assert [in_words(n) for n in (850 * 2**20, 5.2 * 2**30, 2**19)] == ["850 MiB", "5.2 GiB", "0.5 MiB"]
