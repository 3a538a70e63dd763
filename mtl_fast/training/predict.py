"""Labels for one's own images from a few examples a class: a table, a CSV and a picture."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..classifier import FewShotClassifier
from ..data.support_folder import SupportFolder, read_images
from ..text_table import grid
from .folder_lock import FolderLock
from .models import SHIPPED
from .prediction_picture import prediction_picture
from .run import make_folder, write_bytes

TABLE, PICTURE = "predictions.csv", "predictions.png"
LONGEST_TABLE = 40  # rows; the CSV has all of them


@dataclass(frozen=True)
class Predictions:
    """What M images were taken for.

    Attributes:
        files: [M], below the folder that was given.
        class_names: [C].
        probabilities: float32 [M, C], of each image and class; a row sums to 1.
        images: uint8 [M, H, W, 3], as the network saw them.
        support: of each class its examples, uint8 [n, H, W, 3].
    """

    files: tuple[str, ...]
    class_names: tuple[str, ...]
    probabilities: NDArray[np.float32]
    images: NDArray[np.uint8]
    support: tuple[NDArray[np.uint8], ...]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """[M], the place of the likeliest class in `class_names`."""
        return self.probabilities.argmax(axis=1)

    @property
    def labels(self) -> tuple[str, ...]:
        """[M], the name of the likeliest class."""
        return tuple(self.class_names[i] for i in self.predicted)

    def __str__(self) -> str:
        """File, class and probability, the first images only where there are many."""
        shown = list(zip(self.files, self.labels, self.probabilities.max(axis=1), strict=True))
        body = [[_printable(file), _printable(label), f"{p:.1%}"] for file, label, p in shown[:LONGEST_TABLE]]
        more = f"\n… and {len(shown) - len(body)} more" if len(shown) > len(body) else ""
        return grid(["file", "class", "probability"], body, "plain") + more

    def save(self, folder: str | Path) -> None:
        """Writes predictions.csv (with the probability of every class) and predictions.png.

        Raises:
            InputError: they cannot be written.
        """
        folder = Path(folder)
        make_folder(folder)
        with FolderLock(folder):
            self._save(folder)

    def _save(self, folder: Path) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "class", "probability", *(f"p({name})" for name in self.class_names)])
        for file, label, row in zip(self.files, self.labels, self.probabilities, strict=True):
            writer.writerow([file, label, *(f"{p:.6f}" for p in (row.max(), *row))])
        # A name of a file that is no text keeps its bytes.
        write_bytes(folder / TABLE, text.getvalue().encode("utf-8", "surrogateescape"))
        prediction_picture(
            folder / PICTURE, self.support, self.class_names, self.images, self.predicted, self.probabilities
        )


def predict_images(
    support: str | Path,
    images: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
) -> Predictions:
    """Fits a model's head to the examples, by its inner loop, and labels the other images.

    Images of any size, in colour, grey or with transparency, are brought to the model's size by `read_images`; classes
    may have different numbers of examples. Images that lie elsewhere or are of other kinds are counted on the error
    stream.

    Args:
        support: a folder with a folder of examples for each class.
        images: the images to label, a folder at any depth or one image; None: those beside the class folders.
        checkpoint: model file, or run folder, of `pretrain`, `meta-train` or `import`; None: the small model for written
            characters that comes with the package.
        output: folder for predictions.csv and predictions.png; it may lie among the images. None writes nothing.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: folders or images that do not fit (see `SupportFolder` and `read_images`), or a model that
            `FewShotClassifier.load` refuses, or an output that cannot be written.
    """
    folder = None if output is None else Path(output)
    found = SupportFolder.find(support, images, written=None if folder is None else folder / PICTURE)
    classifier = FewShotClassifier.load(SHIPPED if checkpoint is None else checkpoint, device=device)
    assert classifier.image_size is not None  # a model file has one
    if folder is not None:
        make_folder(folder)  # before the work, not after it
    examples = [read_images(files, classifier.image_size) for files in found.support.values()]
    queries = read_images(found.unsorted, classifier.image_size)
    # Numbers keep the order of the folders.
    labels = np.repeat(np.arange(len(examples)), [len(each) for each in examples])
    classifier.fit(np.concatenate(examples), labels)
    predictions = Predictions(
        tuple(str(file.relative_to(found.root)) for file in found.unsorted),
        tuple(found.support),
        classifier.predict_proba(queries),
        queries,
        tuple(examples),
    )
    if folder is not None:
        predictions.save(folder)
    return predictions


def _printable(text: str) -> str:
    """Names of files may hold what no terminal shows: line breaks, and bytes that are no text."""
    return "".join(c if c.isprintable() else "�" for c in text)
