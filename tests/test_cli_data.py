"""`mtl-fast data info`, and every format by way of the command: whole copies are described, damaged ones one line."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_fast.cli import main
from mtl_fast.data.recognise import FORMATS
from mtl_fast.training.embeddings import load_embeddings
from tests.data.cases import pictures, write
from tests.data.copies import COPIES, TIERED_IMAGES, tiered
from tests.training import tiny

# What damages a copy of each format: a file in it, and what becomes of its content.
Damage = tuple[str, Callable[[bytes], bytes]]


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def without(key: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        value = pickle.loads(content)  # of the tests' own
        return pickle.dumps({name: item for name, item in value.items() if name != key})

    return change


def hostile(_: bytes) -> bytes:
    return b"cos\nsystem\n(S'touch hostile-was-here'\ntR."


DAMAGES: dict[str, list[Damage]] = {
    "class folders": [("val/val a/0.png", cut)],
    "CSV lists": [("train.csv", cut), ("images/a1.png", cut), ("train.csv", lambda _: b"file\nx\n")],
    "miniImageNet cache": [
        (f"mini-imagenet-cache-{split}.pkl", change)
        for split, change in (("train", cut), ("val", without("class_dict")), ("test", hostile))
    ],
    "miniImageNet, category split": [
        ("miniImageNet_category_split_val.pickle", change) for change in (cut, without("labels"), hostile)
    ],
    "CIFAR-100 (split as FC100)": [("cifar-100-python/test", change) for change in (cut, hostile)],
    "FC100": [("FC100_test.pickle", change) for change in (cut, without("data"), hostile)],
    "FC100, TADAM's archives": [("few-shot-val.npz", cut), ("few-shot-val.npz", hostile)],
    "tieredImageNet, PNG buffers": [("val_images_png.pkl", cut), ("test_labels.pkl", hostile)],
    "tieredImageNet, arrays": [("val_images.npz", cut), ("test_labels.pkl", cut)],
    "CIFAR-FS": [("CIFAR_FS_val.pickle", change) for change in (cut, without("labels"), hostile)],
    "CUB-200-2011": [("CUB_200_2011/images.txt", cut), ("CUB_200_2011/images/002.Auk/Auk_0.jpg", cut)],
}


@pytest.mark.parametrize("format", [kind.format for kind in FORMATS])
def test_every_format_is_described_and_drawn(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = COPIES[format](tmp_path / "data")
    assert main(["data", "info", str(source), "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"{source}: {format}"
    assert lines[-1] == f"Some of it: {tmp_path / 'out' / 'contact_sheet.png'}"
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width == 1600
    kind = next(kind for kind in FORMATS if kind.format == format)
    assert f"  {kind.layout}" in lines
    if kind.channel_order is None:
        assert err == ""
    else:
        assert err.startswith(f"{source}: {format} is read as {kind.channel_order.upper()}; ")


@pytest.mark.parametrize(
    ("format", "damage"),
    [(format, damage) for format, damages in DAMAGES.items() for damage in damages],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}-{value[1].__name__}",
)
def test_every_damaged_copy_is_one_line_and_status_2(
    format: str,
    damage: Damage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    source = COPIES[format](tmp_path / "data")
    name, change = damage
    path = tmp_path / "data" / name
    write(path, change(path.read_bytes()))
    capsys.readouterr()
    assert main(["data", "info", str(source), "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "is read as" not in line]
    assert line.startswith("mtl-fast: error: ")
    assert str(path.name) in line
    assert out == ""
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "hostile-was-here").exists()


def test_every_format_has_its_damage() -> None:
    assert list(DAMAGES) == list(COPIES) == [kind.format for kind in FORMATS]


def test_options_change_what_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = COPIES["CUB-200-2011"](tmp_path)
    output = ["--output", str(tmp_path / "out")]
    assert main(["data", "info", str(root), *output, "--image-size=12", "--crop-to-box"]) == 0
    assert "8×6" in capsys.readouterr().out
    assert main(["data", "info", str(root), *output, "--channel-order=bgr"]) == 2
    assert "files of CUB-200-2011 tell their channel order" in capsys.readouterr().err
    assert main(["data", "info", str(root), *output, "--image-size=0"]) == 2
    assert "image_size is 0; it must be at least 1 pixel" in capsys.readouterr().err


def test_what_is_no_data_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mtl-fast: error: {tmp_path}: holds nothing, which is no data set; looked for ")
    assert err.count("\n") == 1


def test_an_output_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = COPIES["class folders"](tmp_path / "data")
    assert main(["data", "info", str(root), "--output", str(write(tmp_path / "file", b"mine"))]) == 2
    assert "file: cannot make this folder" in capsys.readouterr().err


def test_a_run_reads_as_its_settings_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pre-training, on arrays of tieredImageNet told to be red first."""
    labels = {"labels": [i // 2 for i in range(12)]}
    for seed, split in enumerate(("train", "val")):
        tiered(tmp_path, np.concatenate([pictures(6, 84, seed), TIERED_IMAGES]), labels, split)
    arguments = [
        *("pretrain", "--output", str(tmp_path / "run"), f"--data.source={tmp_path}", "--data.image-size=16"),
        *("--data.channel-order=rgb", "--encoder.widths", "4", "4", "4", "4", "--device=cpu"),
        *("--episodes.n-query=1", "--pretrain.epochs=1", "--pretrain.validation-tasks=4"),
    ]
    assert main(arguments) == 0
    assert "is read as" not in capsys.readouterr().err
    assert '"channel_order": "rgb"' in (tmp_path / "run" / "config.json").read_text()
    assert tiny.rows_of(tmp_path / "run")


def test_help_says_what_each_option_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "{info} PATH",
        "contact_sheet.png",
        "--channel-order {auto,rgb,bgr}",
        "--crop-to-box",
        "--image-size",
    ):
        assert part in text


def test_names_that_are_no_text_go_through_all_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also past a terminal that takes UTF-8 alone."""
    monkeypatch.chdir(tmp_path)
    source = "by\udcff"
    for folder in sorted(tiny.write_class_folders(Path(source), n_images=17).glob("*/*")):
        folder.rename(folder.with_name(f"{folder.name}\udcff"))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", terminal)
    device, few = "--device=cpu", "--evaluation.n-tasks=4"
    pretraining = ["pretrain", "--output=pre\udcff", f"--data.source={source}", device, "--pretrain.epochs=1"]
    pretraining += ["--encoder.widths", "4", "4", "4", "4", "--pretrain.validation-tasks=4"]
    training = ["meta-train", "--pretrained=pre\udcff", "--output=meta", f"--data.source={source}", device]
    training += ["--meta.n-tasks=4", "--meta.random-tasks-per-round=2", "--meta.hard-tasks-per-round=2"]
    training += ["--meta.validation-tasks=4", "--meta.validate-every=4", "--inner.test-steps=2"]
    for command in (
        ["data", "info", source],
        pretraining,
        [*pretraining, "--resume"],
        training,
        ["embed", "--checkpoint=meta", "--output=features", device],
        ["evaluate", "--embeddings=features", few, device],
        ["evaluate", "--checkpoint=meta", "--output=test\udcff", few, device],
    ):
        assert main(command) == 0, command
    terminal.flush()
    assert b"pre\xff" in terminal.buffer.getvalue()  # type: ignore[attr-defined]  # of BytesIO
    names = load_embeddings("features").store.class_names
    assert sorted(names) == sorted(path.name for path in Path(source, "test").iterdir())
