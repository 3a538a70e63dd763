"""Runs launches whose tensors are the CPU's on a device: the interpreter's tests, as they are, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mtl_fast.kernels.triton.launch import Launch


def run_on(launch: Launch, device: torch.device) -> None:
    """Moves all that the launch's tensors lie in, NaN around them included, runs it there, and moves it back."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage()
        for value in launch.arguments.values()
        if isinstance(value, Tensor)
    }
    moved = {place: storage.to(device=device) for place, storage in storages.items()}

    def there(value: Tensor | float | None) -> Tensor | float | None:
        if not isinstance(value, Tensor):
            return value
        storage = moved[value.untyped_storage().data_ptr()]
        place = value.storage_offset(), value.shape, value.stride()
        return torch.empty(0, dtype=value.dtype, device=device).set_(storage, *place)

    replace(launch, arguments={name: there(value) for name, value in launch.arguments.items()}).start()
    for place, storage in storages.items():
        storage.copy_(moved[place])
