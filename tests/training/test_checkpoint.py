from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mtl_fast.errors import InputError
from mtl_fast.training import checkpoint as cp


def same_bits(a: Tensor, b: Tensor) -> bool:
    def raw(x: Tensor) -> Tensor:
        return x.detach().contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def some_tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    base = torch.randn(7, 11, generator=g)
    return {
        "channels_last": torch.randn(2, 3, 5, 7, generator=g).contiguous(memory_format=torch.channels_last),
        "transposed": base.T,
        "alias": base,
        "slice": base[1:3],
        "special": torch.tensor([math.nan, -0.0, math.inf, 5e-324], dtype=torch.float64),
        "half": torch.randn(5, generator=g).to(torch.bfloat16),
        "counts": torch.tensor([2**62 + 1, -1]),
        "flags": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(1 / 3),
        "stream": g.get_state(),
        "parameter": nn.Parameter(torch.randn(3, generator=g)),
    }


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        cp.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


def test_round_trip_is_equal_to_the_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    meta = {
        "step": 10**15 + 1,
        "rate": 0.1 + 0.2,
        "tiny": 5e-324,
        "name": "SS[Θ;θ]",
        "nested": {"a": [1, None, True]},
    }
    cp.save(tmp_path / "new" / "a.safetensors", tensors, meta)
    loaded, loaded_meta = cp.load(tmp_path / "new" / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(tensors[name], loaded[name]) for name in tensors)
    assert loaded_meta == meta
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("kind", ["adam", "amsgrad", "nesterov", "sgd", "tensor_lr"])
def test_an_optimizer_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(45, 7)).to(
            memory_format=torch.channels_last
        )
        groups = [{"params": net[0].parameters(), "lr": 0.1 / 3}, {"params": net[2].parameters()}]
        if kind in ("nesterov", "sgd"):
            momentum = 0.9 if kind == "nesterov" else 0.0
            return net, torch.optim.SGD(groups, lr=0.01, momentum=momentum, nesterov=momentum > 0)
        lr = torch.tensor(0.01) if kind == "tensor_lr" else 0.01
        return net, torch.optim.Adam(groups, lr=lr, amsgrad=kind == "amsgrad", betas=(0.9, 0.98))

    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, n: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for _ in range(n):
            optimizer.zero_grad()
            net(torch.randn(4, 3, 5, 5, generator=g)).square().mean().backward()
            optimizer.step()

    net, optimizer = build()
    steps(net, optimizer, 3, seed=1)
    tensors, packed = cp.pack_optimizer(optimizer)
    cp.save(tmp_path / "a", {**tensors, **cp.nest("net", net.state_dict())}, {"optimizer": packed})

    tensors, meta = cp.load(tmp_path / "a")
    again, optimizer_again = build()
    again.load_state_dict(cp.part(tensors, "net"))
    cp.unpack_optimizer(optimizer_again, tensors, meta["optimizer"])
    before, after = optimizer.state_dict(), optimizer_again.state_dict()
    assert repr(before["param_groups"]) == repr(after["param_groups"])
    for index, entry in before["state"].items():
        for key, value in entry.items():
            other = after["state"][index][key]
            if isinstance(value, Tensor):
                assert same_bits(value, other)
                assert value.stride() == other.stride()
            else:
                assert value == other
    steps(net, optimizer, 3, seed=2)
    steps(again, optimizer_again, 3, seed=2)
    assert all(same_bits(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_an_optimizer_of_another_run_is_named() -> None:
    def adam(*shapes: tuple[int, ...]) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = torch.optim.Adam(parameters)
        sum(p.sum() for p in parameters).backward()
        optimizer.step()
        return optimizer

    tensors, packed = cp.pack_optimizer(adam((3,), (4, 5)))
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    for other, text in [
        (sgd, "is Adam, this run's is SGD"),
        (adam((3,)), "groups of [2] parameters, this run's [1]"),
        (adam((3,), (5, 4)), "exp_avg [4, 5] for parameter 1, which is [5, 4]"),
    ]:
        with pytest.raises(InputError, match=re.escape(text)):
            cp.unpack_optimizer(other, tensors, packed)


def test_trees_keep_their_types() -> None:
    tree = {"a": (1, [2.5, None]), 3: {"t": torch.arange(3)}, "flag": True, "text": "x"}
    tensors, packed = cp.pack(tree, "pool")
    assert list(tensors) == ["pool.3.t"]
    back = cp.unpack(tensors, json.loads(json.dumps(packed)))
    assert repr(back) == repr(tree)
    with pytest.raises(TypeError, match=r"pool\.a: a checkpoint cannot hold set"):
        cp.pack({"a": {1}}, "pool")


def test_every_cut_is_seen(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    cp.save(whole, some_tensors(), {"step": 7})
    payload = whole.read_bytes()
    n_header = 8 + int.from_bytes(payload[:8], "little")
    cuts = {0, 1, 7, 8, 9, 10, 50, n_header - 1, n_header, n_header + 1, len(payload) - 1}
    cuts |= set(range(0, len(payload), 97))
    for n in sorted(cuts):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(payload[:n])
        text = error_of(path)
        assert "cut short" in text if n else "is empty" in text, (n, text)
        if n > n_header:
            assert f"{n:,} of {len(payload):,} bytes" in text


def test_every_damage_is_seen(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    cp.save(whole, {"a": torch.arange(9.0), "b": torch.ones(3)}, {"step": 7, "name": "SS"})
    payload = whole.read_bytes()
    for position in range(len(payload)):
        damaged = bytearray(payload)
        damaged[position] ^= 0x01
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        error_of(path)
    path.write_bytes(payload + b"\0")
    assert "longer than it should be" in error_of(path)


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert "does not exist" in error_of(path)
    cp.save(tmp_path / "best.safetensors", {}, {})
    assert "checkpoints in" in error_of(path)
    assert "best.safetensors" in error_of(path)
    assert "neither does the folder" in error_of(tmp_path / "nowhere" / "a")
    assert "is a folder" in error_of(tmp_path)
    path.write_text("not a checkpoint at all")
    assert "not a checkpoint" in error_of(path)
    torch.save({"a": torch.ones(3)}, path)
    assert "not a checkpoint" in error_of(path)
    safetensors.torch.save_file({"a": torch.ones(3)}, path)
    assert "not a checkpoint" in error_of(path)
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "not a checkpoint" in error_of(path)


def test_a_newer_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp, "VERSION", 2)
    cp.save(tmp_path / "a", {"x": torch.ones(1)}, {})
    monkeypatch.setattr(cp, "VERSION", 1)
    assert "has format 2, this mtl_fast reads up to 1; update mtl_fast" in error_of(tmp_path / "a")


def test_another_architecture_names_the_first_difference() -> None:
    built = {"backbone": "resnet12", "widths": (64, 128), "ss": {"granularity": "kernel", "shortcut": False}}
    saved = {"architecture": json.loads(json.dumps(built))}
    cp.check_architecture(saved, built)
    for change, text in [
        ({"widths": (32, 64), "backbone": "resnet12"}, "widths is [64, 128] there and [32, 64] here"),
        ({"backbone": "conv4", "widths": (32,)}, 'backbone is "resnet12" there and "conv4" here'),
        (
            {"ss": {"granularity": "filter", "shortcut": False}},
            'ss.granularity is "kernel" there and "filter" here',
        ),
        ({"ss": {"granularity": "kernel"}}, "ss.shortcut is false there and unknown here"),
        ({"slope": 0.1}, "slope is 0.1 here and unknown there"),
    ]:
        with pytest.raises(InputError, match=re.escape(text)) as caught:
            cp.check_architecture(saved, {**built, **change}, "best.safetensors")
        assert "checkpoint best.safetensors" in str(caught.value)
    with pytest.raises(InputError, match="names no architecture"):
        cp.check_architecture({}, built)


def test_settings_agree_as_values() -> None:
    found = {"lr": 1, "norm": math.nan, "widths": [1, 2]}
    assert cp.first_difference(found, {"lr": 1.0, "norm": math.nan, "widths": (1, 2)}) == ""
    assert cp.first_difference({"on": 1}, {"on": True}) == "on is 1 there and true here"


def test_meta_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    cp.save(tmp_path / "a", {"x": torch.ones(1)}, {"step": 1})
    with pytest.raises(TypeError):
        cp.save(tmp_path / "a", {"x": torch.zeros(1)}, {"step": torch.ones(1)})
    assert cp.load(tmp_path / "a")[1] == {"step": 1}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cp.save(tmp_path / "a", {"x": torch.ones(1)}, {"step": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; the one there before is untouched"):
        cp.save(tmp_path / "a", {"x": torch.zeros(1)}, {"step": 2})
    assert cp.load(tmp_path / "a")[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


SAVER = """
import sys, os, signal, torch
from mtl_fast import files
from mtl_fast.training import checkpoint as cp
path, where = sys.argv[1:]
tensors = lambda step: {"x": torch.full((1 << 18,), float(step))}
cp.save(path, tensors(1), {"step": 1})
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "write":
    # A file that dies after half of its bytes are on disk.
    whole = open
    class Half:
        def __init__(self, *a): self.file = whole(*a)
        def __enter__(self): return self
        def __exit__(self, *a): pass
        def write(self, data):
            self.file.write(data[: len(data) // 2]); self.file.flush(); os.fsync(self.file.fileno()); die()
    files.open = Half
elif where == "fsync":
    os.fsync = die
elif where == "rename":
    os.replace = die
else:
    replace = os.replace
    def renamed(a, b): replace(a, b); die()
    os.replace = renamed
cp.save(path, tensors(2), {"step": 2})
"""


@pytest.mark.parametrize(("where", "step"), [("write", 1), ("fsync", 1), ("rename", 1), ("renamed", 2)])
def test_killed_while_saving_leaves_a_whole_file(where: str, step: int, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", SAVER, str(path), where], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    tensors, meta = cp.load(path)
    assert meta == {"step": step}
    assert torch.equal(tensors["x"], torch.full((1 << 18,), float(step)))
    cp.save(path, {"x": torch.zeros(1)}, {"step": 3})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


BUSY = """
import sys, torch
from mtl_fast.training import checkpoint as cp
for step in range(1, 10**9):
    cp.save(sys.argv[1], {"x": torch.full((1 << 20,), float(step))}, {"step": step})
    print(step, flush=True)
"""


def test_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as lines:
        for _ in range(3):
            assert lines.readline()
        time.sleep(0.013)
        process.kill()
        said = [int(line) for line in lines if line.strip()]
    process.wait()
    tensors, meta = cp.load(path)
    assert meta["step"] >= max(said, default=3)
    assert torch.equal(tensors["x"], torch.full((1 << 20,), float(meta["step"])))


def test_provenance_says_where_from_and_holds_no_path() -> None:
    found = cp.provenance()
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", found["source_commit"])
    assert found["torch"] == torch.__version__
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert str(Path(cp.__file__).resolve().parents[2]) not in text


def test_a_commit_tells_whether_code_differs_from_it(tmp_path: Path) -> None:
    for name in ("mtl_fast/x.py", "bench/y.py", "bench/results/cpu.jsonl", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    assert cp._commit_of(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    clean = cp._commit_of(tmp_path)
    assert cp.short_commit(clean) == clean[:12]
    for name in ("bench/results/cpu.jsonl", "docs/page.md"):
        (tmp_path / name).write_text("2")
    assert cp._commit_of(tmp_path) == clean
    for name in ("mtl_fast/x.py", "bench/y.py"):
        (tmp_path / name).write_text("2")
        changed = cp._commit_of(tmp_path)
        assert changed == f"{clean}+changes"
        assert cp.short_commit(changed) == f"{clean[:12]} with changes"
        (tmp_path / name).write_text("1")


def test_names_of_any_bytes_come_back(tmp_path: Path) -> None:
    meta = {"class_names": ["a\udcff", "Vögel"], "source": "by\udcff"}
    cp.save(tmp_path / "c", {}, meta)
    assert cp.load(tmp_path / "c")[1] == meta
