"""The `mtl-fast` command: what it does with good arguments, one line for bad ones, Ctrl-C, quick help."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.cli import main
from mtl_fast.training import pretrain
from tests.training import tiny

NETWORK = ["--encoder.widths", "4", "4", "4", "4", "--device", "cpu"]
PRETRAIN = [
    "--pretrain.optimizer=adamw",
    "--pretrain.lr=0.01",
    "--pretrain.epochs=2",
    "--pretrain.batch-size=34",
    "--pretrain.validation-tasks=4",
]
META = [
    "--meta.n-tasks=6",
    "--meta.random-tasks-per-round=4",
    "--meta.hard-tasks-per-round=2",
    "--meta.validate-every=4",
    "--meta.validation-tasks=4",
    "--inner.train-steps=3",
    "--inner.test-steps=5",
    "--episodes.n-query=6",
    "--device=cpu",
]
TEST = ["--evaluation.n-tasks=8", "--device=cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of class folders, 6 classes of 17 images."""
    return tiny.write_class_folders(tmp_path_factory.mktemp("data"), n_images=17)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each phase, made by the command."""
    root = tmp_path_factory.mktemp("runs")
    source = f"--data.source={data}"
    assert main(["pretrain", "--output", str(root / "pre"), source, *NETWORK, *PRETRAIN]) == 0
    command = ["meta-train", "--pretrained", str(root / "pre"), "--output", str(root / "meta"), source]
    assert main([*command, *META]) == 0
    return root


def contents(*roots: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()}


Refuses = Callable[..., None]


@pytest.fixture
def refuses(capfd: pytest.CaptureFixture[str]) -> Refuses:
    """Checks that a command is refused: status 2, one line that says all of `says`, nothing on disk changed."""

    def check(arguments: list[str], *says: str, keeps: tuple[Path, ...] = ()) -> None:
        before = contents(*keeps)
        capfd.readouterr()
        assert main(arguments) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("mtl-fast: error: ")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert "Traceback" not in err
        assert all(text in err for text in says), err
        assert contents(*keeps) == before

    return check


def test_the_three_commands_follow_each_other(
    data: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (runs / "pre" / "model.safetensors").exists()
    assert [row["tasks"] for row in tiny.rows_of(runs / "meta")] == ["0", "4", "6"]
    capsys.readouterr()
    arguments = ["evaluate", "--checkpoint", str(runs / "meta"), *TEST, "--output", str(tmp_path / "test")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"5-way 1-shot, 8 test tasks of {data}: ")
    assert (tmp_path / "test" / "evaluation.json").exists()
    assert main(["evaluate", "--checkpoint", str(runs / "pre"), "--n-way=3", *TEST]) == 0
    assert capsys.readouterr().out.startswith(f"3-way 1-shot, 8 test tasks of {data}: ")


def test_a_profile_and_a_precision_can_be_asked_for(data: Path, runs: Path, tmp_path: Path) -> None:
    arguments = ["meta-train", "--pretrained", str(runs / "pre"), "--data.source", str(data), *META]
    run = tmp_path / "run"
    assert main([*arguments, "--output", str(run), "--profile", "--precision=bf16"]) == 0
    assert "traceEvents" in json.loads((run / "profile.json").read_text())
    assert json.loads((run / "config.json").read_text())["precision"] == "bf16"


def test_a_finished_run_is_only_told_again(
    data: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(runs)
    arguments = ["pretrain", "--output", str(runs / "pre"), f"--data.source={data}", *NETWORK, *PRETRAIN]
    assert main([*arguments, "--resume"]) == 0
    assert f"pre-trained encoder: {runs / 'pre'}" in capsys.readouterr().out
    assert contents(runs) == before


def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_with_resume_does(
    data: Path,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = pretrain.Pretraining._update

    def update(self: Any) -> None:
        if self.update == 1:
            signal.raise_signal(signal.SIGINT)
        original(self)

    monkeypatch.setattr(pretrain.Pretraining, "_update", update)
    arguments = ["pretrain", "--output", str(tmp_path / "run"), f"--data.source={data}", *NETWORK, *PRETRAIN]
    assert main(arguments) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("mtl-fast: stopped pre-training after update 2 of 6; saved in ")
    assert last.endswith("; the same command with --resume goes on")
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0
    tiny.assert_same_run(tmp_path / "run", runs / "pre")


def test_ctrl_c_elsewhere_is_one_line_too(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mtl_fast.training import evaluate

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_model", interrupted)
    assert main(["evaluate", "--checkpoint", str(runs / "meta")]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_data_that_cannot_be_read_are_named(data: Path, tmp_path: Path, refuses: Refuses) -> None:
    def pretrain_on(folder: Path, *says: str) -> None:
        arguments = ["pretrain", "--output", str(tmp_path / "run"), f"--data.source={folder}", *NETWORK]
        refuses([*arguments, *PRETRAIN], *says, keeps=(data, tmp_path))
        assert not (tmp_path / "run").exists()

    pretrain_on(tmp_path / "nowhere", "nowhere: no such folder")
    (tmp_path / "empty").mkdir()
    pretrain_on(tmp_path / "empty", "empty: holds nothing")
    small = tiny.write_class_folders(tmp_path / "small", n_classes=2, n_images=1, size=8)
    pretrain_on(small, "8×8 pixels are too small", "--data.image-size")

    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    image = sorted((broken / "train" / "train3").iterdir())[5]
    payload = image.read_bytes()
    image.write_bytes(payload[: len(payload) // 2])
    pretrain_on(broken, str(image), "cannot be decoded", "replace or remove it")
    image.write_text("no image at all")
    pretrain_on(broken, str(image), "is not an image")
    image.unlink()
    for other in sorted((broken / "val" / "val2").iterdir())[1:]:
        other.unlink()
    pretrain_on(broken, "'val2' has 1 images", "1 + 15 = 16")
    for folder in sorted((broken / "val").iterdir())[:2]:
        shutil.rmtree(folder)
    pretrain_on(broken, "4 classes, fewer than n_way = 5")
    shutil.copy(next((tiny.write_class_folders(tmp_path / "big", n_images=1, size=20)).rglob("*.png")), image)
    pretrain_on(broken, "20x20", "16x16", "image_size")


def test_folders_that_hold_something_are_not_overwritten(
    data: Path, runs: Path, tmp_path: Path, refuses: Refuses
) -> None:
    source = f"--data.source={data}"
    to_pre = ["pretrain", "--output", str(runs / "pre"), source, *NETWORK, *PRETRAIN]
    refuses(to_pre, str(runs / "pre"), "holds a run already", "--resume", "--output", keeps=(runs,))
    refuses([*to_pre, "--resume", "--seed=1"], "other settings (seed is 0 there and 1 here)", keeps=(runs,))
    refuses(
        [*to_pre, "--resume", "--pretrain.epochs=3"], "pretrain.epochs is 2 there and 3 here", keeps=(runs,)
    )
    wider = [*to_pre, "--resume", "--encoder.widths", "4", "4", "4", "8"]
    refuses(wider, "encoder.widths is [4, 4, 4, 4] there and [4, 4, 4, 8] here", keeps=(runs,))
    file = tmp_path / "file"
    file.write_text("mine")
    refuses(
        ["pretrain", "--output", str(file), source, *NETWORK, *PRETRAIN],
        "cannot make this folder",
        keeps=(tmp_path,),
    )
    refuses(["demo", "--output", str(file)], "cannot make this folder", keeps=(tmp_path,))
    tested = ["evaluate", "--checkpoint", str(runs / "meta"), *TEST, "--output", str(file)]
    refuses(tested, "cannot make this folder", keeps=(tmp_path, runs))


def test_models_that_do_not_fit_are_named(data: Path, runs: Path, tmp_path: Path, refuses: Refuses) -> None:
    def meta_train(model: Path, *more: str) -> list[str]:
        output = ["--output", str(tmp_path / "run"), f"--data.source={data}"]
        return ["meta-train", "--pretrained", str(model), *output, *META, *more]

    refuses(
        meta_train(runs / "meta"), "holds a meta model where a pretrained one is needed", "mtl-fast pretrain"
    )
    refuses(meta_train(tmp_path / "nowhere"), "nowhere does not exist")
    refuses(meta_train(runs / "pre" / "checkpoint.safetensors"), "is no model file")
    refuses(
        meta_train(runs / "pre", "--data.image-size=20"),
        "another architecture: image_size is 16 there and 20 here",
    )
    refuses(meta_train(runs / "pre", "--preset=glyphs"), "pre-trained with --data.mean 125.3", "--preset")
    refuses(meta_train(runs / "pre", "--episodes.n-way=7"), "6 classes, fewer than n_way = 7")
    refuses(meta_train(runs / "pre", "--episodes.n-query=17"), "17 images", "1 + 17 = 18")
    refuses(
        meta_train(runs / "pre", "--meta.hard-tasks-per-round=3"), "--meta.hard-tasks-per-round is 3", "2"
    )
    from_nothing = ["meta-train", "--output", str(tmp_path / "run"), f"--data.source={data}"]
    refuses([*from_nothing, *META], "--pretrained is missing", "--preset maml")
    refuses([*from_nothing, "--preset=maml", "--meta.learn=head"], "inner.adapt is 'all'", "set meta.learn")
    refuses(
        ["evaluate", "--checkpoint", str(runs / "meta"), "--adapt=all", *TEST],
        "inner.adapt is 'all'",
        keeps=(runs,),
    )
    assert not (tmp_path / "run").exists()
    cut = tmp_path / "cut.safetensors"
    payload = (runs / "pre" / "model.safetensors").read_bytes()
    cut.write_bytes(payload[:-100])
    refuses(meta_train(cut), "cut.safetensors is cut short", f"{len(payload):,} bytes", keeps=(tmp_path,))
    other = tiny.write_class_folders(tmp_path / "more", n_classes=7, n_images=17)
    again = [
        "meta-train",
        "--pretrained",
        str(runs / "pre"),
        "--output",
        str(runs / "meta"),
        *META,
        "--resume",
    ]
    refuses([*again, f"--data.source={other}"], "data.source is", keeps=(runs,))


def test_a_checkpoint_cut_short_is_not_gone_on_from(
    data: Path, runs: Path, tmp_path: Path, refuses: Refuses
) -> None:
    shutil.copytree(runs / "pre", tmp_path / "pre")
    file = tmp_path / "pre" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    arguments = ["pretrain", "--output", str(tmp_path / "pre"), f"--data.source={data}", *NETWORK, *PRETRAIN]
    refuses([*arguments, "--resume"], "checkpoint.safetensors is cut short", keeps=(tmp_path,))


def test_what_cannot_be_tested_is_named(runs: Path, tmp_path: Path, refuses: Refuses) -> None:
    def evaluate(*more: str, model: Path = runs / "meta") -> list[str]:
        return ["evaluate", "--checkpoint", str(model), *TEST, *more]

    refuses(evaluate("--n-way=3"), "meta-trained for 5 classes a task, --n-way asks for 3", keeps=(runs,))
    refuses(evaluate(model=tmp_path), "does not exist", "holds no checkpoint")
    refuses(evaluate("--data=" + str(tmp_path / "nowhere")), "nowhere: no such folder")
    refuses(evaluate("--evaluation.n-tasks=1"), "evaluation.n_tasks is 1", "at least 2")
    refuses(evaluate("--n-shot=0"), "n_shot is 0")
    refuses(evaluate("--inner-lr=-1"), "inner.test_lr is -1.0")
    refuses(evaluate("--device=gpu"), "device 'gpu' is unknown", "cpu")
    refuses(evaluate("--shard=3/2", "--output", str(tmp_path / "shards")), "--shard 3/2: expected I/N")
    refuses(["evaluate"], "give either --checkpoint", "--embeddings")
    refuses(
        ["evaluate", "--embeddings", str(runs / "pre" / "log.csv")], "log.csv: cannot be read as safetensors"
    )
    if not torch.cuda.is_available():
        refuses(evaluate("--device=cuda"), "sees no CUDA device", "--device cpu")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--preset=papper", "preset 'papper' is unknown"),
        ("--seed=-1", "seed is -1"),
        ("--pretrain.lr=-0.1", "pretrain.lr is -0.1; it must be positive"),
        ("--pretrain.epochs=0", "pretrain.epochs is 0; it must be at least 1"),
        ("--encoder.dropout=1", "encoder.dropout is 1.0"),
        ("--data.std 1 0 1", "data.std is 0.0"),
        ("--encoder.widths 4 4 4", "encoder.widths has 3 numbers"),
        ("--device=meta", "device 'meta'"),
    ],
)
def test_settings_out_of_range_are_named(
    more: str, says: str, data: Path, tmp_path: Path, refuses: Refuses
) -> None:
    arguments = [
        "pretrain",
        "--output",
        str(tmp_path / "run"),
        f"--data.source={data}",
        *NETWORK,
        *more.split(),
    ]
    refuses(arguments, says)
    assert not (tmp_path / "run").exists()


def test_a_demo_with_a_bad_seed_or_device_leaves_nothing(tmp_path: Path, refuses: Refuses) -> None:
    refuses(["demo", "--output", str(tmp_path / "demo"), "--seed=-1"], "seed is -1")
    assert not (tmp_path / "demo").exists()


def test_a_loss_that_is_not_finite_says_what_to_try(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "--output", str(tmp_path), f"--data.source={data}", *NETWORK, *PRETRAIN]
    assert main([*arguments, "--pretrain.optimizer=sgd", "--pretrain.lr=1e30"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mtl-fast")]
    assert "finite" in line or "loss became" in line
    assert "--pretrain.lr (now 1e+30)" in line
    assert not (tmp_path / "model.safetensors").exists()


def test_an_option_that_does_not_exist_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["pretrain", "--output", "x", "--epochs=3"], ["embed"], ["fly"], []):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["demo", "pretrain", "meta-train", "evaluate", "embed", "results", "ablation"]
)
def test_help_names_every_option_with_its_meaning(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--output" in text
    assert "--device" in text
    for option, meaning in {
        "pretrain": ("--pretrain.batch-size INT", "Images an update"),
        "meta-train": ("--meta.hard {none,resample,reuse}", "Hard-task meta-batch"),
        "evaluate": ("--n-shot {None}|INT", "Support images a class"),
        "embed": ("--mirror", "Embed the mirror images as well"),
        "demo": ("--resume", "Go on where a demo"),
        "results": ("--seeds", "seed"),
        "ablation": ("--plan", "--data.source STR", "Only print the runs that are missing"),
    }.items():
        if option == command:
            assert all(part in text for part in meaning), text


def test_defaults_are_those_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    for preset, epochs in (("paper", "100"), ("glyphs-quick", "1")):
        with pytest.raises(SystemExit):
            main(["pretrain", "--preset", preset, "--help"])
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"Passes over the training images. (default: {epochs})" in text


def test_help_is_quick_and_needs_no_torch() -> None:
    """Processor time, which a busy machine does not lengthen."""
    code = (
        "import sys\nfrom mtl_fast.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as done:\n    print(done.code, 'torch' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "0 False", done.stdout + done.stderr
    assert "mtl-fast demo" in done.stdout
    assert after.ru_utime - before.ru_utime < 3


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = [sys.executable, "-m", "mtl_fast", "meta-train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141
