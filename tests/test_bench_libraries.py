"""Other libraries: where they are not installed a line says so, where they are they do the same job as ours."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.__main__ import main
from bench.harness import Settings
from bench.libraries import LibraryRow, rows

QUICK = Settings(rounds=2, quick=True)
MODULES = {"learn2learn": "learn2learn", "parallel-metalearn": "metalearn", "easyfsl": "easyfsl"}
ROWS: list[Any] = list(rows(quick=True))


def named(library: str) -> list[LibraryRow]:
    return [row for row in ROWS if row.library == library]


class MAML(nn.Module):
    """The calls of learn2learn's `MAML` that the adapter makes; `fault` multiplies its step size."""

    fault = 1.0

    def __init__(self, module: nn.Module, lr: float, first_order: bool = False) -> None:
        super().__init__()
        self.module, self.lr, self.first_order = module, lr, first_order
        self.weights: dict[str, Tensor] = dict(module.named_parameters())

    def clone(self) -> MAML:
        twin = copy.copy(self)
        twin.weights = dict(self.module.named_parameters())
        return twin

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(self.module, self.weights, (x,))
        return out

    def adapt(self, loss: Tensor) -> None:
        found = torch.autograd.grad(loss, list(self.weights.values()), create_graph=not self.first_order)
        lr = self.lr * self.fault
        self.weights = {name: w - lr * g for (name, w), g in zip(self.weights.items(), found, strict=True)}


class PrototypicalNetworks(nn.Module):
    """The calls of easyfsl's `PrototypicalNetworks` that the adapter makes."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def process_support_set(self, images: Tensor, labels: Tensor) -> None:
        features = self.backbone(images)
        self.prototypes = torch.stack([features[labels == c].mean(dim=0) for c in labels.unique()])

    def forward(self, images: Tensor) -> Tensor:
        return -torch.cdist(self.backbone(images), self.prototypes)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    for part in (name.split(".")[0], name):
        monkeypatch.setitem(sys.modules, part, module)


def test_a_library_that_is_not_there_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["libraries", "--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for library in MODULES:
        assert f"skipped: {library} is not there: " in printed
    assert "×" not in printed


def test_the_jobs_are_those_of_learn2learn_and_easyfsl(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "learn2learn.algorithms", MAML=MAML)
    stand_in(monkeypatch, "easyfsl.methods", PrototypicalNetworks=PrototypicalNetworks)
    for library in ("learn2learn", "easyfsl"):
        for row in named(library):
            (line,) = row.measure(QUICK)
            assert line.values, line
            assert line.against == library


def test_a_library_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "learn2learn.algorithms", MAML=type("Wrong", (MAML,), {"fault": 1.1}))
    for row in named("learn2learn"):
        (line,) = row.measure(QUICK)
        assert line.refused.startswith("learn2learn: ")


@pytest.mark.parametrize("library", MODULES)
def test_the_library_itself(library: str) -> None:
    for row in named(library):
        (line,) = row.measure(QUICK)
        if line.skipped:
            pytest.skip(line.skipped)
        assert line.values, line.refused
