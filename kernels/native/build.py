"""Builds the native kernels: one function for `setup.py` and `mtl-fast build`.

A library is built once a vector width, from all `*.cpp` beside this file, with ninja. Its name holds a hash of
sources, flags and torch's version, so that a library of other sources or of another torch is never loaded. The
choice between widths is made when a library is loaded, by what the processor has.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE_FOLDER = Path(__file__).resolve().parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    # One source serves every width through vector types; contraction turns a * b + c into one instruction.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    # torch's headers are written for a newer standard and warn; ours do not.
    "-Wall",
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")


class BuildError(RuntimeError):
    """The kernels cannot be built; the message says why and what helps."""


@dataclass(frozen=True)
class Variant:
    """A vector width.

    Attributes:
        name: part of the library's name.
        flags: what the compiler is told beyond `FLAGS`.
        capabilities: of `torch.backends.cpu.get_cpu_capability()`, on which it runs.
    """

    name: str
    flags: tuple[str, ...]
    capabilities: tuple[str, ...]


# Widest first: a processor takes the first that it can run and that was built.
_X86 = (
    Variant(
        "avx512",
        ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
        ("AVX512",),
    ),
    Variant("avx2", ("-mavx2", "-mfma"), ("AVX512", "AVX2")),
)
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "x86_64": _X86,
    "AMD64": _X86,
    "aarch64": (Variant("neon", (), ("DEFAULT", "SVE256", "SVE128", "NEON")),),
    "arm64": (Variant("neon", (), ("DEFAULT", "SVE256", "SVE128", "NEON")),),
}


def runnable_variants() -> list[Variant]:
    """The variants that this processor runs, widest first."""
    capability = torch.backends.cpu.get_cpu_capability()
    return [v for v in VARIANTS.get(platform.machine(), ()) if capability in v.capabilities]


def user_folder() -> Path:
    """Where `mtl-fast build` puts libraries: ``MTL_FAST_BUILD_DIR``, or `mtl_fast` in the user's cache folder."""
    chosen = os.environ.get("MTL_FAST_BUILD_DIR")
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "mtl_fast"


def library_name(variant: Variant, *, sanitize: bool = False) -> str:
    """The file name of a variant built from the present sources for the present torch."""
    digest = hashlib.sha256(repr((torch.__version__, _flags(variant, sanitize))).encode())
    for path in sorted([*SOURCE_FOLDER.glob("*.cpp"), *SOURCE_FOLDER.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return f"libmtl_fast_{variant.name}{'_sanitized' if sanitize else ''}_{digest.hexdigest()[:16]}.so"


def build(folder: Path, variants: list[Variant], *, sanitize: bool = False, verbose: bool = False) -> list[Path]:
    """Compiles the variants into `folder`; what is there and up to date is kept.

    Args:
        folder: made if missing; safe for concurrent builds, a killed one leaves no half library.
        variants: of `runnable_variants()` or `VARIANTS`.
        sanitize: with address and undefined-behaviour sanitizers.
        verbose: show the compiler's commands.

    Returns:
        The libraries' paths, one a variant.

    Raises:
        BuildError: no compiler, no ninja, or an error of the compiler; the message ends with its output.
    """
    paths = [folder / library_name(variant, sanitize=sanitize) for variant in variants]
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        for variant, path in zip(variants, paths, strict=True):
            if not path.exists():
                _build_one(folder, variant, path, sanitize, verbose)
    return paths


def compiler() -> str:
    """The C++ compiler's command: ``CXX``, or the first of c++, g++, clang++ on the path.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    looked = f"CXX={named!r} is not a program" if named else "none of c++, g++, clang++ is on the path"
    raise BuildError(f"no C++ compiler: {looked}; install one (Debian: g++) or go on with the torch backend")


def _flags(variant: Variant, sanitize: bool) -> tuple[str, ...]:
    return (*FLAGS, *variant.flags, *(SANITIZERS if sanitize else ()))


def _ninja() -> str:
    found = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise BuildError("ninja is not installed; `pip install ninja`")
    return found


def _build_one(folder: Path, variant: Variant, path: Path, sanitize: bool, verbose: bool) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = " ".join(f"-isystem {_escaped(p)}" for p in include_paths())
    libraries = library_paths()
    links = " ".join(f"-L{_escaped(p)}" for p in libraries)
    sources = sorted(SOURCE_FOLDER.glob("*.cpp"))
    # Objects of one build folder are rebuilt as their headers say; another torch or other flags get another folder.
    key = hashlib.sha256(repr((torch.__version__, _flags(variant, sanitize))).encode()).hexdigest()[:16]
    workplace = folder / f"objects-{variant.name}-{key}"
    workplace.mkdir(exist_ok=True)
    lines = [
        f"flags = {' '.join(_flags(variant, sanitize))} {includes}",
        "rule compile",
        f"  command = {compiler()} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # torch's OpenMP runtime is already loaded under the name that -fopenmp asks for: there is only one.
        f"  command = {compiler()} $flags -shared $in -o $out {links} -ltorch_cpu -lc10",
        *(f"build {source.stem}.o: compile {_escaped(str(source))}" for source in sources),
        f"build library.so: link {' '.join(f'{source.stem}.o' for source in sources)}",
        "default library.so",
    ]
    (workplace / "build.ninja").write_text("\n".join(lines) + "\n", "utf-8")
    result = subprocess.run(
        [_ninja(), "-C", str(workplace), *(["-v"] if verbose else [])], capture_output=not verbose, text=True
    )
    if result.returncode:
        output = "" if verbose else f":\n{result.stdout}{result.stderr}"
        raise BuildError(f"the compiler failed on the native kernels ({variant.name}){output}")
    # Written beside it first: whoever looks for the library finds all of it or nothing.
    handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    shutil.copyfile(workplace / "library.so", part)
    os.chmod(part, 0o755)
    os.replace(part, path)


def _escaped(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One build at a time in a folder, among processes; the lock goes with the process."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
