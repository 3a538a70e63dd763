"""The cache of decoded splits: fresh, stale, damaged, in nobody's way, and shared by runs beside each other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

import mtl_fast.data.class_folders as class_folders
from mtl_fast.data import cache, load_split
from mtl_fast.data.dataset import Content
from mtl_fast.data.reading import tell
from tests.data.cases import picture, pictures, two_classes, write

ROOT = Path(__file__).resolve().parents[2]
CONTENT = Content(pictures(3, 4), np.array([1, 0, 1], np.int64), ("ä", "b"), ("x", "x"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTL_FAST_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return two_classes(tmp_path / "birds")


@pytest.fixture
def n_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often class folders were decoded."""
    calls = []
    original = class_folders.ClassFolders.read

    def read(*arguments: object) -> Content:
        calls.append(arguments)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(class_folders.ClassFolders, "read", read)
    return lambda: len(calls)


def assert_same(a: Content, b: Content) -> None:
    assert np.array_equal(a.images, b.images)
    assert np.array_equal(a.labels, b.labels)
    assert a[2:] == b[2:]


def test_what_is_saved_is_loaded(folder: Path) -> None:
    path = folder / "x.safetensors"
    assert cache.load(path, "f") is None
    assert cache.save(path, "f", CONTENT) is None
    found = cache.load(path, "f")
    assert found is not None
    assert_same(found, CONTENT)
    assert cache.load(path, "other") is None
    assert list(folder.iterdir()) == [path]
    # The file is one that anyone's safetensors reads.
    with safetensors.safe_open(path, "np") as file:
        assert np.array_equal(file.get_tensor("images"), CONTENT.images)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_images_are_mapped_and_the_file_is_safe_from_writes(folder: Path) -> None:
    path = folder / "x.safetensors"
    large = CONTENT._replace(images=pictures(3, 2000))
    cache.save(path, "f", large)
    before = path.read_bytes()
    found = cache.load(path, "f")
    assert found is not None
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()
    found.images[:] = 0
    assert path.read_bytes() == before
    # A newer file under the same name does not change what is mapped.
    cache.save(path, "f", CONTENT)
    assert found.images.shape == (3, 2000, 2000, 3)
    assert found.images.sum() == 0


def test_wherever_a_cache_is_cut_or_changed_it_is_not_loaded(folder: Path) -> None:
    path = folder / "x.safetensors"
    cache.save(path, "f", CONTENT)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert cache.load(path, "f") is None
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = cache.load(path, "f")
        if found is not None:  # a blank of the header's padding, say: nothing that matters changed
            assert_same(found, CONTENT)


def test_images_are_decoded_once(
    folder: Path, root: Path, n_read: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_split(root, "train")
    again = load_split(root, "train")
    assert n_read() == 1
    assert torch.equal(first.images, again.images)
    assert first.class_names == again.class_names
    load_split(os.path.relpath(root), "train")
    load_split(root / ".." / root.name, "train")
    monkeypatch.chdir(root)
    load_split(".", "train")
    assert n_read() == 1
    load_split(root, "test")
    load_split(root, "train", 4)
    load_split(root, "train", 5)
    assert n_read() == 4
    load_split(root, "train", 4)
    assert n_read() == 4
    assert len(list(folder.iterdir())) == 4
    assert {name.split("-")[0] for name in os.listdir(folder)} == {"birds"}


def changed_content(root: Path) -> None:
    path = root / "train/a/x.PNG"
    status = path.stat()
    write(path, picture(seed=9))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "n_images"),
    [
        (changed_content, 4),
        (lambda root: write(root / "train/a/z.png", picture(seed=9)), 5),
        (lambda root: (root / "train/a/x.PNG").unlink(), 3),
        (lambda root: (root / "train/a").rename(root / "train/c"), 4),
    ],
    ids=["changed", "added", "removed", "renamed"],
)
def test_a_stale_cache_is_replaced(
    folder: Path, root: Path, n_read: Callable[[], int], change: Callable[[Path], object], n_images: int
) -> None:
    load_split(root, "train")
    change(root)
    store = load_split(root, "train")
    assert (n_read(), store.n_images) == (2, n_images)
    assert store.class_names == (("b", "c") if (root / "train/c").exists() else ("a", "b"))
    load_split(root, "train")
    assert n_read() == 2
    assert len(list(folder.iterdir())) == 1


def test_a_folder_with_a_long_name_in_any_script_has_a_cache(folder: Path, tmp_path: Path) -> None:
    root = two_classes(tmp_path / (63 * "𠀀"))
    load_split(root, "train")
    (path,) = folder.iterdir()
    assert path.name.startswith(15 * "𠀀" + "-train-")


def test_another_version_of_the_reader_reads_anew(
    folder: Path, root: Path, n_read: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_split(root, "train")
    monkeypatch.setattr(class_folders.ClassFolders, "version", class_folders.ClassFolders.version + 1)
    load_split(root, "train")
    assert n_read() == 2


@pytest.mark.parametrize("damage", [b"", b"nonsense", None], ids=["empty", "nonsense", "cut"])
def test_a_damaged_cache_is_replaced(
    folder: Path, root: Path, n_read: Callable[[], int], damage: bytes | None
) -> None:
    expected = load_split(root, "train").images
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.unlink()  # the old file stays mapped: shortening it would end the process
    path.write_bytes(whole[:-1] if damage is None else damage)
    assert torch.equal(load_split(root, "train").images, expected)
    assert n_read() == 2
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_said_once_and_does_no_harm(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As root no folder is read-only; a file in its place is as good."""
    monkeypatch.setenv("MTL_FAST_CACHE_DIR", str(write(tmp_path / "file", b"mine") / "cache"))
    tell.cache_clear()
    for _ in range(2):
        assert load_split(root, "train").n_images == 4
    assert capsys.readouterr().err == (
        f"images are decoded anew by each run: {tmp_path / 'file' / 'cache'} cannot hold them (Not a directory); "
        "MTL_FAST_CACHE_DIR names another folder\n"
    )
    assert (tmp_path / "file").read_bytes() == b"mine"


FULL = """
import resource, sys
from mtl_fast.data import load_split
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
print(load_split(sys.argv[1], "train").images.sum().item())
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_is_said_and_leaves_nothing(folder: Path, root: Path) -> None:
    """A limit on the size of files fails a write in its middle, as a full disk does."""
    out, err = python(FULL, str(root)).communicate(timeout=100)
    assert int(out) == int(load_split(root, "train").images.sum())
    assert err.startswith(f"images are decoded anew by each run: {folder} cannot hold them (")
    assert err.count("\n") == 1
    assert len(list(folder.iterdir())) == 1  # that of this process


def test_a_cache_cut_while_it_is_opened_is_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads the header from the file that was there first, and torch maps the one that is there now."""
    path = folder / "x.safetensors"
    assert cache.save(path, "f", CONTENT) is None
    original, mapped = torch.UntypedStorage.from_file, []

    def replaced(name: str, **options: object) -> torch.UntypedStorage:
        mapped.append(name)
        cut = path.with_suffix(".cut")
        cut.write_bytes(path.read_bytes()[:-1])
        cut.replace(path)
        return original(name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replaced)
    assert cache.load(path, "f") is None
    assert mapped == [str(path)]


BESIDE = """
import sys, time
from pathlib import Path
from mtl_fast.data import load_split
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
for i in range(20):
    images = load_split(sys.argv[1], "train", 5 + i % 2).images
    print(images.shape[0], images.int().sum().item())
    if i % 5 == 4:
        for path in Path(sys.argv[4]).glob("*.safetensors"):
            damaged = path.with_name(f"{path.name}.{sys.argv[2][-1]}")
            damaged.write_bytes(path.read_bytes()[:-1])
            damaged.replace(path)
"""


def test_two_runs_beside_each_other_get_the_same_images(folder: Path, root: Path, tmp_path: Path) -> None:
    """Both decode, write and damage the same files at once."""
    expected = [f"4 {load_split(root, 'train', size).images.int().sum().item()}" for size in (5, 6)]
    for path in folder.iterdir():
        path.unlink()
    go, ready = tmp_path / "go", [tmp_path / "ready0", tmp_path / "ready1"]
    runs = [python(BESIDE, str(root), str(path), str(go), str(folder)) for path in ready]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in ready) and time.monotonic() < deadline:
        time.sleep(0.01)
    go.touch()
    for run in runs:
        out, err = run.communicate(timeout=60)
        assert err == ""
        assert out.splitlines() == expected * 10
    assert not [path for path in folder.iterdir() if path.suffix != ".safetensors"]


def test_what_a_killed_run_left_is_removed_when_it_is_old(folder: Path) -> None:
    path = folder / "x.safetensors"
    old, young, other = (
        folder / f".{name}.partial" for name in ("x.safetensors.1", "x.safetensors.2", "y.1")
    )
    for file in (old, young, other):
        write(file, b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    cache.save(path, "f", CONTENT)
    assert {file.name for file in folder.iterdir()} == {path.name, young.name, other.name}


def test_the_folder_is_the_users_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MTL_FAST_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "mtl_fast/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache/mtl_fast/data"
