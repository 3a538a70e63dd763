"""A process with everything imported that forks for each job: a run that kills itself takes nothing along.

Runs of whole processes cost seconds of import each; a fork costs none. As a program it reads jobs from its
standard input, a JSON line each, and answers with the exit status.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
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

        Its error stream is in ``folder.stderr``; `die` names the point where it kills itself; `kill_after` are the
        seconds after which it is killed wherever it is.
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
    from mtl_fast.training import demo, experiment, inner_search
    from tests.training import tiny

    config = tiny.with_meta(tiny.with_pretrain(epochs=1), n_tasks=6, validate_every=6)
    demo.draw_curves = demo.draw_episode = lambda *_: None  # type: ignore[assignment]
    demo.preset = lambda name: config  # type: ignore[assignment]
    experiment.load_split = lambda source, split, size: tiny.split(split)  # type: ignore[assignment]
    inner_search.INNER_GRID = ((0.05, 3), (0.1, 5))  # type: ignore[assignment]
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


def results(folder: Path, resume: str = "") -> None:
    """The table of all rows on the tiny splits, a rate each and in this process, without pictures."""
    from mtl_fast.training import experiment, inner_search, results
    from tests.training import tiny
    from tests.training.pools import Here

    config = tiny.with_meta(tiny.with_pretrain(epochs=1), n_tasks=6, validate_every=6)
    results.worker_pool = lambda workers: nullcontext(Here())  # type: ignore[assignment]
    results.preset = lambda name: config  # type: ignore[assignment]
    results.draw_curves = results.draw_episode = lambda *_: None  # type: ignore[assignment]
    results.report.rate_sensitivity_figure = lambda *_: None  # type: ignore[assignment]
    results.RATES = dict.fromkeys(results.ROWS, (1e-3,))
    results.TRIED = (1e-3,)
    experiment.load_split = lambda source, split, size: tiny.split(split)  # type: ignore[assignment]
    inner_search.INNER_GRID = ((0.05, 3), (0.1, 5))  # type: ignore[assignment]
    results.results(folder, folder / "published", seeds=(0,), workers=1, device="cpu")


def ablation(folder: Path, resume: str = "") -> None:
    """Some rows of the ablation on the tiny splits, in this process, without its picture."""
    from mtl_fast.training import ablation, ablation_report, experiment, inner_search
    from tests.training import tiny
    from tests.training.pools import Here

    recipes = {
        "glyphs": tiny.with_meta(tiny.with_pretrain(epochs=1), n_tasks=6, validate_every=6),
        "glyphs-maml": tiny.MAML,
        "glyphs-maml-deep": tiny.MAML,
    }
    ablation.worker_pool = lambda workers: nullcontext(Here())  # type: ignore[assignment]
    ablation.preset = recipes.__getitem__  # type: ignore[assignment]
    ablation_report.convergence_figure = lambda *_, **__: None  # type: ignore[assignment]
    experiment.load_split = lambda source, split, size: tiny.split(split)  # type: ignore[assignment]
    inner_search.INNER_GRID = ((0.05, 3), (0.1, 5))  # type: ignore[assignment]
    ablation.ablation(
        folder,
        folder / "published",
        recipe="glyphs",
        rows=("update-head", "ss-last", "ss", "ss-ht", "maml"),
        shots=(1,),
        seeds=(0,),
        test_tasks=6,
        whole_network_tasks=4,
    )


def cache(folder: Path, data: str, resume: str = "") -> None:
    """A split decoded, or read from the cache in the folder, and what came of it."""
    from mtl_fast.data import load_split
    from mtl_fast.training import checkpoint

    os.environ["MTL_FAST_CACHE_DIR"] = str(folder / "cache")
    store = load_split(data, "train")
    checkpoint.save(folder / "store.safetensors", {"images": store.images, "labels": store.labels}, {})


def embed(folder: Path, model: str, resume: str = "") -> None:
    from mtl_fast.training import models
    from mtl_fast.training.embeddings import embed_split
    from tests.training import tiny

    models.load_split = lambda source, split, size: tiny.split(split)  # type: ignore[assignment]
    output = folder / "features.safetensors"
    if not (resume and output.exists()):
        embed_split(model, output, device="cpu")


def export(folder: Path, model: str, resume: str = "") -> None:
    from mtl_fast.training.export_weights import export_weights

    output = folder / "model.pt"
    if not (resume and output.exists()):
        export_weights(model, output, format="state-dict")


def predict(folder: Path, data: str, resume: str = "") -> None:
    from mtl_fast.training.predict import predict_images

    root = Path(data)
    predict_images(root / "train", root / "test" / "test0", output=folder, device="cpu")


JOBS = {
    "pretrain": pretrain,
    "meta-train": meta_train,
    "demo": demo,
    "evaluate": evaluate,
    "results": results,
    "ablation": ablation,
    "cache": cache,
    "embed": embed,
    "export": export,
    "predict": predict,
}


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
    for module in (
        "torch._dynamo",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "mtl_fast.training.export_weights",
        "mtl_fast.training.predict",
        "mtl_fast.training.ablation",
        "mtl_fast.training.results",
        "tests.training.tiny",
    ):
        importlib.import_module(module)
    torch.set_num_threads(1)
    for line in sys.stdin:
        arguments = json.loads(line)
        kill_after = float(arguments.pop("kill_after", "inf"))
        child = os.fork()
        if child == 0:
            os._exit(do(**arguments))
        print(_status(child, kill_after), flush=True)


def _status(child: int, kill_after: float) -> int:
    """The exit status of a fork, which is killed where it takes longer than so many seconds."""
    end = time.monotonic() + kill_after
    while kill_after < math.inf:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    serve()
