"""`mtl-fast tune`: one line without a GPU; with one, what is measured, printed and stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtl_fast import tune as tuning
from mtl_fast.cli import main
from mtl_fast.errors import InputError
from mtl_fast.ops import routes
from mtl_fast.ops.routes import LayerShape, Route


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mtl-fast: error: an NVIDIA GPU is needed, and torch finds none (")
    assert err.count("\n") == 1


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU by name only; the kernel is faster with 64 channels, cuDNN with more."""

    def seconds(layer: LayerShape, name: Route, n_images: int, _: torch.device) -> float:
        assert n_images == 160
        return {"triton": layer.n_out / 64, "cudnn": 1.5}[name] * 1e-6

    monkeypatch.setenv(routes.ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some card")
    monkeypatch.setattr(tuning, "seconds_of", seconds)
    return tmp_path


def test_the_table_is_printed_and_stored(card: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--widths", "64", "128", "--image-sizes", "84"]) == 0
    head, _, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["layer", "triton,", "µs", "cudnn,", "µs", "takes"]
    assert lines[0].split() == ["3→64@84×84,", "3×3,", "bfloat16", "1", "2", "triton"]
    assert [line.split()[-1] for line in lines] == ["triton"] * 3 + ["cudnn"] * 3
    assert last == f"routes: {routes.table_file(torch.device('cuda'))}"
    stored = routes.table(torch.device("cuda"))
    assert stored[LayerShape(128, 128, 42, 42, 3, "bfloat16")] == "cudnn"
    assert stored[LayerShape(64, 128, 42, 42, 1, "bfloat16")] == "cudnn"
    assert len(stored) == 6


def test_a_device_that_is_not_there_is_one_line(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such(_: torch.device) -> str:
        raise AssertionError("Invalid device id\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_name", no_such)
    with pytest.raises(InputError, match=r"^device 'cuda:7': Invalid device id$"):
        tuning.require_gpu("cuda:7")


def test_without_triton_there_is_one_line(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.kernels, "load", lambda: (False, "Triton is not installed"))
    with pytest.raises(InputError, match=r"^Triton is not installed$"):
        tuning.require_gpu("cuda")


def test_layers_are_those_of_the_network_each_once() -> None:
    layers = list(tuning.layers_of((64, 64), (8,), ("fp32",)))
    sides = [(layer.n_in, layer.n_out, layer.height, layer.taps) for layer in layers]
    assert sides == [(3, 64, 8, 3), (64, 64, 8, 3), (3, 64, 8, 1), (64, 64, 4, 3), (64, 64, 4, 1)]
    assert {layer.dtype for layer in layers} == {"float32"}


def test_what_is_measured_is_a_whole_training_step() -> None:
    layer = LayerShape(3, 5, 6, 4, 3, "float32")
    step = tuning.training_step(layer, 2, torch.device("cpu"), backend="torch")
    x, scale, shift = step()
    assert (x.shape, scale.shape, shift.shape) == ((2, 3, 6, 4), (5, 3, 1, 1), (5,))
