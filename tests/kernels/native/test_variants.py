"""Every vector width: the AVX2 library runs the operators' own tests, and a build that is killed leaves no library."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtl_fast.kernels.native import build

ROOT = Path(__file__).resolve().parents[3]
KILLED_BUILD = """
import pathlib, sys
from mtl_fast.kernels.native import build
build.build(pathlib.Path(sys.argv[1]), build.runnable_variants()[:1])
"""


def environment(**ours: str) -> dict[str, str]:
    """The environment with these variables, and without the caller's MTL_FAST_ ones."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MTL_FAST_")} | ours


@pytest.fixture(scope="module", autouse=True)
def _can_build() -> None:
    try:
        build.Tools.found()
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    if not build.runnable_variants():
        pytest.skip(f"no variant for {build.processor()}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is of x86-64 processors")
def test_kernels_are_right_on_avx2() -> None:
    """Torch is told that this processor has no more; the widest library is then the AVX2 one."""
    _, avx2 = build.VARIANTS["x86_64"]
    folder = build.user_folder()  # kept there, so that the next session need not compile it again
    (library,) = build.build(folder, [avx2])
    variables = environment(ATEN_CPU_CAPABILITY="avx2", MTL_FAST_BUILD_DIR=str(folder))
    code = "from mtl_fast.kernels import native; print(native.load()[1])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert loaded.stdout == f"native kernels, {library.name}\n", loaded.stderr
    tests = [f"tests/ops/test_{name}_native.py" for name in ("ss_conv", "ss_block", "base_learner")]
    options = ["-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "primes or form"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout


def test_a_killed_build_leaves_no_library_and_no_lock(tmp_path: Path) -> None:
    started, stays, built = tmp_path / "started", tmp_path / "stays", tmp_path / "built"
    stays.touch()
    slow = tmp_path / "slow++"
    waits = f"touch {started}; while [ -e {stays} ]; do sleep 0.1; done"
    slow.write_text(f'#!/bin/sh\ncase "$*" in --version) ;; *) {waits} ;; esac\n')
    slow.chmod(0o755)
    command = [sys.executable, "-c", KILLED_BUILD, str(built)]
    # A group of processes of its own: ninja dies with it, and its compilers are left behind, writing.
    builder = subprocess.Popen(command, cwd=ROOT, env=environment(CXX=str(slow)), start_new_session=True)
    while not started.exists():
        assert builder.poll() is None
        time.sleep(0.02)
    os.killpg(builder.pid, signal.SIGKILL)
    assert builder.wait(timeout=60) == -signal.SIGKILL
    assert not list(built.glob("*.so"))
    with build._locked(built / ".lock"):  # would wait for ever
        stays.unlink()
