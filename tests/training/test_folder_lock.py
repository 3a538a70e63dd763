"""One run at a time in a folder: others are refused with one line, a kill leaves nothing locked."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtl_fast.cli import main
from mtl_fast.errors import InputError
from mtl_fast.training import folder_lock
from mtl_fast.training.folder_lock import FolderLock
from tests.training import tiny
from tests.training.locks import another_process

pytestmark = pytest.mark.skipif(folder_lock.fcntl is None, reason="this system locks no folders")


def is_free(folder: Path) -> bool:
    """Whether another process could have it alone."""
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True).returncode == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.0)


@pytest.mark.parametrize(
    ("theirs", "shared", "can"),
    [("LOCK_EX", False, False), ("LOCK_EX", True, False), ("LOCK_SH", False, False), ("LOCK_SH", True, True)],
)
def test_who_can_be_in_a_folder_together(
    theirs: str, shared: bool, can: bool, tmp_path: Path, impatient: None
) -> None:
    with another_process(tmp_path, theirs), ExitStack() as stack:
        if not can:
            stack.enter_context(
                pytest.raises(InputError, match="another run is at work there; wait until it ends, or give")
            )
        with FolderLock(tmp_path, shared=shared):
            pass


def test_a_claim_lasts_until_its_last_release(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as outer:
        inner = FolderLock(tmp_path)
        inner.claim()
        assert not is_free(tmp_path)
        inner.release()
        inner.release()
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    with outer:
        assert not is_free(tmp_path)
    forgotten = FolderLock(tmp_path)
    assert not is_free(tmp_path)
    del forgotten
    assert is_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing_locked(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.kill()
        start = time.monotonic()
        FolderLock(tmp_path).release()
        assert time.monotonic() - start < folder_lock.PATIENCE


@pytest.mark.parametrize("missing", ["fcntl", "flock"])
def test_systems_without_such_locks_are_used_without(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with another_process(tmp_path):
        if missing == "fcntl":
            monkeypatch.setattr(folder_lock, "fcntl", None)
        else:
            monkeypatch.setattr(folder_lock.fcntl, "flock", unknown)
        FolderLock(tmp_path).release()
    FolderLock(tmp_path / "missing").release()
    FolderLock(None).release()


COMMANDS = {
    "pretrain": ["pretrain"],
    "meta-train": ["meta-train", "--pretrained", "{pretrained}", "--resume"],
    "evaluate": ["evaluate", "--checkpoint", "{pretrained}", "--device=cpu", "--data={data}"],
    "demo": ["demo", "--quick", "--device=cpu"],
    "results": ["results", "--device=cpu", "--publish={publish}"],
}


@pytest.fixture
def refused(tmp_path: Path, pretrained: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    data = tiny.write_class_folders(tmp_path / "data", n_images=17)

    def check(name: str, output: Path, *more: str) -> None:
        given = {"pretrained": pretrained, "data": data, "publish": tmp_path / "publish"}
        arguments = [part.format(**given) for part in COMMANDS[name]]
        if name in ("pretrain", "meta-train"):
            means = ["--data.mean", *["127.5"] * 3, "--data.std", *["64"] * 3]
            arguments += [f"--data.source={data}", "--device=cpu", *means]
        assert main([*arguments, f"--output={output}", *more]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.splitlines()[-1].startswith("mtl-fast: error: "), err
        assert "another run is at work there" in err
        assert "Traceback" not in err

    return check


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_refused_where_another_is_at_work(
    name: str, refused: Callable[..., None], tmp_path: Path, impatient: None
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    with another_process(output):
        refused(name, output)
    assert list(output.iterdir()) == []


def test_shards_share_a_folder_and_have_their_own(
    pretrained: Path, refused: Callable[..., None], tmp_path: Path, impatient: None
) -> None:
    output = tmp_path / "output"
    (output / "parts" / "1-of-2").mkdir(parents=True)
    with another_process(output, "LOCK_SH"), another_process(output / "parts" / "1-of-2"):
        refused("evaluate", output, "--shard=1/2")
        refused("evaluate", output, "--resume")
        arguments = [
            "evaluate",
            "--checkpoint",
            str(pretrained),
            f"--data={tmp_path / 'data'}",
            "--device=cpu",
        ]
        assert main([*arguments, f"--output={output}", "--shard=2/2", "--evaluation.n-tasks=200"]) == 0
    assert list((output / "parts" / "2-of-2").iterdir())


def test_a_run_gives_its_folder_back(pretrained: Path, tmp_path: Path) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    assert not is_free(tmp_path)
    seen = []
    tiny.at_update(run, 3, lambda: seen.append(is_free(tmp_path)))
    run.run()
    assert seen == [False]
    assert is_free(tmp_path)


def test_a_finished_folder_is_waited_for(tmp_path: Path, impatient: None) -> None:
    """The workers of a study read one pre-training in turn, and there may be many."""
    with another_process(tmp_path) as process:
        threading.Timer(0.3, process.kill).start()
        with pytest.raises(InputError, match="another run is at work there"):
            FolderLock(tmp_path)
        with FolderLock(tmp_path, finished=True):
            assert process.wait(10) != 0
