"""Routes: the rule, the stored table of this card and versions, and that a damaged one is said and not used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mtl_fast.ops import routes
from mtl_fast.ops.routes import LayerShape
from tests.conv_cases import convolutions_take

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def layer(n_out: int = 64, dtype: str = "bfloat16") -> LayerShape:
    return LayerShape(64, n_out, 84, 84, 3, dtype)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU by name only, and a folder of tables of its own."""
    monkeypatch.setenv(routes.ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB (test)")
    routes._read.cache_clear()
    return tmp_path


def test_by_default_few_channels_take_the_kernel_and_many_take_cudnn() -> None:
    taken = [routes.route(layer(n), CUDA) for n in (64, 128, 160, 256, 320, 512, 640)]
    assert taken == ["triton"] * 3 + ["cudnn"] * 4


def test_exact_float32_takes_cudnn() -> None:
    with convolutions_take("tf32"):
        assert routes.route(layer(dtype="float32"), CUDA) == "triton"
    with convolutions_take("ieee"):
        # That of recurrent layers is another switch: with the two apart, the old way of asking raises.
        with pytest.raises(RuntimeError, match="allow_tf32"):
            _ = torch.backends.cudnn.allow_tf32
        taken = routes.choose(layer(dtype="float32"), CUDA)
        assert taken == ("cudnn", "by default: float32 without TF32 has no tensor cores to feed")
        assert routes.route(layer(dtype="float16"), CUDA) == "triton"


def test_interpreted_kernels_are_taken_for_every_layer() -> None:
    assert routes.route(layer(640), CPU) == "triton"


def test_a_route_can_be_forced() -> None:
    with routes.forced("cudnn"):
        assert routes.choose(layer(), CUDA) == ("cudnn", "forced")
    assert routes.route(layer(), CUDA) == "triton"


def test_the_faster_one_is_stored_and_read(card: Path) -> None:
    path = routes.store(
        CUDA, {layer(64): {"triton": 2.0, "cudnn": 1.0}, layer(512): {"triton": 1.0, "cudnn": 2.0}}
    )
    assert path.parent == card
    assert path.name.startswith("nvidia-h100-80gb-test-")
    assert list(card.iterdir()) == [path], "nothing half written is left"
    assert (routes.route(layer(64), CUDA), routes.route(layer(512), CUDA)) == ("cudnn", "triton")
    # What was not measured follows the rule.
    assert routes.choose(layer(64), CUDA).reason == "measured by mtl-fast tune"
    assert routes.choose(layer(128), CUDA) == ("triton", "by default: at most 160 channels")
    assert json.loads(path.read_text())["layers"][0]["seconds"] == {"triton": 2.0, "cudnn": 1.0}


def test_another_measurement_replaces_its_layers_and_keeps_the_others(card: Path) -> None:
    routes.store(CUDA, {layer(64): {"triton": 2.0, "cudnn": 1.0}, layer(128): {"triton": 2.0, "cudnn": 1.0}})
    routes.store(CUDA, {layer(64): {"triton": 1.0, "cudnn": 2.0}})
    assert routes.table(CUDA) == {layer(64): "triton", layer(128): "cudnn"}


def test_a_table_is_that_of_a_card_and_versions(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = routes.store(CUDA, {layer(): {"triton": 2.0, "cudnn": 1.0}})
    for name, value in (("get_device_name", lambda _: "another card"), ("is_available", lambda: False)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, name, value)
            assert routes.table(CUDA) == {}
    for other in ({"torch": "9.9"}, {"kernels": "edited"}):
        with monkeypatch.context() as patch:
            patch.setattr(routes, "facts", lambda device, now=routes.facts, o=other: now(device) | o)
            assert routes.table_file(CUDA) != path
    assert routes.table_file(CUDA) == path


@pytest.mark.parametrize(
    "content", ["", "[]", '{"layers": [{"route": "fast"}]}', '{"layers": [{"route": "triton"}]}']
)
def test_a_damaged_table_is_said_and_not_used(content: str, card: Path) -> None:
    routes.table_file(CUDA).write_text(content)
    with pytest.warns(UserWarning, match="is no table of routes .* `mtl-fast tune` writes it anew"):
        assert routes.route(layer(512), CUDA) == "cudnn"
    assert routes.route(layer(), CUDA) == "triton", "it is said once"


def test_the_shape_of_a_layer_is_that_of_its_tensors() -> None:
    x = torch.empty(2, 3, 5, 7, dtype=torch.float16)
    shape = LayerShape.of(x, torch.empty(11, 3, 1, 1))
    assert shape == LayerShape(3, 11, 5, 7, 1, "float16")
    assert str(shape) == "3→11@5×7, 1×1, float16"
