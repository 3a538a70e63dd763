"""Every phase killed at random moments and gone on with, to the bits of one left alone: `make soak`.

    python -m tests.training.soak [--moments 100] [--seed N] [PHASE ...]

Phases run on tiny data, each in a fork that SIGKILL ends at a moment drawn from the length of an undisturbed run; the
next fork goes on in the same folder, is killed too, and so on until one comes to its end. A half file that anybody
reads ends that fork with an error, and with it the soak.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtl_fast.training import checkpoint
from tests.training import tiny
from tests.training.forks import Forks

KILLED = -signal.SIGKILL


def same_run(a: Path, b: Path) -> None:
    tiny.assert_same_run(a, b)


def same_files(a: Path, b: Path, *, told: tuple[str, ...] = ()) -> None:
    """The same names, nothing half written, and the same content, but for the commit, which may change meanwhile.

    Files that end in one of `told` tell times; what else they tell is in the others.
    """
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) for root in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        if not name.endswith(told):
            same_file(a / name, b / name)


def same_ablation(a: Path, b: Path) -> None:
    """The same runs and numbers; tables tell how long each run took."""
    same_files(a, b, told=(".md", ".csv", ".tex"))


def same_file(a: Path, b: Path) -> None:
    if a.suffix == ".safetensors":
        (tensors, meta), (others, other_meta) = checkpoint.load(a), checkpoint.load(b)
        assert tiny.same_tensors(tensors, others), a
        assert untimed(meta) == untimed(other_meta), a
    elif a.suffix == ".pt":
        tensors, others = (torch.load(path, weights_only=True) for path in (a, b))
        assert tiny.same_tensors(tensors, others), a
    elif a.suffix == ".json":
        found, other = (json.loads(path.read_text(encoding="utf-8")) for path in (a, b))
        assert untimed(found) == untimed(other), a
    elif a.suffix == ".md":  # the last lines tell the time that it took, and the commit
        texts = [path.read_text(encoding="utf-8").partition("\nMade ")[0] for path in (a, b)]
        assert texts[0] == texts[1], a
    else:
        assert a.read_bytes() == b.read_bytes(), a


def untimed(found: Any) -> Any:
    """What was read of a file, without the time that a run took and the commit that ran it."""
    if isinstance(found, dict):
        return {
            name: untimed(value)
            for name, value in found.items()
            if name != "provenance" and "seconds" not in name and "minutes" not in name
        }
    return [untimed(value) for value in found] if isinstance(found, list) else found


def same_store(a: Path, b: Path) -> None:
    """The same images, and a cache that holds them; what a killed run half wrote is swept an hour later."""
    same_file(a / "store.safetensors", b / "store.safetensors")
    (file,), (other,) = ([*(root / "cache").glob("*.safetensors")] for root in (a, b))
    assert file.read_bytes() == other.read_bytes()
    assert all(left.name.endswith(".partial") for left in (a / "cache").iterdir() if left != file)


@dataclass(frozen=True)
class Case:
    """A job of `forks`, what it takes, and how two of its folders are compared."""

    job: str
    same: Callable[[Path, Path], None] = same_files
    takes: tuple[str, ...] = ()


PHASES = {
    case.job: case
    for case in (
        Case("pretrain", same_run),
        Case("meta-train", same_run, ("pretrained",)),
        Case("evaluate", takes=("model",)),
        Case("demo"),
        Case("results"),
        Case("ablation", same_ablation),
        Case("cache", same_store, ("data",)),
        Case("embed", takes=("model",)),
        Case("export", takes=("model",)),
        Case("predict", takes=("data",)),
    )
}


class Soak:
    """Runs phases left alone and killed.

    Args:
        root: an empty folder.
        forks: where jobs run.
        rng: draws the moments.
    """

    def __init__(self, root: Path, forks: Forks, rng: random.Random) -> None:
        self.root, self.forks, self.rng = root, forks, rng
        self.given = {
            "pretrained": root / "pretrained",
            "model": root / "model",
            "data": tiny.write_class_folders(root / "data", n_classes=6, n_images=12, size=32),
        }
        self._done(self.run(PHASES["pretrain"], self.given["pretrained"]), self.given["pretrained"])
        self._done(self.run(PHASES["meta-train"], self.given["model"]), self.given["model"])

    def run(self, case: Case, folder: Path, kill_after: float | None = None) -> int:
        """One fork, which goes on with what there is; its exit status."""
        options: dict[str, object] = {name: self.given[name] for name in case.takes}
        if kill_after is not None:
            options["kill_after"] = kill_after
        return self.forks.run(case.job, folder, resume="yes", **options)

    def soak(self, case: Case, n_moments: int) -> tuple[int, float]:
        """Kills a phase so many times.

        Returns:
            How many runs came to their end and were compared, and the seconds of an undisturbed one.

        Raises:
            AssertionError: other bits, or a fork that failed.
        """
        alone = self.root / f"{case.job}-alone"
        self._done(self.run(case, alone), alone)
        again = (
            self.root / f"{case.job}-again"
        )  # what is loaded late by then is loaded, as in the killed ones
        start = time.monotonic()
        self._done(self.run(case, again), again)
        length = time.monotonic() - start
        case.same(again, alone)
        n_killed = n_compared = 0
        while n_killed < n_moments:
            folder = self.root / f"{case.job}-{n_compared}"
            status = KILLED
            while status == KILLED:
                moment = self.rng.uniform(0, length) if n_killed < n_moments else None
                status = self.run(case, folder, moment)
                n_killed += status == KILLED
            self._done(status, folder)
            case.same(folder, alone)
            n_compared += 1
        return n_compared, length

    @staticmethod
    def _done(status: int, folder: Path) -> None:
        assert status == 0, f"{folder.name}: {folder.with_suffix('.stderr').read_text()}"


def soak(names: Iterable[str], n_moments: int, seed: int, say: Callable[[str], None]) -> Mapping[str, int]:
    """Kills each of the phases so many times; phase → runs that came to their end."""
    found = {}
    with tempfile.TemporaryDirectory() as root, closing(Forks()) as forks:
        run = Soak(Path(root), forks, random.Random(seed))
        for name in names:
            start = time.monotonic()
            n_compared, length = run.soak(PHASES[name], n_moments)
            found[name] = n_compared
            say(
                f"{name}: killed at {n_moments} moments of {length:.2f} s, {n_compared} runs came to their end with the "
                f"bits of one left alone ({time.monotonic() - start:.0f} s)"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"{', '.join(PHASES)}; all by default")
    parser.add_argument("--moments", type=int, default=100, help="kills of each phase")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.phases) - set(PHASES):
        parser.error(f"unknown: {', '.join(unknown)}")
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"moments are drawn from seed {seed}; --seed {seed} draws them again", flush=True)
    soak(arguments.phases or PHASES, arguments.moments, seed, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
