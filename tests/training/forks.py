"""A process with everything imported that forks for each job: a run that kills itself takes nothing along.

Runs of whole processes cost seconds of import each; a fork costs none. As a program it reads jobs from its
standard input, a JSON line each, and answers with the exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Forks:
    """The parent's side: `run` does one job in a fork and returns its exit status."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: str, folder: Path, **arguments: Any) -> int:
        """Runs a job of `JOBS` and returns its exit status, −9 when it was killed.

        Its error stream is in ``folder.stderr``; `die` names the point where it kills itself.
        """
        line = {"job": job, "folder": str(folder), **{k: str(v) for k, v in arguments.items()}}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str) -> None:
    """Arranges a kill: ``update N``, before update N; ``rename K NAME``, when the Kth new version of a file of
    that name is whole but not yet in place; ``renamed K NAME``, right after; ``write K NAME``, when half of it is
    on disk."""
    where, count, *name = point.split()
    if where == "update":
        from mtl_fast.training.meta_train import MetaTraining
        from mtl_fast.training.pretrain import Pretraining

        for kind in (MetaTraining, Pretraining):

            def update(self: Any, original: Any = kind._update) -> None:
                if self.update == int(count):
                    die()
                original(self)

            kind._update = update  # type: ignore[method-assign]
        return

    from mtl_fast import files

    seen = 0

    def the_one(path: Any) -> bool:
        nonlocal seen
        seen += Path(path).name in (name[0], f".{name[0]}.partial")
        return seen == int(count)

    if where == "write":

        class Half:
            def __init__(self, path: Any, mode: str) -> None:
                self.file, self.dies = open(path, mode), the_one(path)  # noqa: SIM115 - closed in __exit__

            def __enter__(self) -> Any:
                return self if self.dies else self.file.__enter__()

            def __exit__(self, *_: Any) -> None:
                self.file.close()

            def write(self, data: bytes) -> None:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                os.fsync(self.file.fileno())
                die()

        files.open = Half  # type: ignore[attr-defined]
        return
    replace = os.replace

    def replacing(source: Any, target: Any) -> None:
        dies = the_one(target)
        if dies and where == "rename":
            die()
        replace(source, target)
        if dies:
            die()

    os.replace = replacing  # type: ignore[assignment]


def pretrain(folder: Path, resume: str = "") -> None:
    from tests.training import tiny

    tiny.pretraining(folder, resume=bool(resume)).run()


def meta_train(folder: Path, pretrained: str, resume: str = "", hard: str = "resample") -> None:
    from tests.training import tiny

    config = tiny.with_meta(hard=hard)
    tiny.meta_training(folder, Path(pretrained), config, resume=bool(resume)).run()


def demo(folder: Path, resume: str = "") -> None:
    """The demo on the tiny splits, without pictures; its table goes to ``folder.table``."""
    from mtl_fast.training import demo, experiment
    from tests.training import tiny

    config = tiny.with_meta(tiny.with_pretrain(epochs=1), n_tasks=6, validate_every=6)
    demo.draw_curves = demo.draw_episode = lambda *_: None  # type: ignore[assignment]
    demo.preset = lambda name: config  # type: ignore[assignment]
    experiment.load_split = lambda source, split, size: tiny.split(split)  # type: ignore[assignment]
    experiment.INNER_GRID = ((0.05, 3), (0.1, 5))  # type: ignore[assignment]
    table = demo.demo(folder, device="cpu", resume=bool(resume))
    folder.with_suffix(".table").write_text(table)


def evaluate(folder: Path, model: str, resume: str = "") -> None:
    """A test of 23 tasks in pieces of 5 tasks and of 60 images."""
    from mtl_fast.config import EvaluationConfig
    from mtl_fast.training import models, scoring
    from mtl_fast.training.evaluate import evaluate_model
    from tests.training import tiny

    models.load_split = lambda source, split, size: tiny.split(split)  # type: ignore[assignment]
    scoring.TASKS_PER_PART, scoring.IMAGES_PER_PART = 5, 60
    tasks = EvaluationConfig(n_tasks=23)
    evaluate_model(model, evaluation=tasks, by_step=True, device="cpu", output=folder, resume=bool(resume))


JOBS = {"pretrain": pretrain, "meta-train": meta_train, "demo": demo, "evaluate": evaluate}


def do(job: str, folder: str, die: str = "", **arguments: str) -> int:
    """One job, in the fork."""
    path = Path(folder)
    errors = os.open(path.with_suffix(".stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    try:
        if die:
            die_at(die)
        JOBS[job](path, **arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    import torch

    # Forks find these imported; torch itself would import dynamo at the first optimiser's step.
    for module in ("torch._dynamo", "matplotlib.figure", "mtl_fast.training.demo", "tests.training.tiny"):
        importlib.import_module(module)
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(do(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
