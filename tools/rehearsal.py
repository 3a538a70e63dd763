"""A full-size rehearsal: some iterations of each recipe's phases on data of miniImageNet's size, and what follows for
the whole run: time, peak memory, hours.

    python tools/rehearsal.py [--iterations 50] [--presets tensorflow pytorch] [--output runs/rehearsal]

The data are noise around a colour a class, written once in miniImageNet's own cache layout (64 classes of 600 images
of 84×84 to train on, 16 of 600 for validation). Each phase runs in a process of its own; what is finished is kept, so
that the command can be given again. The table is rehearsal.md in the output folder.

A pre-trained network is stood in for by a random one whose norms have the statistics of one batch: its speed is that
of any other. Time per iteration is the mean of those measured, the first, which builds caches, left out. A validation
is measured on a few tasks and scaled to the recipe's number by the images that are embedded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

PHASES = ("pretrain", "meta-train")
SPLITS = {"train": (64, 600), "val": (16, 600), "test": (20, 20)}  # classes, images of each
PIXELS = 84


def write_data(folder: Path, *, quick: bool) -> None:
    """Writes the three cache files that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, (n_classes, n_images)) in enumerate(SPLITS.items()):
        path = folder / f"mini-imagenet-cache-{split}.pkl"
        if path.exists():
            continue
        n_images = 20 if quick else n_images
        generator = np.random.default_rng(seed)
        images = np.empty((n_classes * n_images, PIXELS, PIXELS, 3), np.uint8)
        for i in range(n_classes):
            colour = generator.integers(64, 192, 3)
            noise = generator.integers(-64, 64, (n_images, PIXELS, PIXELS, 3))
            images[i * n_images : (i + 1) * n_images] = colour + noise
        rows = {f"n{split}{i:02d}": list(range(i * n_images, (i + 1) * n_images)) for i in range(n_classes)}
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            pickle.dump({"image_data": images, "class_dict": rows}, file, protocol=4)
        os.replace(partial, path)


def data_of(arguments: argparse.Namespace) -> Path:
    """Their folder, another one for quick runs."""
    output: Path = arguments.output
    return output / ("data-quick" if arguments.quick else "data")


def settings(name: str, data: Path, *, quick: bool) -> Any:
    """The recipe on the data; quick: a slim network, for a test of this tool."""
    from mtl_fast.config import preset

    config = preset(name, "miniimagenet")
    config = replace(config, data=replace(config.data, source=str(data)), device="cpu")
    if quick:
        config = replace(config, encoder=replace(config.encoder, widths=(16,) * len(config.encoder.widths)))
    return config


def stand_in(config: Any, side: int, images: Any) -> Any:
    """A pre-trained model that nobody trained; its norms have the statistics of some images."""
    import torch

    from mtl_fast.training.models import Model, architecture, build_encoder, network_size, preprocess_of

    encoder = build_encoder(
        config.encoder, image_size=network_size(config, side), generator=torch.Generator().manual_seed(0)
    )
    for norm in encoder.norms():
        norm.momentum = 1.0
    with torch.no_grad():
        encoder.train()(
            preprocess_of(config)(images, torch.arange(0, images.n_images, images.n_images // 32))
        )
    for norm in encoder.norms():
        norm.momentum = 0.1
    return Model(
        config, encoder.eval(), None, side, {"architecture": architecture(config, side)}, Path("stand-in")
    )


def a_run(config: Any, phase: str, folder: Path) -> Any:
    from mtl_fast.data import load_split
    from mtl_fast.training.meta_train import MetaTraining
    from mtl_fast.training.pretrain import Pretraining

    data = config.data
    train, val = (load_split(data.source, split, data.image_size) for split in ("train", "val"))
    if phase == "pretrain":
        return Pretraining(config, folder, train=train, val=val)
    start = None if from_random_weights(config) else stand_in(config, train.image_size[0], train)
    return MetaTraining(config, start, folder, train=train, val=val)


def from_random_weights(config: Any) -> bool:
    """MAML on Conv-4 has no pre-training."""
    return bool(config.encoder.name == "conv4")


def measure(name: str, phase: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs some iterations of a phase in this process."""
    from mtl_fast.engine.evaluate import distinct_images
    from mtl_fast.training.logging import NoLog
    from mtl_fast.training.pace import peak_memory

    config = settings(name, data_of(arguments), quick=arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        run = a_run(config, phase, Path(folder))
        run._begin(NoLog())
        seconds = []
        for _ in range(arguments.iterations + 1):
            start = time.perf_counter()
            run._update()
            seconds.append(time.perf_counter() - start)
        peak = peak_memory(run.device)
        every, n_tasks = run.validation, run.validation.n_tasks
        few = every[: arguments.validation_tasks]
        run.validation = few
        run.encoder.eval()
        start = time.perf_counter()
        run._validate() if phase == "pretrain" else run._report(NoLog())
        validation = time.perf_counter() - start
        # Stored statistics embed an image once for all tasks that it is in.
        if phase == "pretrain" or (config.meta.norm != "episode" and config.inner.adapt == "head"):
            mirror, n_images = config.evaluation.mirror_support, run.val.n_images
            some, all_ = (len(distinct_images(e, n_images, mirror_support=mirror).rows) for e in (few, every))
            validation *= all_ / some
        else:
            validation *= n_tasks / few.n_tasks
        if phase == "pretrain":
            n_validations = math.ceil(run.total / run.updates_per_epoch / config.pretrain.validate_every)
        else:
            n_validations = 1 + config.meta.n_tasks // config.meta.validate_every
        return how(arguments) | {
            "seconds": seconds[1:],
            "peak_bytes": max(peak, peak_memory(run.device)),
            "total_iterations": run.total,
            "validation_seconds": validation,
            "n_validations": n_validations,
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
        }


def whole_run(found: dict[str, Any]) -> float:
    """Seconds of the phase at full length."""
    mean = sum(found["seconds"]) / len(found["seconds"])
    return float(mean * found["total_iterations"] + found["validation_seconds"] * found["n_validations"])


def table(results: dict[tuple[str, str], dict[str, Any] | str]) -> str:
    """Markdown: a row a phase; a text stands for a phase that another recipe has measured."""
    from mtl_fast.engine.memory import in_words
    from mtl_fast.text_table import grid

    head = ["recipe", "phase", "measured", "s an iteration (range)", "peak memory", "iterations in all"]
    head += ["validations", "hours in all"]
    body = []
    for (name, phase), found in results.items():
        if isinstance(found, str):
            body.append([name, phase, *["–"] * 5, found])
            continue
        times = found["seconds"]
        body.append(
            [
                name,
                phase,
                str(found["iterations"]),
                f"{sum(times) / len(times):.3g} ({min(times):.3g}–{max(times):.3g})",
                in_words(found["peak_bytes"]),
                f"{found['total_iterations']:,}",
                f"{found['n_validations']} × {found['validation_seconds']:.0f} s",
                f"{whole_run(found) / 3600:.1f}",
            ]
        )
    return grid(head, body, "markdown")


def how(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a measurement was made with; another one is not taken for it."""
    return {name: getattr(arguments, name) for name in ("iterations", "validation_tasks", "quick")}


def rehearse(arguments: argparse.Namespace) -> str:
    """Measures what is missing, each phase in a process of its own, and writes the table."""
    output: Path = arguments.output
    write_data(data_of(arguments), quick=arguments.quick)
    environment = {**os.environ, "MTL_FAST_CACHE_DIR": str(output / "cache")}
    results: dict[tuple[str, str], dict[str, Any] | str] = {}
    measured: dict[Any, str] = {}  # settings of pre-training → the recipe that measured them
    for name in arguments.presets:
        config = settings(name, data_of(arguments), quick=arguments.quick)
        for phase in PHASES:
            if phase == "pretrain":
                same = (config.data, config.encoder, config.pretrain)
                if from_random_weights(config):
                    results[name, phase] = "none"
                    continue
                if measured.setdefault(same, name) != name:
                    results[name, phase] = f"as {measured[same]}"
                    continue
            file = output / f"{name}-{phase}.json"
            if not file.exists() or not how(arguments).items() <= json.loads(file.read_text("utf-8")).items():
                print(f"{name}, {phase}: {arguments.iterations} iterations", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--measure", name, phase, "--output", str(output)]
                command += ["--iterations", str(arguments.iterations)]
                command += ["--validation-tasks", str(arguments.validation_tasks)]
                command += ["--quick"] * arguments.quick
                subprocess.run(command, check=True, env=environment)
            results[name, phase] = json.loads(file.read_text("utf-8"))
    text = table(results)
    (output / "rehearsal.md").write_text(text + "\n", encoding="utf-8")
    return text


def main() -> None:
    from mtl_fast.config import RECIPES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument("--presets", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument(
        "--validation-tasks", type=int, default=4, help="tasks on which a validation is measured"
    )
    parser.add_argument(
        "--quick", action="store_true", help="slim networks and few images, to test this tool"
    )
    parser.add_argument("--measure", nargs=2, metavar=("PRESET", "PHASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        from mtl_fast.training.run import write_text

        found = measure(*arguments.measure, arguments)
        write_text(arguments.output / f"{'-'.join(arguments.measure)}.json", json.dumps(found))
        return
    print(rehearse(arguments))


if __name__ == "__main__":
    main()
