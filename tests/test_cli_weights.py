"""The commands that bring weights in and out: their help, and the whole way from one program to another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtl_fast.cli import main
from tests.conv_cases import assert_near
from tests.training.foreign_networks import Learner, ResNet25, trained


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "import",
            [
                "FILE [FILE ...]",
                "(required)",
                "--format {auto,tensorflow,pytorch,libfewshot}",
                "`auto` looks inside",
            ],
        ),
        ("export", ["PATH", "--format {state-dict,torch,onnx}", "an ordinary network"]),
    ],
)
def test_help_names_the_formats(command: str, says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(part in text for part in ("--output PATH", *says)), text
    assert "(default: )" not in text


def test_weights_in_and_out_compute_what_they_did(tmp_path: Path) -> None:
    """From the authors' network over our model file to an ordinary torch program."""
    learner = trained(Learner(ResNet25(mtl=True), "encoder", 8))
    torch.save({"params": learner.state_dict()}, tmp_path / "max_acc.pth")
    model, program = str(tmp_path / "model.safetensors"), str(tmp_path / "features.pt2")
    assert main(["import", str(tmp_path / "max_acc.pth"), "--output", model, "--image-size=20"]) == 0
    assert main(["export", model, "--output", program, "--format=torch"]) == 0
    images = torch.randint(256, (2, 3, 20, 20), generator=torch.Generator().manual_seed(1)).float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))
    with torch.no_grad():
        expected = learner.encoder((images - mean) / std)
    # Two evaluations in float32 of 25 layers of at most 72 terms.
    tolerance = 2 * 25 * 72**0.5 * torch.finfo(torch.float32).eps
    assert_near(torch.export.load(program).module()(images), expected, tolerance)
