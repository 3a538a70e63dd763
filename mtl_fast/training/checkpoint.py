"""One file holds everything a run needs to go on to the same bits.

A checkpoint is a safetensors file: tensors by name, and in its header one JSON text (the *meta*: numbers,
names, configuration), a format version and a SHA-256 of all of it. Saving replaces the file in one step:
whoever kills the process or the machine finds the old file or the new one, never a mixture.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mtl_fast.errors import InputError
from mtl_fast.files import replace_file, utf8

FORMAT = "mtl_fast checkpoint"
VERSION = 1
# The largest header that safetensors itself accepts; anything longer was never one.
_LONGEST_HEADER = 100_000_000


def save(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint, in one step (`replace_file`).

    Args:
        path: the file; its folder is made when missing.
        tensors: any shapes, devices, strides and sharing; stored as contiguous CPU copies, exact to the bit.
            Random streams go in as their uint8 states.
        meta: what JSON can hold; floats come back exact to the bit, tuples come back as lists.

    Raises:
        TypeError: `meta` holds something that JSON cannot.
        InputError: the file cannot be written (full or read-only disk); the old file is as it was.
    """
    path = Path(path)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = utf8(json.dumps(meta, ensure_ascii=False)).decode()
    header = {"format": FORMAT, "version": str(VERSION), "meta": text}
    header["sha256"] = _digest(stored, str(VERSION), text)
    payload = safetensors.torch.save(stored, header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [payload])
    except OSError as error:
        kept = "the one there before is untouched" if path.exists() else "nothing was written"
        raise InputError(
            f"cannot write checkpoint {path} ({len(payload):,} bytes): {error.strerror}; {kept}; "
            "free some space or choose another --output"
        ) from error


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint: (tensors on the CPU, contiguous; meta).

    Raises:
        InputError: there is no such file, it is cut short or damaged, it is not a checkpoint of this
            package, or a newer version wrote it. One line, naming the file and the way out.
    """
    path = Path(path)
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist; {_nearby(path.parent)}") from None
    except IsADirectoryError:
        raise InputError(f"checkpoint {path} is a folder; {_nearby(path)}") from None
    except OSError as error:
        raise InputError(f"cannot read checkpoint {path}: {error.strerror}") from error
    header = _header(path, payload)
    text, version = header["meta"], header["version"]
    if not version.isdecimal() or int(version) > VERSION:
        raise InputError(
            f"checkpoint {path} has format {version}, this mtl_fast reads up to {VERSION}; update mtl_fast"
        )
    try:
        tensors = safetensors.torch.load(payload)
        meta = json.loads(text)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint {path} is damaged ({_one_line(error)}); {_WAY_OUT}") from error
    if _digest(tensors, version, text) != header["sha256"]:
        raise InputError(f"checkpoint {path} is damaged (its contents do not match its SHA-256); {_WAY_OUT}")
    return tensors, meta


_WAY_OUT = "take an earlier checkpoint or run again without --resume"


def _header(path: Path, payload: bytes) -> dict[str, str]:
    """The checked ``__metadata__`` of a safetensors file, whose first 8 bytes are the header's length."""
    size = len(payload)
    if size == 0:
        raise InputError(f"checkpoint {path} is empty (0 bytes); {_WAY_OUT}")
    foreign = InputError(
        f"{path} is not a checkpoint of mtl_fast ({size:,} bytes); name the file that a run saved"
    )
    n_header = int.from_bytes(payload[:8], "little")
    if size < 10:
        raise InputError(f"{path} has only {size} bytes: cut short, or not a checkpoint; {_WAY_OUT}")
    if n_header > _LONGEST_HEADER or payload[8:9] != b"{":
        raise foreign
    if size < 8 + n_header:
        raise InputError(f"checkpoint {path} is cut short inside its header ({size:,} bytes); {_WAY_OUT}")
    try:
        entries = json.loads(payload[8 : 8 + n_header])
        header = entries.pop("__metadata__", {})
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise foreign from None
    expected = 8 + n_header + max(ends, default=0)
    if header.get("format") != FORMAT or not {"version", "meta", "sha256"} <= header.keys():
        raise foreign
    if size != expected:
        what = "cut short" if size < expected else "longer than it should be"
        raise InputError(f"checkpoint {path} is {what}: {size:,} of {expected:,} bytes; {_WAY_OUT}")
    return header


def _digest(tensors: Mapping[str, Tensor], version: str, text: str) -> str:
    """SHA-256 of version, meta and every tensor's name, dtype, shape and bytes, by name."""
    digest = hashlib.sha256(f"{version}\0{text}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _nearby(folder: Path) -> str:
    """What the user may have meant."""
    if not folder.is_dir():
        return f"neither does the folder {folder}"
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    return f"checkpoints in {folder}: {', '.join(names[:8])}" if names else f"{folder} holds no checkpoint"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def pack(tree: Any, prefix: str) -> tuple[dict[str, Tensor], Any]:
    """Takes a tree of dicts, lists, tuples, tensors and plain values apart: (tensors by dotted name, JSON).

    Raises:
        TypeError: a leaf is neither a tensor nor None, bool, int, float or str; the message names it.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node
            return {"tensor": name}
        if isinstance(node, dict):
            return {"dict": [[key, walk(value, f"{name}.{key}")] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            kind = "tuple" if isinstance(node, tuple) else "list"
            return {kind: [walk(value, f"{name}.{i}") for i, value in enumerate(node)]}
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"{name}: a checkpoint cannot hold {type(node).__name__}")

    return tensors, walk(tree, prefix)


def unpack(tensors: Mapping[str, Tensor], packed: Any) -> Any:
    """The inverse of `pack`: keys, types and bits as they were."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(tensors, value) for key, value in content}
    items = [unpack(tensors, value) for value in content]
    return tuple(items) if kind == "tuple" else items


def pack_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer"
) -> tuple[dict[str, Tensor], Any]:
    """The optimiser's whole state as (tensors named ``prefix.…``, JSON), exact to the bit."""
    tensors, state = pack(optimizer.state_dict(), prefix)
    return tensors, {"kind": type(optimizer).__name__, "state": state}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], packed: Any) -> None:
    """Puts a packed state into `optimizer`, over the parameters that it was packed from, in their order.

    Args:
        optimizer: of the same class, over parameters of the same shapes.
        tensors: any dictionary that holds those of `pack_optimizer`.
        packed: its JSON.

    Raises:
        InputError: another class, another number of parameters, or a state of another shape.
    """
    kind = type(optimizer).__name__
    if packed["kind"] != kind:
        raise InputError(
            f"the checkpoint's optimiser is {packed['kind']}, this run's is {kind}; resume with its config"
        )
    state = unpack(tensors, packed["state"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = [len(group["params"]) for group in state["param_groups"]]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if found != expected:
        raise InputError(
            f"the checkpoint's optimiser has groups of {found} parameters, this run's {expected}; "
            "resume with its config"
        )
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            parameter = parameters[index]
            if value.shape != parameter.shape:
                raise InputError(
                    f"the checkpoint's optimiser has {key} {list(value.shape)} for parameter {index}, "
                    f"which is {list(parameter.shape)} here; resume with its config"
                )
            # The parameter's strides: the same elements in another order may take another vector path.
            entry[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    optimizer.load_state_dict(state)


def nest(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts a dictionary under a prefix: ``{"a": x} -> {"prefix.a": x}``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `nest`: what lies under a prefix."""
    start = prefix + "."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def check_architecture(meta: Mapping[str, Any], expected: Mapping[str, Any], path: str | Path = "") -> None:
    """Compares ``meta["architecture"]`` with what this run builds.

    Raises:
        InputError: naming the first difference, in the order of `expected`, and both values.
    """
    name = f"checkpoint {path}" if path else "the checkpoint"
    if not isinstance(meta.get("architecture"), dict):
        raise InputError(f"{name} names no architecture; it was not saved by a run")
    difference = first_difference(meta["architecture"], expected)
    if difference:
        raise InputError(
            f"{name} is of another architecture: {difference}; use its config or another checkpoint"
        )


def first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first entry where a checkpoint's settings differ from this run's, in words; empty if none does."""
    # Both through JSON, as the checkpoint went: tuples are lists there.
    return _difference(json.loads(json.dumps(found)), json.loads(json.dumps(expected)), "")


def _difference(found: Any, expected: Any, name: str) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            inner = f"{name}.{key}".lstrip(".")
            if key not in found:
                return f"{inner} is {_text(expected[key])} here and unknown there"
            if key not in expected:
                return f"{inner} is {_text(found[key])} there and unknown here"
            if difference := _difference(found[key], expected[key], inner):
                return difference
        return ""
    # Text lets NaN agree with NaN; True and 1 are equal to Python, but not the same setting.
    there, here = _text(found), _text(expected)
    same = there == here or (found == expected and isinstance(found, bool) == isinstance(expected, bool))
    return "" if same else f"{name} is {there} there and {here} here"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def short_commit(commit: str) -> str:
    """A commit of :func:`provenance` for readers: twelve characters, and whether the code differed from it."""
    number, plus, _ = commit.partition("+")
    return number[:12] + (" with changes" if plus else "")


@functools.cache
def _source_commit() -> str:
    return _commit_of(Path(__file__).resolve().parents[2])


def _commit_of(root: Path) -> str:
    """The commit of this package in `root`, ``+changes`` added when its code differs; or ``unknown``.

    Results that are written into the work tree, line by line, change no code.
    """
    code = ("mtl_fast", "kernels", ":(glob)bench/**/*.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository; that commit is not ours.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def provenance() -> dict[str, Any]:
    """Source commit and environment of this run, for the meta; no path, no name of a user or machine."""
    from mtl_fast import __version__

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "mtl_fast": __version__,
        "source_commit": _source_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda_devices": devices,
    }
