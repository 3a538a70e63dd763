"""Commands around training: kernels, this machine, data, features, labels for own images, weights from and for others."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .errors import InputError


@dataclass(frozen=True)
class Build:
    """Compile the native CPU kernels for this processor, into the user's cache folder; seconds when up to date."""

    sanitize: bool = False
    """With address and undefined-behaviour sanitizers, beside the usual library; `make sanitize` uses it."""
    optional: bool = False
    """Where there is no compiler, say so and succeed: everything runs without these kernels, more slowly."""
    verbose: bool = False
    """Show the compiler's commands and output."""
    quiet: bool = False
    """Print the library's path only."""

    def run(self) -> None:
        from .kernels.native import build

        start = time.perf_counter()
        try:
            path = build.build_for_this_processor(sanitize=self.sanitize, verbose=self.verbose)
        except build.BuildError as error:
            if not (self.optional and isinstance(error, build.NoCompilerError)):
                raise InputError(str(error)) from error
            print(f"native kernels are not built: {error}")
            return
        if self.quiet:
            print(path)
            return
        print(f"native kernels: {path} ({time.perf_counter() - start:.1f} s)")
        # A process that did not start with the sanitizers' runtime cannot load a library that needs it.
        if not self.sanitize:
            from .ops import why

            print(f"ss_conv runs on {why('ss_conv')}")


@dataclass(frozen=True)
class Doctor:
    """What is installed, which backend runs each operation and why, a self-test of seconds, and what to do."""

    self_test: bool = True
    """Compute a little and compare; off, only look."""

    def run(self) -> int:
        from .doctor import doctor

        return doctor(self_test=self.self_test)


@dataclass(frozen=True)
class Tune:
    """Measure on this GPU which convolution each layer takes, ours or cuDNN's, and store the table that says so."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Output channels of the blocks of ResNet-12."""
    image_sizes: tuple[int, ...] = (84, 32)
    """Height and width of the images."""
    precisions: tuple[Literal["bf16", "fp16", "fp32"], ...] = ("bf16",)
    """Of the images and activations."""
    n_images: int = 160
    """In one batch."""
    device: str = "cuda"
    """`cuda` or `cuda:1`, …"""

    def run(self) -> None:
        from .tune import tune

        path = tune(**{name: getattr(self, name) for name in self.__dataclass_fields__})
        print(f"routes: {path}")


@dataclass(frozen=True)
class Data:
    """Look into data before a run: `mtl-fast data info PATH` says what it is, and draws some of it."""

    action: tyro.conf.Positional[Literal["info"]]
    """Format, classes, images, sizes, statistics, what splits share; and contact_sheet.png."""
    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A folder or file of images, or `glyphs`."""
    output: Path = Path("runs/data")
    """Folder for contact_sheet.png."""
    image_size: int | None = None
    """Height and width in pixels to bring images to; None takes them as they are."""
    channel_order: Literal["auto", "rgb", "bgr"] = "auto"
    """Of files that do not tell whether red or blue comes first; `auto` is the format's habit."""
    crop_to_box: bool = False
    """Crop each image to the box around its object, where the data set has boxes."""

    def run(self) -> None:
        from .data.contact_sheet import write_contact_sheet
        from .data.dataset import Options
        from .data.info import inspect_data
        from .training.run import make_folder

        info = inspect_data(self.path, Options(self.image_size, self.channel_order, self.crop_to_box))
        make_folder(self.output)
        sheet = self.output / "contact_sheet.png"
        write_contact_sheet(sheet, {name: split.store for name, split in info.splits.items()})
        print(f"{info}\nSome of it: {sheet}")


@dataclass(frozen=True)
class Embed:
    """Embed every image of a split once, into a file that `evaluate --embeddings` tests without images."""

    checkpoint: Path
    """Model file, or run folder, of `pretrain` or `meta-train`."""
    output: Path
    """File to write, such as features.safetensors."""
    data: str | None = None
    """Another data source than the one trained on."""
    split: Literal["train", "val", "test"] = "test"
    """Which split."""
    mirror: bool = False
    """Embed the mirror images as well, for evaluation.mirror-support."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, …"""

    def run(self) -> None:
        from .training.embeddings import embed_split
        from .training.ranks import refuse_ranks

        refuse_ranks("embed")
        store = embed_split(**{name: getattr(self, name) for name in self.__dataclass_fields__})
        print(f"embeddings: {self.output} ({store.n_images} images, {store.n_classes} classes)")


@dataclass(frozen=True)
class Predict:
    """Label your own images from a few examples a class: prints a table, writes a CSV and a picture."""

    support: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SUPPORT")]
    """Folder with a folder of examples for each class."""
    images: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[IMAGES]")] = None
    """Images to label, a folder or one image; without it, those beside the class folders."""
    checkpoint: Path | None = None
    """Model file, or run folder; without it, the small model for written characters that comes with the package."""
    output: Path = Path("runs/predict")
    """Folder for predictions.csv and predictions.png."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, …"""

    def run(self) -> None:
        from .training.predict import PICTURE, TABLE, predict_images

        options = {name: getattr(self, name) for name in ("checkpoint", "output", "device")}
        found = predict_images(self.support, self.images, **options)
        print(f"{found}\nall of it: {self.output / TABLE}; seen at a glance: {self.output / PICTURE}")


@dataclass(frozen=True)
class Presets:
    """The recipes for --preset: what each sets otherwise than `paper`, and what a data set of the paper changes."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Recipes to show, such as tensorflow or tensorflow-fc100; by default all."""
    json: bool = False
    """All settings and the differences as JSON."""

    def run(self) -> None:
        from .recipe_table import recipes_as_json, recipes_as_text

        print((recipes_as_json if self.json else recipes_as_text)(self.names))


@dataclass(frozen=True)
class Import:
    """Make a model file of weights from elsewhere: MTL's TensorFlow .npy or PyTorch .pth, or LibFewShot's .pth."""

    files: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="(required)"),
    ]
    """A .pth, or TensorFlow's weights.npy with, of a meta-trained model, its ss_weights.npy and fc_weights.npy."""
    output: Path
    """Model file to write, such as model.safetensors."""
    format: Literal["auto", "tensorflow", "pytorch", "libfewshot"] = "auto"
    """Whose files they are; `auto` looks inside."""
    image_size: int | None = None
    """Height and width of the images it is for; by default those its program uses."""

    def run(self) -> None:
        from .training.import_weights import import_weights
        from .training.ledger import table

        imported = import_weights(self.files, self.output, format=self.format, image_size=self.image_size)
        print("\n".join(table(imported.entries)))
        print(f"{imported} in {self.output}")


@dataclass(frozen=True)
class Export:
    """Write a model for other programs: its tensors, or a network with scale, shift and norms folded in."""

    checkpoint: tyro.conf.Positional[Path]
    """Model file, or run folder, of `pretrain`, `meta-train` or `import`."""
    output: Path
    """File to write, such as features.onnx."""
    format: Literal["state-dict", "torch", "onnx"]
    """Tensors for torch.load; an ordinary network for torch.export.load (.pt2); or ONNX."""

    def run(self) -> None:
        from .training.export_weights import export_weights

        print(export_weights(self.checkpoint, self.output, format=self.format))
