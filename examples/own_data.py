"""One's own images: arrays or a folder → store → sampler → engine → classifier.

Without an argument the images are tiles, drawn here: every class is a pattern of its own, every image shows it
in another place and light. With ``--folder`` they are yours, in class folders that no two splits share:
``FOLDER/{train,test}/<class>/*.jpg`` (png and webp too).

    python examples/own_data.py [--quick] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pretraining import pretrain

from mtl_fast import (
    EpisodeSampler,
    EpisodicEngine,
    FewShotClassifier,
    ImageStore,
    LinearHead,
    Preprocess,
    RandomStreams,
    ResNet12,
    evaluate,
    load_split,
)

IMAGE_SIZE = 32
INNER_LR, INNER_STEPS = 0.01, 20
PREPROCESS = Preprocess(mean=(127.5, 127.5, 127.5), std=(64.0, 64.0, 64.0))


def tiles(n_classes: int, n_images: int, seed: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Images [N, 32, 32, 3] and labels such as ``tile 07``: here would be your own data."""
    random = np.random.default_rng(seed)
    images, labels = [], []
    for c in range(n_classes):
        pattern = random.uniform(0, 1, (4, 4, 3)).repeat(8, axis=0).repeat(8, axis=1)
        for _ in range(n_images):
            shown = np.roll(pattern, random.integers(-6, 7, 2), axis=(0, 1))
            light, noise = random.uniform(0.3, 1.0), random.normal(0, 0.25, shown.shape)
            images.append(np.clip(255 * (light * shown + noise), 0, 255).astype(np.uint8))
            labels.append(f"tile {c:02}")
    return np.stack(images), labels


def stores(folder: Path | None, quick: bool) -> tuple[ImageStore, ImageStore]:
    """Training classes, and others for the test."""
    if folder is not None:
        return load_split(folder, "train", IMAGE_SIZE), load_split(folder, "test", IMAGE_SIZE)
    n_classes = 12 if quick else 60
    return (
        ImageStore.from_arrays(*tiles(n_classes, 20, seed=0), name="training tiles"),
        ImageStore.from_arrays(*tiles(12, 20, seed=1), name="test tiles"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Few-shot learning on one's own images.")
    parser.add_argument("--quick", action="store_true", help="a few seconds; the accuracy means little")
    parser.add_argument("--folder", type=Path, help="class folders, {train,test}/<class>/*.jpg")
    arguments = parser.parse_args()
    n_epochs, n_updates, n_tests = (8, 5, 20) if arguments.quick else (12, 100, 300)

    torch.manual_seed(0)
    streams = RandomStreams(0)
    train, test = stores(arguments.folder, arguments.quick)
    print(f"{train}\n{test}")

    encoder = ResNet12((8, 16, 24, 32), dropout=0.0)
    fitted = pretrain(encoder, encoder.feature_dim, train, PREPROCESS, n_epochs=n_epochs)
    print(f"pre-trained: {100 * fitted:.1f} % of the training images")

    encoder.enable_scale_shift("kernel")
    head = LinearHead(encoder.feature_dim, 5, init="zeros")
    engine = EpisodicEngine(encoder, head, train, PREPROCESS, inner_lr=INNER_LR, inner_steps=INNER_STEPS)
    sampler = EpisodeSampler(train, n_way=5, n_shot=1, n_query=5, generator=streams.stream("tasks"))
    optimizer = torch.optim.Adam([*encoder.scale_shift_parameters(), *head.parameters()], lr=1e-3)
    for _ in range(n_updates):
        optimizer.zero_grad()
        engine.step(sampler.sample(4))
        optimizer.step()

    tests = EpisodeSampler(test, 5, 1, 5, streams.stream("evaluation")).sample(n_tests)
    result = evaluate(encoder, head, test, tests, PREPROCESS, inner_lr=INNER_LR, inner_steps=INNER_STEPS)
    print(f"5-way 1-shot on {n_tests} tasks of the test classes: {100 * result.accuracy.mean():.1f} %")

    # At last what it is all for: a few labelled images of classes that no training saw, as many as there are.
    classifier = FewShotClassifier(
        encoder, head, preprocess=PREPROCESS, inner_lr=INNER_LR, inner_steps=INNER_STEPS
    )
    names = np.array(test.class_names)[test.labels.numpy()]
    shown = test.class_index[:, :3].flatten()  # three of each class
    rest = torch.ones(test.n_images, dtype=torch.bool).index_fill(0, shown, False).nonzero()[:, 0]
    classifier.fit(test.images[shown], names[shown])
    predicted, sure = classifier.predict(test.images[rest]), classifier.predict_proba(test.images[rest])
    right = predicted == names[rest]
    print(
        f"{test.n_classes} classes, three images each: {100 * right.mean():.1f} % of {len(rest)} others named"
    )
    for i in np.linspace(0, len(rest) - 1, 5).astype(int):
        print(f"  {names[rest[i]]:<12} called {predicted[i]:<12} ({100 * sure[i].max():.0f} % sure)")


if __name__ == "__main__":
    main()
