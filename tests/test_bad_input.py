"""What happens with wrong input to commands: one line, status 2, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path
from typing import Any

import pytest

from mtl_fast.cli import main

QUICK = "--preset glyphs-quick --output out"
# Command → a part of the one line that it ends with. Names of files are those of `folder` below.
COMMANDS = {
    "pretrain --output out --preset papper": "preset 'papper' is unknown; choose one of: paper",
    "pretrain --output out --data.source nowhere": "nowhere: no such folder or file; name where the images are",
    "pretrain --output out --preset tensorflow-fc100": "fc100: no such folder or file; name where the images are with",
    "pretrain --output out --data.source empty": "empty: holds nothing, which is no data set",
    "pretrain --output out --data.source text": "text: a file that shows no format",
    "pretrain --output out --data.source half": "half/train: holds nothing; expected {train,val,test}",
    "pretrain --output out --data.source glyphs:hard": "no difficulty 'hard'; take one of soft, mid",
    f"pretrain {QUICK} --pretrain.epochs 0": "pretrain.epochs is 0; it must be at least 1",
    f"pretrain {QUICK} --pretrain.lr -1": "pretrain.lr is -1.0; it must be positive and finite",
    f"pretrain {QUICK} --pretrain.lr inf": "pretrain.lr is inf; it must be positive and finite",
    f"pretrain {QUICK} --pretrain.jitter 2": "pretrain.jitter is 2.0; it must be in 0..1",
    f"pretrain {QUICK} --encoder.widths 8 8": "encoder.widths has 2 numbers; resnet12 takes 4",
    f"pretrain {QUICK} --encoder.widths 8 8 8 0": "encoder.widths is 0; it must be at least 1",
    f"pretrain {QUICK} --encoder.dropout 1": "encoder.dropout is 1.0; it must be at least 0 and below 1",
    f"pretrain {QUICK} --device cuda": "device 'cuda': this PyTorch sees no CUDA device; use --device cpu",
    f"pretrain {QUICK} --device tpu": "device 'tpu' is unknown; use auto, cpu, cuda or cuda:N",
    f"pretrain {QUICK} --seed -3": "seed is -3; it must be in 0..2**63 - 1",
    f"pretrain {QUICK} --data.image-size 8": "images of 8×8 pixels are too small for resnet12",
    f"pretrain {QUICK} --data.std 0 1 1": "data.std is 0.0; it must be positive and finite",
    "pretrain --output text --preset glyphs-quick": "text: cannot make this folder",
    f"meta-train {QUICK}": "--pretrained is missing",
    f"meta-train {QUICK} --pretrained nowhere": "checkpoint nowhere does not exist",
    f"meta-train {QUICK} --pretrained text": "text has only 5 bytes: cut short, or not a checkpoint",
    f"meta-train {QUICK} --pretrained zeros.safetensors": "zeros.safetensors is not a checkpoint of mtl_fast",
    f"meta-train {QUICK} --pretrained empty": "empty holds no checkpoint",
    f"meta-train {QUICK} --meta.n-tasks 0": "meta.n_tasks is 0; it must be at least 1",
    f"meta-train {QUICK} --meta.tasks-per-update 3": "no positive multiple of --meta.tasks-per-update 3",
    f"meta-train {QUICK} --episodes.n-way 1": "episodes.n_way is 1; it must be at least 2",
    f"meta-train {QUICK} --episodes.n-shot 0": "episodes.n_shot is 0; it must be at least 1",
    f"meta-train {QUICK} --inner.lr nan": "inner.lr is nan; it must be positive and finite",
    f"meta-train {QUICK} --inner.adapt all": "inner.adapt is 'all': meta-training then learns where all weights",
    "evaluate": "give either --checkpoint, a model file, or --embeddings",
    "evaluate --checkpoint nowhere": "checkpoint nowhere does not exist",
    "evaluate --checkpoint empty --embeddings zeros.safetensors": "give either --checkpoint",
    "evaluate --embeddings zeros.safetensors": "zeros.safetensors: cannot be read as safetensors",
    "evaluate --embeddings nowhere.safetensors": "nowhere.safetensors: no such file of embeddings",
    "evaluate --checkpoint nowhere --shard 3/2": "--shard 3/2: expected I/N with I in 1..N, such as 2/4",
    "embed --checkpoint nowhere --output f.safetensors": "checkpoint nowhere does not exist",
    "import nowhere.npy --output m.safetensors": "nowhere.npy: cannot be read (No such file",
    "import text --output m.safetensors": "text (5 bytes): is no file of torch.save, or cut short",
    "export nowhere --format onnx --output m.onnx": "checkpoint nowhere does not exist",
    "data info nowhere": "nowhere: no such folder or file",
    "data info empty": "empty: holds nothing, which is no data set",
    "data info text": "text: a file that shows no format",
    "results --seeds -1 --output out --publish out": "seed is -1; it must be in 0..2**63 - 1",
    "results --workers -1 --output out --publish out": "--workers is -1; give a number of runs at a time",
    "demo --seed -1 --output out": "seed is -1; it must be in 0..2**63 - 1",
    "demo --device cuda --output out": "device 'cuda': this PyTorch sees no CUDA device",
    "demo --output text": "text: cannot make this folder",
}
# Command → words of what the parser of options says: which option misses, does not exist, or what it may be.
OPTIONS = {
    "pretrain": "--output",
    f"pretrain {QUICK} --encoder.name vgg": "vgg",
    f"pretrain {QUICK} --pretrain.epochs many": "many",
    f"meta-train {QUICK} --meta.hard sometimes": "sometimes",
    "embed": "--checkpoint",
    "export text --format caffe --output m": "caffe",
    "data infos empty": "infos",
    "build --nothing": "--nothing",
    "walk": "walk",
    "--preset": "--preset",
    "doctor --fix": "--fix",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a command: a few files and folders that are not what is asked for."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "train").mkdir(parents=True)
    (tmp_path / "text").write_text("hello", "utf-8")
    (tmp_path / "zeros.safetensors").write_bytes(bytes(20))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("line", COMMANDS)
def test_a_wrong_input_is_one_line_with_status_2(
    line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(folder)
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mtl-fast: error: ")
    assert err.count("\n") == 1
    assert COMMANDS[line] in err
    # An empty output folder may have been made before the data were looked at.
    assert [name for name in names(folder) if name != "out"] == before


@pytest.mark.parametrize("line", OPTIONS)
def test_a_wrong_option_is_named_with_status_2(
    line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(folder)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(line))
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert OPTIONS[line] in text
    assert "Traceback" not in text
    assert names(folder) == before


@pytest.mark.parametrize(
    "command",
    [
        "data info {}",
        "evaluate --checkpoint {}",
        "evaluate --embeddings {}",
        "embed --checkpoint any --output {}",
        "import any --output {}",
        "export {} --format onnx --output any",
        "predict {}",
        "pretrain --output run --data.source {}",
    ],
)
def test_a_path_that_cannot_be_looked_at_is_named(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it exists is an error too where a folder on the way is closed, which no folder is to the superuser."""
    before = names(folder)
    long, closed = folder / ("n" * 300), folder / "closed" / "inside"
    stat = Path.stat

    def refused(self: Path, **options: Any) -> Any:
        if closed in (self, *self.parents):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refused)
    for path, reason in ((long, "File name too long"), (closed, "Permission denied")):
        assert main(command.format(path).split()) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert (str(path) in err, reason in err, err.count("\n")) == (True, True, 1), err
        assert names(folder) == before
