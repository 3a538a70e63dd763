"""From a file of another program to a model that is evaluated and trained on here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_fast import FewShotClassifier
from mtl_fast.cli import main
from mtl_fast.errors import InputError
from mtl_fast.training import checkpoint, meta_train
from mtl_fast.training.import_weights import import_weights
from mtl_fast.training.models import load_model
from tests.training import tiny
from tests.training.foreign_networks import Learner, ResNet25, tensorflow_files, trained

META = [
    *("--meta.n-tasks=4", "--meta.hard=none", "--meta.validate-every=4", "--meta.validation-tasks=4"),
    *("--inner.train-steps=2", "--inner.test-steps=3", "--episodes.n-way=3", "--episodes.n-query=4"),
    "--device=cpu",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_class_folders(tmp_path_factory.mktemp("data"), n_images=17)


def tensorflow(folder: Path, *names: str) -> list[str]:
    files = tensorflow_files()
    for name in names:
        np.save(folder / f"{name}.npy", files[name], allow_pickle=True)  # type: ignore[arg-type]
    return [str(folder / f"{name}.npy") for name in names]


def test_the_command_prints_the_account_and_evaluate_reads_the_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tensorflow(tmp_path, "weights", "ss_weights", "fc_weights")
    output = tmp_path / "model.safetensors"
    torch.save({"params": trained(ResNet25(mtl=False)).state_dict()}, tmp_path / "max_acc.pth")
    frozen = tmp_path / "frozen.safetensors"
    import_weights([tmp_path / "max_acc.pth"], frozen, format="pytorch", image_size=16)
    assert main(["import", *files, "--output", str(output), "--image-size=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["source", "shape", "ours"]
    (row,) = [line for line in lines if line.startswith("block1_conv1") and "scale" in line]
    assert row.split()[:3] == ["block1_conv1", "1×1×3×4", "encoder.layers.0.convs.0.scale"]
    assert lines[-1] == (
        "meta-trained model from tensorflow: 54 tensors taken, 2 left out, 36 not in the source; "
        f"no running statistics: norm 'episode' only in {output}"
    )
    arguments = ["evaluate", "--checkpoint", str(output), f"--data={data}", "--evaluation.n-tasks=4"]
    assert main([*arguments, "--device=cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"3-way 1-shot, 4 test tasks of {data} (imported weights): ")
    for command in (["evaluate"], ["embed", f"--output={tmp_path / 'features'}"]):
        file = output if command == ["evaluate"] else frozen
        assert main([*command, f"--checkpoint={file}", "--device=cpu"]) == 2
        says = f"{file}: was imported, and does not know its images; name them with --data\n"
        assert capsys.readouterr().err == f"mtl-fast: error: {says}"


@pytest.mark.filterwarnings("ignore:norm 'episode'")
def test_a_pretrained_import_is_meta_trained_and_frozen_norms_need_statistics(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = tensorflow(tmp_path, "weights")
    assert main(["import", file, f"--output={tmp_path / 'pre'}", "--image-size=16"]) == 0
    command = ["meta-train", f"--pretrained={tmp_path / 'pre'}", f"--output={tmp_path / 'run'}", *META]
    command += [f"--data.source={data}", "--data.mean", *3 * ["0"], "--data.std", *3 * ["255"]]
    capsys.readouterr()
    assert main(command) == 2
    says = "pre: was imported without running statistics, which --meta.norm frozen needs; give --meta.norm episode"
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"/pre: its norm takes the statistics of each task"):
        FewShotClassifier.load(tmp_path / "pre")
    assert main([*command, "--meta.norm=episode"]) == 0
    assert load_model(tmp_path / "run").norm == "episode"


def test_a_resnet25_is_meta_trained_with_its_affine_and_goes_on(data: Path, tmp_path: Path) -> None:
    torch.save({"params": trained(ResNet25(mtl=False)).state_dict()}, tmp_path / "max_acc.pth")
    import_weights([tmp_path / "max_acc.pth"], tmp_path / "pre", format="pytorch", image_size=16)
    command = ["meta-train", f"--pretrained={tmp_path / 'pre'}", f"--output={tmp_path / 'run'}", *META]
    command += [f"--data.source={data}", "--meta.shift=biased", "--meta.train-affine", "--inner.order=first"]
    assert main(command) == 0
    before = checkpoint.load(tmp_path / "pre")[0]
    last = checkpoint.part(checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")[0], "current")
    for name in before:
        moves = name.endswith((".norm.weight", ".norm.bias"))
        assert torch.equal(last[name], before[name]) != moves, name
    assert [name for name in last if name.endswith(".shift")] == ["encoder.stem.shift"]
    assert main([*command, "--resume"]) == 0


def test_wrong_inputs_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = trained(Learner(ResNet25(mtl=True), "encoder", 8))
    torch.save({"params": learner.state_dict()}, tmp_path / "a.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "taken").touch()
    numpy = tensorflow(tmp_path, "ss_weights")
    for arguments, says in (
        (["a.pth", "--output=taken"], "exists already; give another --output"),
        (["nowhere.pth", "--output=new"], "nowhere.pth: cannot be read (No such file"),
        (["text.pth", "--output=new"], "is no file of torch.save"),
        (["a.pth", "a.pth", "--output=new"], "is a second file"),
        ([*numpy, "--output=new"], "holds scale and shift only"),
        ([*numpy, "--output=new", "--format=pytorch"], "is no file of torch.save"),
        (["a.pth", "--output=new", "--format=tensorflow"], "has no header of a .npy file"),
        (["a.pth", "--output=new", "--image-size=0"], "data.image_size is 0"),
    ):
        paths = [
            str(tmp_path / a) if "--" not in a else a.replace("--output=", f"--output={tmp_path}/")
            for a in arguments
        ]
        assert main(["import", *paths]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mtl-fast: error: ")
        assert err.count("\n") == 1
        assert says in err
        assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match=re.escape("no file to import")):
        import_weights([], tmp_path / "new")


def test_frozen_statistics_of_other_encoders_are_fine(pretrained: Path) -> None:
    model = load_model(pretrained)
    assert model.stored_statistics
    assert model.norm == "frozen"
    meta_train.check_statistics(model.config.meta, model)
