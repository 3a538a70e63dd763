"""One's own images labelled: what comes out is what the classifier says, in a table, a CSV and a picture."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_fast import FewShotClassifier, predict_images
from mtl_fast.cli import main
from mtl_fast.data import load_split
from mtl_fast.errors import InputError
from mtl_fast.training import folder_lock
from mtl_fast.training.predict import Predictions
from tests.training import tiny
from tests.training.locks import another_process


def save(path: Path, pixels: np.ndarray, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1, 2 and 3 examples of three classes of the tiny test split, and nine images beside them."""
    root, store = tmp_path_factory.mktemp("own"), tiny.split("test")
    for label in range(3):
        rows = store.images[store.class_index[label]].numpy()
        for i in range(label + 1):
            save(root / f"kind {label}" / f"{i}.png", rows[i])
        for i in range(3):
            save(root / f"{label}-{i}.png", rows[10 + i], "RGBA" if i else "RGB")
    return root


def test_it_says_what_the_classifier_says(folder: Path, meta_trained: Path) -> None:
    found = predict_images(folder, checkpoint=meta_trained, device="cpu")
    store = tiny.split("test")
    rows = [store.images[store.class_index[label]].numpy() for label in range(3)]
    support = np.concatenate([rows[label][: label + 1] for label in range(3)])
    queries = np.concatenate([rows[label][10:13] for label in range(3)])
    classifier = FewShotClassifier.load(meta_trained, device="cpu").fit(support, [0, 1, 1, 2, 2, 2])
    assert np.array_equal(found.probabilities, classifier.predict_proba(queries))
    assert found.files == tuple(f"{label}-{i}.png" for label in range(3) for i in range(3))
    assert found.labels == tuple(f"kind {i}" for i in classifier.predict(queries))
    assert np.array_equal(found.images, queries)
    assert [len(each) for each in found.support] == [1, 2, 3]


def test_the_command_prints_a_table_and_writes_a_csv_and_a_picture(
    folder: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["predict", str(folder), "--checkpoint", str(pretrained), "--output", str(output)]
    assert main([*arguments, "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "class", "probability"]
    found = predict_images(folder, checkpoint=pretrained, device="cpu")
    with open(output / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    for i, (row, line) in enumerate(zip(rows, lines[2:11], strict=True)):
        p = found.probabilities[i]
        assert (row["file"], row["class"]) == (found.files[i], found.labels[i])
        assert line.split() == [*row["file"].split(), *row["class"].split(), f"{p.max():.1%}"]
        assert [float(row[f"p(kind {c})"]) for c in range(3)] == pytest.approx(p.tolist(), abs=5e-7)
        assert float(row["probability"]) == pytest.approx(p.max(), abs=5e-7)
    with Image.open(output / "predictions.png") as image:
        assert image.size[0] == 1600
    assert sorted(path.name for path in output.iterdir()) == ["predictions.csv", "predictions.png"]


def test_given_again_it_says_the_same_though_its_picture_lies_there(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of one's own images, where the default output is made."""
    shutil.copytree(folder, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    texts = []
    for _ in range(2):
        assert main(["predict", ".", f"--checkpoint={pretrained}", "--device=cpu"]) == 0
        texts.append(Path("runs/predict/predictions.csv").read_text())
    assert texts[0] == texts[1]
    assert texts[0].count("\n") == 10


def test_a_long_table_is_cut_and_names_cannot_break_it() -> None:
    many = Predictions(
        ("a\nb\udcff.png", *(f"{i}.png" for i in range(60))),
        ("x\x1b[31m", "y"),
        np.tile(np.float32([[0.75, 0.25]]), (61, 1)),
        np.zeros((61, 2, 2, 3), np.uint8),
        (np.zeros((1, 2, 2, 3), np.uint8),) * 2,
    )
    lines = str(many).splitlines()
    assert lines[2].split() == ["a�b�.png", "x�[31m", "75.0%"]
    assert len(lines) == 2 + 40 + 1
    assert lines[-1] == "… and 21 more"


def test_a_file_name_that_is_no_text_keeps_its_bytes(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    try:
        os.symlink(folder / "0-0.png", os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes text only")
    found = predict_images(folder, tmp_path, checkpoint=pretrained, device="cpu")
    found.save(tmp_path / "out")
    assert b"\n\xff.png,kind" in (tmp_path / "out" / "predictions.csv").read_bytes()


def test_wrong_input_is_one_line(
    folder: Path, maml_trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["predict", *arguments, f"--output={tmp_path / 'out'}"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("mtl-fast: error: ")
        assert err.count("\n") == 1, err
        return err

    assert "no such folder; expected a folder of class folders" in refused(str(tmp_path / "nothing"))
    assert "adapts all weights" in refused(str(folder), f"--checkpoint={maml_trained}")
    assert "is not a checkpoint of mtl_fast" in refused(str(folder), f"--checkpoint={folder / '0-0.png'}")
    (tmp_path / "bad.png").write_bytes(b"no image at all")
    assert "bad.png (15 bytes) is not an image" in refused(str(folder), str(tmp_path / "bad.png"))
    assert not (tmp_path / "out" / "predictions.csv").exists()
    (tmp_path / "taken").write_text("mine")
    assert main(["predict", str(folder), f"--output={tmp_path / 'taken'}"]) == 2
    assert "cannot make this folder" in capsys.readouterr().err


def test_without_a_checkpoint_the_shipped_model_tells_characters_apart(tmp_path: Path) -> None:
    """Five characters of scripts that no training saw, three examples each: chance is a fifth."""
    store = load_split("glyphs", "test")
    for label in range(0, 100, 20):
        rows = store.images[store.class_index[label]].numpy()
        for i in range(3):
            save(tmp_path / "s" / f"{label:03d}" / f"{i}.png", rows[i])
        for i in range(3, 13):
            save(tmp_path / "q" / f"{label:03d}-{i}.png", rows[i], "L")
    found = predict_images(tmp_path / "s", tmp_path / "q", device="cpu")
    right = [file.startswith(label) for file, label in zip(found.files, found.labels, strict=True)]
    # 50 answers of the 80 % that 3-shot tasks have; five standard deviations below.
    assert np.mean(right) > 0.8 - 5 * (0.8 * 0.2 / 50) ** 0.5


def test_only_the_default_asks_for_the_shipped_model(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtl_fast.training.predict.SHIPPED", tmp_path / "gone")
    assert len(predict_images(folder, checkpoint=pretrained, device="cpu").files) == 9
    with pytest.raises(InputError, match="gone does not exist"):
        predict_images(folder, device="cpu")


def test_two_at_once_do_not_write_into_each_other(
    folder: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.0)
    found = predict_images(folder, checkpoint=pretrained, device="cpu")
    output = tmp_path / "labels"
    output.mkdir()
    with another_process(output), pytest.raises(InputError, match="labels: another run is at work there"):
        found.save(output)
    assert not list(output.iterdir())
    found.save(output)
    assert len(list(output.iterdir())) == 2
