"""Files for other programs: what they hold, and that it computes what ours does."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.cli import main
from mtl_fast.config import EncoderConfig
from mtl_fast.errors import InputError
from mtl_fast.nn import LinearHead
from mtl_fast.training import export_weights as module
from mtl_fast.training.export_weights import export_weights
from mtl_fast.training.models import build_encoder, learnable, load_model, save_model, weights_of
from tests.conv_cases import assert_near
from tests.nn.plain_networks import randomise
from tests.training import tiny
from tests.training.tiny import CONFIG

ENCODERS = {
    "resnet12": EncoderConfig(widths=(4, 5, 6, 7), shortcut_scale_shift=True),
    "resnet25": EncoderConfig("resnet25", widths=(4, 6, 7)),
    "conv4": EncoderConfig("conv4", widths=(5,)),
}
SIZE = 18
# Two evaluations in float32 of up to 25 layers of at most 63 terms, each as good as its order of sums.
TOLERANCE = 2 * 25 * 63**0.5 * torch.finfo(torch.float32).eps


def model_file(folder: Path, kind: str = "resnet12", **meta: Any) -> Path:
    """A meta-trained model with Φ moved."""
    config = tiny.with_meta(replace(CONFIG, encoder=ENCODERS[kind]), **meta)
    encoder = build_encoder(config.encoder, image_size=SIZE, generator=torch.Generator().manual_seed(0))
    learnable(encoder, config)
    randomise(encoder, 1, scale_shift=True)
    head = LinearHead(encoder.feature_dim, 3, generator=torch.Generator().manual_seed(1))
    save_model(folder / "model.safetensors", "meta", config, weights_of(encoder, head), image_size=SIZE)
    return folder / "model.safetensors"


def pixels(n: int) -> Tensor:
    return torch.randint(256, (n, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(3)).float()


def features(path: Path, images: Tensor) -> Tensor:
    model = load_model(path)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.data.mean, model.config.data.std))
    with torch.no_grad():
        return model.encoder((images - mean) / std)


def test_a_state_dict_holds_every_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model_file(tmp_path)
    assert main(["export", str(path), "--output", str(tmp_path / "out.pth"), "--format=state-dict"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out.pth'} (")
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert tiny.same_tensors(state, tiny.model_of(tmp_path))
    assert {"encoder.layers.0.convs.0.scale", "encoder.layers.0.shortcut.shift", "head.bias"} <= state.keys()


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_torch_program_computes_what_ours_does(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model_file(tmp_path, kind)
    assert main(["export", str(path), "--output", str(tmp_path / "out.pt2"), "--format=torch"]) == 0
    said = capsys.readouterr().out
    assert "images [N, 3, 18, 18] → features [N, " in said
    assert float(said.rpartition(" from ours")[0].rpartition(", ")[2]) <= TOLERANCE
    network = torch.export.load(tmp_path / "out.pt2").module()
    for n in (1, 3):
        assert_near(network(pixels(n)), features(path, pixels(n)), TOLERANCE)


def test_a_torch_program_needs_nothing_of_ours(tmp_path: Path) -> None:
    export_weights(model_file(tmp_path), tmp_path / "out.pt2", format="torch")
    expected = features(tmp_path / "model.safetensors", torch.full((2, 3, SIZE, SIZE), 100.0))
    code = (
        "import sys, torch\n"
        f"network = torch.export.load({str(tmp_path / 'out.pt2')!r}).module()\n"
        f"print(*network(torch.full((2, 3, {SIZE}, {SIZE}), 100.0)).flatten().tolist())\n"
        "assert 'mtl_fast' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert_near(torch.tensor([float(v) for v in done.stdout.split()]), expected.flatten(), TOLERANCE)


@pytest.mark.parametrize("kind", ENCODERS)
def test_onnx_computes_what_ours_does(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="pip install -r requirements/test.txt brings it")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = model_file(tmp_path, kind)
    assert main(["export", str(path), "--output", str(tmp_path / "out.onnx"), "--format=onnx"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert float(said.out.rpartition(" from ours")[0].rpartition(", ")[2]) <= TOLERANCE
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    session = runtime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["features"]
    for n in (1, 3):
        (theirs,) = session.run(None, {"images": pixels(n).numpy()})
        assert_near(torch.from_numpy(theirs), features(path, pixels(n)), TOLERANCE)


def test_without_the_packages_of_onnx_a_line_says_what_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs onnx and onnxscript, .*; pip install 'mtl-fast\[onnx\]'"):
        export_weights(model_file(tmp_path), tmp_path / "out.onnx", format="onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_network_that_could_not_be_compared_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_require_onnx", lambda: None)
    monkeypatch.setattr(module, "_onnx_program", lambda network, size: (b"payload", None))
    said = export_weights(model_file(tmp_path), tmp_path / "new" / "out.onnx", format="onnx")
    assert said.endswith(
        "(7 bytes): images [N, 3, 18, 18] → features [N, 7], not compared with ours: "
        "onnxruntime is not installed"
    )
    assert (tmp_path / "new" / "out.onnx").read_bytes() == b"payload"


def test_wrong_inputs_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model_file(tmp_path, norm="episode")
    (tmp_path / "taken").touch()
    for arguments, says in (
        ([str(path), "--output", str(tmp_path / "taken"), "--format=torch"], "exists already"),
        ([str(path), "--output", str(tmp_path / "new"), "--format=torch"], "do not fold into convolutions"),
        ([str(tmp_path / "no"), "--output", str(tmp_path / "new"), "--format=state-dict"], "does not exist"),
        (
            [str(path), "--output", str(tmp_path / "taken" / "a"), "--format=state-dict"],
            "cannot make this folder",
        ),
    ):
        assert main(["export", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mtl-fast: error: ")
        assert err.count("\n") == 1
        assert says in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "taken"]
    assert main(["export", str(path), "--output", str(tmp_path / "new"), "--format=state-dict"]) == 0
