"""The examples run from a bare checkout, say what they promise to say, and refuse what they cannot read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import tiny

pytestmark = pytest.mark.timeout(300)  # seconds each on a machine left alone

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PERCENT = r"\d+\.\d %"
SAYS: dict[str, tuple[str, ...]] = {
    "three_ways": (
        r"learn2learn: ",
        r"easyfsl: ",
        r"learn2learn's way  loss (\d\.\d{4}) → \d\.\d{4} .*\n  mtl_fast           loss \1 → ",
        rf"learn2learn's way, head fitted +({PERCENT}) .*\n  mtl_fast, head fitted +\1 ",
        rf"easyfsl's way, prototypes +({PERCENT}) .*\n  mtl_fast, prototypes +\1 ",
        r"head fitted: (99|100)\.\d % of the predictions are the same",
        r"prototypes: (99|100)\.\d % of the predictions are the same",
    ),
    "converted_network": (
        r"converted: 10 convolutions, \d+ scales and shifts over \d+ frozen",
        r"the accuracy of each of 20 tasks is the same at the start",
        r"meta-trained for 1 s: [1-9]\d* tasks",
        rf"before  \d+\.\d ± {PERCENT}\n  after   \d+\.\d ± {PERCENT}\n  paired  -?\d+\.\d ± {PERCENT}",
        r"folded into 10 plain nn\.Conv2d: largest relative difference of a feature \de[-+]\d\d",
    ),
    "own_data": (
        r"ImageStore\(training tiles: 240 images 32x32, 12 classes of 20\.\.20, cpu\)",
        rf"5-way 1-shot on 20 tasks of the test classes: {PERCENT}",
        rf"12 classes, three images each: {PERCENT} of 204 others named",
        r"tile 00 +called tile \d\d +\(\d+ % sure\)",
    ),
}


def run(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_every_example_is_run_here() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert scripts == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_says_what_it_promises(name: str, tmp_path: Path) -> None:
    done = run(name, "--quick", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for pattern in SAYS[name]:
        assert re.search(pattern, done.stdout), f"{pattern}\n{done.stdout}"
    assert not list(tmp_path.iterdir())


def test_one_s_own_folder(tmp_path: Path) -> None:
    folder = tiny.write_class_folders(tmp_path / "birds", n_classes=5, n_images=6)
    done = run("own_data", "--quick", "--folder", str(folder), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "birds/train: 30 images 32x32, 5 classes of 6..6, cpu)" in done.stdout
    assert "5 classes, three images each:" in done.stdout
