"""One seed, and from it one generator for each purpose.

A feature that draws from its own stream can be switched on or off without changing what the others draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SEED = "seed"  # the entry of the state that is no stream


class RandomStreams:
    """Named CPU generators, each seeded from sha256 of ``"<seed>/<name>"``, alike on every machine.

    Numbers are drawn on the CPU and moved, so that one seed gives the same draws on every device.

    Args:
        seed: 0 .. 2**63 - 1.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: {seed} is outside 0..2**63 - 1")
        self._seed = int(seed)
        self._streams: dict[str, torch.Generator] = {}

    @property
    def seed(self) -> int:
        return self._seed

    def stream(self, name: str) -> torch.Generator:
        """The generator called `name`; the same object each time, created on first use."""
        if name == _SEED or not name:
            raise ValueError(f"stream name {name!r} is reserved; use another")
        if name not in self._streams:
            self._streams[name] = self._fresh(name)
        return self._streams[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The seed and the state of each stream used so far, as uint8 tensors."""
        seed = torch.tensor(list(self._seed.to_bytes(8, "little")), dtype=torch.uint8)
        return {_SEED: seed} | {name: stream.get_state() for name, stream in self._streams.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to `state`, seed included; generators handed out before keep working and follow.

        A stream that `state` does not name had not been used when it was taken: it starts anew.

        Raises:
            ValueError: `state` has no seed, or an entry is no generator state; nothing is changed then.
        """
        if _SEED not in state or state[_SEED].dtype != torch.uint8 or state[_SEED].shape != (8,):
            raise ValueError(
                f"random streams: the state has no 'seed' entry of 8 bytes; it has {sorted(state)}"
            )
        restored = RandomStreams(int.from_bytes(bytes(state[_SEED].tolist()), "little"))
        for name in state.keys() - {_SEED}:
            try:
                restored.stream(name).set_state(state[name].cpu())
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"random streams: entry {name!r} is no generator state: {error}") from None
        self._seed = restored._seed
        for name in self._streams.keys() | restored._streams.keys():
            self.stream(name).set_state(restored.stream(name).get_state())

    def _fresh(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
