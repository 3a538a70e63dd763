"""Train the small model that the package ships for Glyphs, and pack it: mtl_fast/models/glyphs.safetensors.

    python tools/ship_model.py [--runs FOLDER] [--output FILE]

The recipe `glyphs`, 1-shot, seed 0: pre-training, then scale and shift with hard tasks, minutes on one core. It can be
stopped and goes on where it was. One thread computes, so that the number of cores moves no bit.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mtl_fast.config import EvaluationConfig, preset
from mtl_fast.training.evaluate import Score, drawn_episodes, score
from mtl_fast.training.experiment import Experiment
from mtl_fast.training.models import SHIPPED, Model, load_model, save_model, weights_of
from mtl_fast.training.rows import SS_HT
from mtl_fast.training.statistics import paired_difference

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "make shipped-model"


def packed(model: Model) -> dict[str, Tensor]:
    """The tensors of a model with Φ_S1 a kernel, its scaled convolutions in a quarter of their size.

    W ⊙ Φ_S1 ≈ Q ⊙ s: Q int8 in -127..127 stands where W stood, s [O, 1, 1, 1], one step a filter, where Φ_S1 did.
    `load_model` multiplies them, so that what comes out is an ordinary model whose Φ_S1 is 1.
    """
    tensors = weights_of(model.encoder, model.head)
    for name, scale in list(tensors.items()):
        if not name.endswith(".scale"):
            continue
        weight = name.removesuffix("scale") + "weight"
        product = tensors[weight] * scale
        step = (product.abs().amax(dim=(1, 2, 3), keepdim=True) / 127).clamp_min(
            1e-12
        )  # a filter may be all zeros
        tensors[weight], tensors[name] = (product / step).round().to(torch.int8), step
    return tensors


def ship(model: Model, output: Path) -> Model:
    """Writes the packed model, with where it comes from in its header, and reads it."""
    facts = {name: model.meta[name] for name in ("validation_accuracy", "curve", "tasks")}
    config = replace(model.config, meta=replace(model.config.meta, granularity="filter"))
    save_model(
        output,
        "meta",
        config,
        packed(model),
        image_size=model.image_size,
        made_by=COMMAND,
        trained=model.meta["provenance"] | {"granularity": model.config.meta.granularity},
        storage="scaled weights int8: W ⊙ Φ_S1 of training, in steps of Φ_S1 here, one a filter",
        **facts,
    )
    return load_model(output)


def validated(model: Model, experiment: Experiment) -> Score:
    """On 600 tasks of the validation split, the same for every model."""
    config = replace(model.config, evaluation=EvaluationConfig(n_tasks=600, split="val"))
    store = experiment.stores["val"]
    return score(model, config, store, drawn_episodes(config, store))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "shipped", help="folder of the training")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experiment = Experiment(replace(preset("glyphs"), device="cpu"), arguments.runs)
    trained = experiment.meta_train(SS_HT, 1)
    before = validated(trained, experiment)
    small = ship(trained, arguments.output)
    after = validated(small, experiment)
    moved = paired_difference(after.task_accuracy, before.task_accuracy)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")
    print(f"as trained: {before}; as shipped: {after}; difference {moved.percent(signed=True)}")
    print(json.dumps(small.meta["trained"], indent=1))


if __name__ == "__main__":
    main()
