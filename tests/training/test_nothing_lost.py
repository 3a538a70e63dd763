"""What may befall a run beside a kill: a full disk, one that is read-only, a clock set back, files of a newer version.

Each command ends with one line, nothing that was whole is lost, and the same command with --resume gives what a run left
alone gives. (Kills are in `test_run.py`, `test_scoring.py` and `test_soak.py`, other runs in `test_folder_lock.py`.)
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtl_fast import files
from mtl_fast.cli import main
from mtl_fast.data import cache, load_split
from mtl_fast.training import checkpoint
from mtl_fast.training.parts import Parts, Shard
from mtl_fast.training.run import Interrupted
from tests.full_disk import files_of
from tests.training import tiny
from tests.training.soak import same_files

NORMALISED = ["--data.mean", *["127.5"] * 3, "--data.std", *["64"] * 3]
NETWORK = ["--encoder.widths", *["4"] * 4, "--encoder.dropout=0"]
PRETRAIN = ["--pretrain.epochs=2", "--pretrain.batch-size=34", "--pretrain.validation-tasks=4"]
META = [
    "--meta.n-tasks=6",
    "--meta.random-tasks-per-round=4",
    "--meta.hard-tasks-per-round=2",
    "--meta.validate-every=4",
    "--meta.validation-tasks=4",
    "--inner.train-steps=3",
    "--inner.test-steps=5",
    "--episodes.n-query=6",
]
# Command → its arguments, and whether it goes on with --resume.
COMMANDS = {
    "pretrain": (
        ["pretrain", "--data.source={data}", *NORMALISED, *NETWORK, *PRETRAIN, "--output={out}"],
        True,
    ),
    "meta-train": (
        [
            "meta-train",
            "--pretrained={root}/pre",
            "--data.source={data}",
            *NORMALISED,
            *META,
            "--output={out}",
        ],
        True,
    ),
    "evaluate": (
        ["evaluate", "--checkpoint={root}/pre", "--evaluation.n-tasks=110", "--by-step", "--output={out}"],
        True,
    ),
    "embed": (["embed", "--checkpoint={root}/pre", "--output={out}/features.safetensors"], False),
    "export": (["export", "{root}/pre", "--format=state-dict", "--output={out}/model.pt"], False),
    "predict": (
        ["predict", "{data}/train", "{data}/test/test0", "--checkpoint={root}/pre", "--output={out}"],
        False,
    ),
    "data": (["data", "info", "{data}", "--output={out}"], False),
}
NAMES = list(COMMANDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a pre-trained model, and in `alone` what each command gives."""
    root = tmp_path_factory.mktemp("root")
    tiny.write_class_folders(root / "data", n_images=17)
    assert main(arguments("pretrain", root, root / "pre")) == 0
    for name in NAMES:
        (root / "alone" / name).mkdir(parents=True)
        assert main(arguments(name, root, root / "alone" / name)) == 0
    return root


def arguments(name: str, root: Path, out: Path, *, resume: bool = False) -> list[str]:
    parts, resumes = COMMANDS[name]
    device = [] if name in ("export", "data") else ["--device=cpu"]
    more = ["--resume"] if resume and resumes else []
    return [part.format(root=root, data=root / "data", out=out) for part in parts] + device + more


Fails = Callable[[list[str]], str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """A command that fails with status 2 and one line, after what it told of its way; the line."""

    def check(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        *_, last = err.splitlines()
        assert last.startswith("mtl-fast: error: ")
        return last

    return check


def goes_on(name: str, root: Path, out: Path) -> None:
    """The command, given again, gives what one left alone does."""
    assert main(arguments(name, root, out, resume=True)) == 0
    same_files(out, root / "alone" / name)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.999])
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_line_and_nothing_is_lost(
    name: str, share: float, root: Path, tmp_path: Path, fails: Fails
) -> None:
    """Full at this share of the largest file."""
    alone = root / "alone" / name
    largest = max(path.stat().st_size for path in alone.rglob("*") if path.is_file())
    with files_of(int(share * largest)):
        said = fails(arguments(name, root, tmp_path))
    assert "File too large" in said
    assert str(tmp_path) in said
    assert list(tmp_path.rglob("*.partial")) == []
    for path in tmp_path.rglob("*.safetensors"):
        checkpoint.load(path)  # whole
    goes_on(name, root, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["doctor", "--no-self-test"], ["evaluate", "--help"]], ids="-".join)
def test_an_output_that_is_full_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mtl_fast", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == (
        "mtl-fast: error: the output: cannot be written (No space left on device); free some space\n"
    )
    assert done.returncode == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_disk_is_one_line(
    name: str, root: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", read_only, raising=False)
        for out in (tmp_path, tmp_path / "new"):
            if out.name == "new":
                patch.setattr(os, "mkdir", read_only)
            said = fails(arguments(name, root, out))
            assert "Read-only file system" in said
            assert str(out) in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    goes_on(name, root, tmp_path)


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_set_back_changes_no_bit(
    years: int, pretrained: Path, meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of the run so far are of another year than the clock, which runs backwards."""
    run = tiny.meta_training(tmp_path, pretrained)
    tiny.at_update(run, 5, tiny.ctrl_c)
    with pytest.raises(Interrupted):
        run.run()
    then = time.time() + years * 365 * 86400
    for path in tmp_path.rglob("*"):
        os.utime(path, (then, then))
    ticks = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    tiny.meta_training(tmp_path, pretrained, resume=True).run()
    tiny.assert_same_run(tmp_path, meta_trained)


def test_images_replaced_after_the_clock_was_set_back_are_decoded_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    data = tiny.write_class_folders(tmp_path / "data", n_images=3)
    before = load_split(data, "train")
    (kept,) = (tmp_path / "cache").glob("*.safetensors")
    file = next((data / "train").rglob("*.png"))
    file.write_bytes(next((data / "test").rglob("*.png")).read_bytes())
    past = time.time() - 86400  # older than the cache, and than the file that it replaces
    os.utime(file, (past, past))
    left = kept.with_name(f".{kept.name}.1.partial")  # of a run that was killed before the clock was set back
    left.write_bytes(b"half")
    os.utime(left, (past + 9 * 86400,) * 2)
    after = load_split(data, "train")
    assert not before.images.equal(after.images)
    assert [path.suffix for path in kept.parent.iterdir() if path != kept] == [".partial"]


@pytest.fixture
def newer(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as a newer version would write them: a run, a model, features and a piece of a test."""
    older = {name: checkpoint.load(root / "pre" / f"{name}.safetensors") for name in ("model", "checkpoint")}
    features, facts = checkpoint.load(root / "alone" / "embed" / "features.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
        for name in ("model", "checkpoint"):
            tensors, meta = older[name]
            checkpoint.save(tmp_path / "run" / f"{name}.safetensors", tensors, meta)
        checkpoint.save(tmp_path / "features.safetensors", features, facts)
        parts = Parts(tmp_path / "test" / "parts", {}, shard=Shard())
        parts.get("features-000000000", lambda: features)
    return tmp_path


def test_files_of_a_newer_version_are_one_line(newer: Path, root: Path, fails: Fails) -> None:
    run, out = newer / "run", newer / "out"
    for command in (
        ["evaluate", f"--checkpoint={run}"],
        ["evaluate", f"--embeddings={newer / 'features.safetensors'}"],
        [
            "predict",
            f"{root}/data/train",
            f"{root}/data/test/test0",
            f"--checkpoint={run}",
            f"--output={out}",
        ],
        ["embed", f"--checkpoint={run}", f"--output={out}/x"],
        ["export", str(run), "--format=torch", f"--output={out}/x"],
        ["meta-train", f"--pretrained={run}", f"--output={out}", f"--data.source={root}/data"],
        arguments("pretrain", root, run, resume=True),
        arguments("evaluate", root, newer / "test", resume=True),
    ):
        said = fails(command)
        n = checkpoint.VERSION
        assert f"has format {n + 1}, this mtl_fast reads up to {n}; update mtl_fast" in said, said


def test_a_setting_of_a_newer_version_is_named_with_the_file(
    root: Path, tmp_path: Path, fails: Fails
) -> None:
    tensors, meta = checkpoint.load(root / "pre" / "model.safetensors")
    meta["config"]["meta"]["temperature"] = 2.0
    meta["provenance"]["mtl_fast"] = "9.0"
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, tensors, meta)
    said = fails(["evaluate", f"--checkpoint={path}"])
    assert f"{path}: config.meta: unknown setting 'temperature'; known: " in said
    assert said.endswith("mtl_fast 9.0 wrote it, this is 0.1.0; update mtl_fast")
