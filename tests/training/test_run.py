"""A run's folder, Ctrl-C, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtl_fast.errors import InputError
from mtl_fast.kernels import native
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE
from mtl_fast.training import checkpoint, run
from mtl_fast.training.run import (
    Interrupted,
    RunFolder,
    check_settings,
    make_folder,
    prefixed,
    read_settings,
    stop_on_ctrl_c,
    tell_of_missing_kernels,
    write_text,
)
from tests.training import tiny
from tests.training.forks import Forks
from tests.training.tiny import CONFIG

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def alone(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of each phase that was left alone."""
    root = tmp_path_factory.mktemp("alone")
    done = [
        forks.run("pretrain", root / "pretrain"),
        forks.run("meta-train", root / "resample", pretrained=root / "pretrain"),
        forks.run("meta-train", root / "reuse", pretrained=root / "pretrain", hard="reuse"),
    ]
    assert done == [0, 0, 0], [path.read_text() for path in sorted(root.glob("*.stderr"))]
    return root


@pytest.mark.parametrize(
    "point",
    [
        "update 14",  # in the middle of an epoch
        "write 2 checkpoint.safetensors",  # half of a checkpoint is on disk, its row is in the log
        "renamed 3 checkpoint.safetensors",  # the last checkpoint is there, the model file is not
        "rename 1 model.safetensors",  # the model file is whole and not in place
    ],
)
def test_pretraining_killed_and_resumed_gives_the_bits_of_one_left_alone(
    point: str, forks: Forks, alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert forks.run("pretrain", folder, die=point) == KILLED, (tmp_path / "run.stderr").read_text()
    assert not (folder / "model.safetensors").exists()
    assert forks.run("pretrain", folder, resume="yes") == 0, (tmp_path / "run.stderr").read_text()
    tiny.assert_same_run(folder, alone / "pretrain")


@pytest.mark.parametrize(
    ("point", "hard"),
    [
        ("update 6", "resample"),  # in the middle of a round, the pool filled after the last checkpoint
        ("update 7", "reuse"),
        ("rename 2 checkpoint.safetensors", "reuse"),  # a checkpoint is whole and not in place
        ("write 2 checkpoint.safetensors", "resample"),
        ("renamed 1 checkpoint.safetensors", "resample"),  # the first checkpoint, in the middle of a round
        ("write 1 model.safetensors", "resample"),
    ],
)
def test_meta_training_killed_and_resumed_gives_the_bits_of_one_left_alone(
    point: str, hard: str, forks: Forks, alone: Path, tmp_path: Path
) -> None:
    folder, arguments = tmp_path / "run", {"pretrained": alone / "pretrain", "hard": hard}
    assert forks.run("meta-train", folder, die=point, **arguments) == KILLED
    assert not (folder / "model.safetensors").exists()
    assert forks.run("meta-train", folder, resume="yes", **arguments) == 0, folder.with_suffix(
        ".stderr"
    ).read_text()
    tiny.assert_same_run(folder, alone / hard)


def test_hard_task_modes_differ(alone: Path) -> None:
    """By what was trained last: the best on validation may be the network that both began with."""
    last = [
        {
            name: t
            for name, t in checkpoint.load(alone / mode / "checkpoint.safetensors")[0].items()
            if name.startswith("current.")
        }
        for mode in ("resample", "reuse")
    ]
    assert last[0]
    assert not tiny.same_tensors(*last)


def test_a_demo_killed_in_its_evaluation_gives_the_table_of_one_left_alone(
    forks: Forks, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert forks.run("demo", whole) == 0, (tmp_path / "whole.stderr").read_text()
    # Of the third test's two files the first is written, the second is not.
    assert forks.run("demo", cut, die="renamed 3 evaluation.safetensors") == KILLED
    assert forks.run("demo", cut, resume="yes") == 0, (tmp_path / "cut.stderr").read_text()
    tables = [(tmp_path / f"{name}.table").read_text() for name in ("whole", "cut")]
    assert tables[0] == tables[1]
    tests = sorted((whole / "test").glob("*/evaluation.safetensors"))
    assert len(tests) == 8
    for file in tests:
        other = cut / file.relative_to(whole)
        assert tiny.same_tensors(checkpoint.load(file)[0], checkpoint.load(other)[0])


def test_the_first_ctrl_c_asks_and_the_second_ends() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_ctrl_c() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_leaves_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with stop_on_ctrl_c() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def saved_run(folder: Path) -> RunFolder:
    run = RunFolder(folder, CONFIG, resume=False, inputs={"train": {"images": 168}})
    run.save(prefixed(loop={"x": torch.ones(2)}), {"phase": "pretrain"})
    return run


def test_a_run_comes_back_with_its_tensors_and_facts(tmp_path: Path) -> None:
    saved_run(tmp_path)
    again = RunFolder(tmp_path, CONFIG, resume=True, inputs={"train": {"images": 168}})
    assert again.resumed
    assert again.meta["phase"] == "pretrain"
    assert torch.equal(again.section("loop")["x"], torch.ones(2))
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(CONFIG.to_json())
    assert not RunFolder(tmp_path / "new", CONFIG, resume=True).resumed


def test_the_device_is_no_setting_of_a_run(tmp_path: Path) -> None:
    saved_run(tmp_path)
    RunFolder(tmp_path, replace(CONFIG, device="auto"), resume=True, inputs={"train": {"images": 168}})


@pytest.mark.parametrize(
    ("changed", "inputs", "resume", "says"),
    [
        (CONFIG, 168, False, ["holds a run already (checkpoint.safetensors)", "--resume", "--output"]),
        (replace(CONFIG, seed=3), 168, True, ["other settings (seed is 0 there and 3 here)", "--output"]),
        (
            tiny.with_meta(lr=0.25),
            168,
            True,
            ["other settings (meta.lr is 0.001 there and 0.25 here)", "--output"],
        ),
        (CONFIG, 169, True, ["other data", "train.images is 168 there and 169 here", "--output"]),
    ],
)
def test_a_run_that_cannot_go_on_says_why_and_stays(
    changed: object, inputs: int, resume: bool, says: list[str], tmp_path: Path
) -> None:
    saved_run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        RunFolder(tmp_path, changed, resume=resume, inputs={"train": {"images": inputs}})  # type: ignore[arg-type]
    assert all(text in str(caught.value) for text in [str(tmp_path), *says]), caught.value
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_without_its_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model.safetensors", {}, {})
    for resume, says in ((False, "holds a run already"), (True, "no checkpoint.safetensors to go on from")):
        with pytest.raises(InputError, match=says):
            RunFolder(tmp_path, CONFIG, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_interrupted_run_says_where_it_is_and_how_to_go_on(tmp_path: Path) -> None:
    stopped = saved_run(tmp_path).interrupted("after update 7 of 9")
    assert isinstance(stopped, Interrupted)
    assert all(text in str(stopped) for text in ("after update 7 of 9", str(tmp_path), "--resume"))


def test_folders_and_texts_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(InputError, match=r"cannot make this folder \(.+\); give another --output"):
            make_folder(path)
        with pytest.raises(InputError, match="cannot make this folder"):
            RunFolder(path, CONFIG, resume=False)
    with pytest.raises(InputError, match="cannot be written"):
        write_text(file / "config.json", "{}")
    assert file.read_text() == "mine"
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="taken: cannot be written"):
        write_text(tmp_path / "taken", "text")


def test_a_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "first, Θ")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "first, Θ"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_text(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "first, Θ"


def test_settings_on_disk_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_text(path, CONFIG.to_json())
    check_settings(path, read_settings(path), replace(CONFIG, device="cuda:1"))
    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        check_settings(path, read_settings(path), replace(CONFIG, seed=1))
    saved = read_settings(path)
    del saved["meta"]["hard_pool_size"], saved["evaluation"]  # as if written before there were such
    check_settings(path, saved | {"evaluation": {"n_tasks": CONFIG.evaluation.n_tasks}}, CONFIG)
    with pytest.raises(InputError, match=r"meta\.hard_pool_size is null there and 3 here"):
        check_settings(path, saved, replace(CONFIG, meta=replace(CONFIG.meta, hard_pool_size=3)))
    for strange, reason in (({"rate": 1}, "unknown setting 'rate'"), ({"meta": 3}, "does not know")):
        with pytest.raises(InputError, match=rf"config\.json: holds settings .*{reason}"):
            check_settings(path, saved | strange, CONFIG)
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"config\.json: cannot be read as settings"):
            read_settings(path)


def test_missing_kernels_are_told_once_and_only_where_a_build_would_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> list[str]:
        return capsys.readouterr().err.splitlines()

    def tell(backend: str, can: bool, n_variants: int) -> list[str]:
        tell_of_missing_kernels.cache_clear()
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        monkeypatch.setattr(native, "load", lambda: (can, "not built; run `mtl-fast build`"))
        monkeypatch.setattr(run, "runnable_variants", lambda: [None] * n_variants)
        tell_of_missing_kernels()
        return told()

    line = ["running on the torch backend: not built; run `mtl-fast build`"]
    assert tell("auto", False, 1) == tell("", False, 1) == line
    tell_of_missing_kernels()
    assert told() == []
    assert tell("torch", False, 1) == tell("auto", True, 1) == tell("auto", False, 0) == []
    tell_of_missing_kernels.cache_clear()
