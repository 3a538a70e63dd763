"""Builds the native kernels: one function for `setup.py` and `mtl-fast build`, which also use this file by itself.

All `*.cpp` beside this file become one library a vector width, by ninja. A library's name holds a key of sources,
flags and torch's version, so that a stale one is never found; which width is loaded is decided when it is.
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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE_FOLDER = Path(__file__).resolve().parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    # Nothing outside calls in: functions of the headers are called directly, not through a table.
    "-fvisibility-inlines-hidden",
    "-fopenmp",
    # One source serves every width through vector types; contraction turns a * b + c into one instruction.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Products are loops of a dozen instructions: where one begins decided over five hundredths of a convolution.
    "-falign-loops=64",
    "-Wall",
)
# Undefined behaviour ends the process as a bad address does: a test cannot pass over it.
SANITIZERS = (
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)
# Of each variant, so that a folder that many checkouts and environments share does not grow for ever.
LIBRARIES_KEPT = 8


class BuildError(RuntimeError):
    """The kernels cannot be built; the message says why and what helps."""


class NoCompilerError(BuildError):
    """This machine has not what it takes to build them; everything still runs on the torch backend."""


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


# By machine, widest first: a processor takes the first that it can run and that was built.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "x86_64": (
        Variant(
            "avx512",
            ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
            ("AVX512",),
        ),
        Variant("avx2", ("-mavx2", "-mfma"), ("AVX512", "AVX2")),
    ),
    "aarch64": (Variant("neon", (), ("DEFAULT", "SVE256", "SVE128", "NEON")),),
}


def runnable_variants() -> list[Variant]:
    """The variants that this processor runs, widest first."""
    capability = torch.backends.cpu.get_cpu_capability()
    return [v for v in VARIANTS.get(platform.machine(), ()) if capability in v.capabilities]


def processor() -> str:
    """The machine and what torch says of its vectors, for messages."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def user_folder() -> Path:
    """Where `mtl-fast build` puts libraries: ``MTL_FAST_BUILD_DIR``, or `mtl_fast` in the user's cache folder."""
    chosen = os.environ.get("MTL_FAST_BUILD_DIR")
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "mtl_fast"


def library_prefix(variant: Variant, *, sanitize: bool = False) -> str:
    """How the name of a variant's library begins when it is of the present sources, flags and torch."""
    digest = hashlib.sha256(repr((torch.__version__, _flags(variant, sanitize))).encode())
    for path in sorted([*SOURCE_FOLDER.glob("*.cpp"), *SOURCE_FOLDER.glob("*.h")]):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return f"{_variant_prefix(variant, sanitize)}{digest.hexdigest()[:16]}-"


def find(folder: Path, variant: Variant) -> Path | None:
    """The variant's library for the present sources, flags and torch; of several compilers' the one built last."""
    found = list(folder.glob(f"{library_prefix(variant)}*.so"))
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def build(
    folder: Path,
    variants: Sequence[Variant],
    *,
    objects: Path | None = None,
    sanitize: bool = False,
    verbose: bool = False,
) -> list[Path]:
    """Compiles the variants into `folder`; what is there and up to date is kept.

    Builds of several processes wait for each other, and a killed one leaves no half library: a library is
    renamed to its name when it is whole.

    Args:
        folder: made if missing.
        variants: of `runnable_variants()` or `VARIANTS`.
        objects: folder of the compiler's intermediate files, by default `folder`.
        sanitize: with the address and undefined-behaviour sanitizers.
        verbose: show the compiler's commands.

    Returns:
        The libraries' paths, one a variant.

    Raises:
        NoCompilerError: another system than Linux, no compiler, no ninja.
        BuildError: an error of the compiler; the message ends with its output.
    """
    tools = Tools.found()
    objects = objects or folder
    for path in (folder, objects):
        path.mkdir(parents=True, exist_ok=True)
    with _locked(objects / ".lock"):
        return [_build_one(tools, folder, variant, objects, sanitize, verbose) for variant in variants]


def build_for_this_processor(*, sanitize: bool = False, verbose: bool = False) -> Path:
    """Compiles the widest variant that this processor runs into the user's folder, as `build` does.

    Raises:
        NoCompilerError: also where there are no kernels for the processor.
        BuildError: an error of the compiler, or a folder that cannot be written.
    """
    variants = runnable_variants()
    if not variants:
        raise NoCompilerError(f"there are no native kernels for this processor ({processor()})")
    folder = user_folder()
    try:
        (path,) = build(folder, variants[:1], sanitize=sanitize, verbose=verbose)
    except OSError as error:
        raise BuildError(
            f"cannot build in {folder}: {error}; MTL_FAST_BUILD_DIR names another folder"
        ) from error
    return path


@dataclass(frozen=True)
class Tools:
    """What a build runs.

    Attributes:
        compiler: a command, perhaps of several words.
        version: what the compiler calls itself.
        ninja: a path.
    """

    compiler: str
    version: str
    ninja: str

    @classmethod
    def found(cls) -> Tools:
        """The compiler in ``CXX``, or the first of c++, g++, clang++; ninja beside Python or on the path.

        Raises:
            NoCompilerError: one of them is missing, or this is not Linux.
        """
        if sys.platform != "linux":
            raise NoCompilerError(
                f"native kernels are built on Linux only, this is {sys.platform}; go on with the torch backend"
            )
        named = os.environ.get("CXX")
        candidates = [named] if named else ["c++", "g++", "clang++"]
        compiler = next((name for name in candidates if _is_program(name)), None)
        if compiler is None:
            looked = f"CXX={named!r} is no program" if named else "none of c++, g++, clang++ is on the path"
            raise NoCompilerError(
                f"no C++ compiler: {looked}; install one (Debian: g++) or go on with the torch backend"
            )
        try:
            asked = [*shlex.split(compiler), "--version"]
            version = subprocess.run(asked, capture_output=True, text=True, errors="replace").stdout
        except OSError as error:
            raise NoCompilerError(
                f"no C++ compiler: {compiler!r} does not start ({error.strerror}); name another one in CXX or go on with "
                "the torch backend"
            ) from error
        folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        ninja = shutil.which("ninja", path=os.pathsep.join(folders))
        if ninja is None:
            raise NoCompilerError(
                "ninja is not installed; `pip install ninja` or go on with the torch backend"
            )
        return cls(compiler, version, ninja)

    def key(self) -> str:
        """Tells compilers apart."""
        return _short_hash(self.compiler, self.version)


def _is_program(command: str) -> bool:
    """Whether a command, perhaps of several words, begins with a program."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation that does not end
        return False
    return bool(words) and shutil.which(words[0]) is not None


def _build_one(
    tools: Tools, folder: Path, variant: Variant, objects: Path, sanitize: bool, verbose: bool
) -> Path:
    """One variant's library, compiled if it is not there."""
    path = folder / f"{library_prefix(variant, sanitize=sanitize)}{tools.key()}.so"
    while not path.exists():
        library = _compile(tools, variant, objects, sanitize, verbose)
        # Sources that were edited meanwhile have another key, and are compiled once more.
        before, path = path, folder / f"{library_prefix(variant, sanitize=sanitize)}{tools.key()}.so"
        if before == path:
            _install(library, path)
    # The file system's own clock ticks too slowly to order two quick builds.
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    for old in _oldest(folder, f"{_variant_prefix(variant, sanitize)}*.so"):
        old.unlink()
    for old in _oldest(objects, f"{_objects_prefix(variant, sanitize)}*"):
        shutil.rmtree(old)
    return path


def _oldest(folder: Path, pattern: str) -> list[Path]:
    """All but those built last."""
    return sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)[:-LIBRARIES_KEPT]


def _compile(tools: Tools, variant: Variant, objects: Path, sanitize: bool, verbose: bool) -> Path:
    """Runs ninja, which compiles what changed, headers included; the library among the object files."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise NoCompilerError(
            f"torch's build helpers do not import ({error}); `pip install setuptools`"
        ) from error
    flags = [*_flags(variant, sanitize), *(f"-isystem {_in_command(path)}" for path in include_paths())]
    links = [f"-L{_in_command(path)}" for path in library_paths()]
    sources = sorted(SOURCE_FOLDER.glob("*.cpp"))
    names = [f"{source.stem}.o" for source in sources]
    lines = [
        f"flags = {' '.join(flags)}",
        "rule compile",
        f"  command = {tools.compiler} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # torch's OpenMP runtime is loaded already under the name that -fopenmp asks for: there is only one.
        f"  command = {tools.compiler} $flags -shared $in -o $out {' '.join(links)} -ltorch_cpu -lc10",
        *(
            f"build {name}: compile {_in_ninja(str(source))}"
            for name, source in zip(names, sources, strict=True)
        ),
        f"build library.so: link {' '.join(names)}",
        "default library.so",
    ]
    # Ninja compares commands and times, not what a compiler calls itself or which torch lies at a path.
    identity = _short_hash(torch.__version__, str(SOURCE_FOLDER), tools.key(), *_flags(variant, sanitize))
    workplace = objects / f"{_objects_prefix(variant, sanitize)}{identity}"
    workplace.mkdir(exist_ok=True)
    os.utime(workplace)  # in use: not among those built longest ago
    (workplace / "build.ninja").write_text("\n".join(lines) + "\n", "utf-8")
    print(
        f"compiling the native CPU kernels ({variant.name}): up to a minute, once",
        file=sys.stderr,
        flush=True,
    )
    command = [tools.ninja, "-C", str(workplace), *(["-v"] if verbose else [])]
    result = subprocess.run(command, capture_output=not verbose, text=True)
    if result.returncode:
        output = "" if verbose else f":\n{result.stdout}{result.stderr}"
        raise BuildError(f"the compiler failed on the native kernels ({variant.name}){output}")
    return workplace / "library.so"


def _install(library: Path, path: Path) -> None:
    """Copies beside `path`, then renames: whoever looks for it finds all of it or nothing."""
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        os.close(handle)
        shutil.copyfile(library, part)
        os.chmod(part, 0o755)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _flags(variant: Variant, sanitize: bool) -> tuple[str, ...]:
    return (*FLAGS, *variant.flags, *(SANITIZERS if sanitize else ()))


def _variant_prefix(variant: Variant, sanitize: bool) -> str:
    return f"libmtl_fast_{variant.name}{'_sanitized' if sanitize else ''}-"


def _objects_prefix(variant: Variant, sanitize: bool) -> str:
    return f"objects-{variant.name}{'_sanitized' if sanitize else ''}-"


def _short_hash(*parts: str) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _in_ninja(path: str) -> str:
    """A path as one input of a rule; ninja quotes it for the shell."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _in_command(path: str) -> str:
    """A path in the text of a command, for ninja and the shell behind it."""
    return shlex.quote(path).replace("$", "$$")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
