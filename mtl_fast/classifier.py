"""A few labelled images in, labels of others out: `fit`, `predict`, `predict_proba`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .config import Config
from .data.arrays import Layout, as_tensor, code_labels
from .data.store import ImageStore
from .engine.base import require_evaluation_mode
from .engine.evaluate import embed_rows
from .engine.inputs import Preprocess
from .errors import InputError
from .nn.encoder import Encoder
from .nn.linear_head import LinearHead
from .ops.base_learner import fit_heads
from .training.models import device_of, load_model, preprocess_of

Size = tuple[int, int]  # height and width


class FewShotClassifier:
    """Fits the head θ to a few labelled images, by the inner loop, and classifies others; scikit-learn's habits.

    Any number of classes from two, any number of images a class: the loss is the mean over all images. Where
    `head` has as many classes, the inner loop starts at its (meta-learned) θ, else at zero. Images are embedded
    with the stored statistics, each by itself, `images_per_chunk` at a time.

    Images are one of

    - with `preprocess`: whatever `ImageStore.from_arrays` takes (uint8, or floating in 0..1; [N, H, W, 3],
      [N, 3, H, W], [N, H, W], or a sequence of images); `preprocess` normalises them;
    - without: an array or a tensor [N, 3, H, W], floating, as the encoder takes it;
    - features [N, D] of one's own, floating, an array or a tensor: no encoder is asked.

    Args:
        encoder: Θ with Φ, in evaluation mode; None for features only.
        head: θ, or None.
        preprocess: how images were normalised in training.
        image_size: refuse images of another height or width; None takes any in `fit`, and then only such in `predict`.
        layout: ``HWC`` or ``CHW``, where the shape leaves it open.
        inner_lr, inner_steps: of the inner loop.
        images_per_chunk: images embedded together.
        backend: of the base-learner.

    Attributes:
        classes_: [C], the distinct labels in ascending order, after `fit`.
        weight_, bias_: the fitted head θ', [C, D] and [C].
    """

    classes_: NDArray[Any]
    weight_: Tensor
    bias_: Tensor
    _fitted_size: Size | None = None

    def __init__(
        self,
        encoder: Encoder | None = None,
        head: LinearHead | None = None,
        *,
        preprocess: Preprocess | None = None,
        image_size: int | None = None,
        layout: Layout | None = None,
        inner_lr: float = 0.05,
        inner_steps: int = 100,
        images_per_chunk: int = 256,
        backend: str = "auto",
    ) -> None:
        if images_per_chunk < 1:
            raise InputError(f"images_per_chunk is {images_per_chunk}; it must be at least 1")
        self.encoder, self.head, self.preprocess = encoder, head, preprocess
        self.image_size, self.layout = image_size, layout
        self.inner_lr, self.inner_steps = inner_lr, inner_steps
        self.images_per_chunk, self.backend = images_per_chunk, backend

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", **options: Any) -> FewShotClassifier:
        """The classifier of a model file, with its normalisation, inner loop and (after meta-training) θ.

        Args:
            path: the file, or the folder of the run that wrote it.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            options: arguments of the class that go before the model's own.

        Raises:
            InputError: no model file, or one whose features depend on the whole task (norm `episode`) or whose inner
                loop adapts all weights.
        """
        model = load_model(path, device=device_of(replace(Config(), device=device)))
        config = model.config
        if config.inner.adapt == "all":
            raise InputError(
                f"{model.path}: its inner loop adapts all weights (inner.adapt all); FewShotClassifier fits the head "
                "alone, `mtl-fast evaluate` tests such models"
            )
        if model.norm == "episode":
            raise InputError(
                f"{model.path}: its norm takes the statistics of each task (norm episode, or an import without statistics), "
                "so features depend on the whole task; FewShotClassifier has stored statistics only"
            )
        own: dict[str, Any] = {
            "preprocess": preprocess_of(config),
            "image_size": model.image_size,
            "inner_lr": config.inner.lr_at_test,
            "inner_steps": config.inner.test_steps,
        }
        return cls(model.encoder, model.head, **(own | options))

    @torch.no_grad()
    def fit(self, support: Any, labels: Any) -> FewShotClassifier:
        """Fits θ' to N labelled images; itself.

        Args:
            support: images or features, see the class.
            labels: N numbers, strings or other hashable values.

        Raises:
            InputError: no images, fewer than two classes, or images or labels of another form; one line.
        """
        values, codes = code_labels(labels)
        if len(codes) != len(support):
            raise InputError(f"labels: {len(codes)} for {len(support)} images; give one each")
        if len(values) == 1:
            raise InputError(f"labels: all are {values[0]!r}; there must be at least two classes")
        features, size = self._features(support, None)
        weight, bias = self._start(len(values), features)
        weights, biases = fit_heads(
            features[None],
            codes[None].to(features.device),
            weight,
            bias,
            inner_lr=self.inner_lr,
            n_steps=self.inner_steps,
            order="first",
            backend=self.backend,
        )
        self.weight_, self.bias_ = weights[0].clone(), biases[0].clone()
        self.classes_, self._fitted_size = _array(values), size
        return self

    def predict(self, query: Any) -> NDArray[Any]:
        """The label of each of M images or features, [M], as it was given to `fit`.

        Raises:
            InputError: before `fit`, or as there.
        """
        logits = self._logits(query)
        return self.classes_[logits.argmax(dim=1).cpu().numpy()]

    def predict_proba(self, query: Any) -> NDArray[Any]:
        """The probability of each class, [M, C], columns as `classes_`; at least float32; errors as `predict`."""
        logits = self._logits(query)
        wide = torch.promote_types(logits.dtype, torch.float32)  # NumPy has no bfloat16
        return logits.to(wide).softmax(dim=1).cpu().numpy()

    @torch.no_grad()
    def _logits(self, query: Any) -> Tensor:
        """[M, C]"""
        if not hasattr(self, "weight_"):
            raise InputError("FewShotClassifier: is not fitted yet; call fit(support, labels) first")
        features, _ = self._features(query, self._fitted_size)
        if features.shape[1] != self.weight_.shape[1]:
            raise InputError(
                f"features: have width {features.shape[1]}, those of fit had {self.weight_.shape[1]}"
            )
        return F.linear(features.to(self.weight_), self.weight_, self.bias_)

    def _start(self, n_classes: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """The head's weight and bias before the inner loop."""
        if self.head is not None and len(self.head.weight) == n_classes:
            return self.head.weight, self.head.bias
        return features.new_zeros(n_classes, features.shape[1]), features.new_zeros(n_classes)

    def _features(self, images: Any, size: Size | None) -> tuple[Tensor, Size | None]:
        """[N, D] of images or features, and the images' height and width, which must be `size` if that is given."""
        if len(images) == 0:
            raise InputError("images: there are none")
        parameter = next(
            (p for m in (self.encoder, self.head) if m is not None for p in m.parameters()), None
        )
        shape = list(images.shape) if isinstance(images, (Tensor, np.ndarray)) else []
        if len(shape) == 2:
            features = as_tensor(images)
            if not features.is_floating_point():
                raise InputError(f"features: [N, D] must be floating, got {features.dtype}")
            return (features if parameter is None else features.to(parameter)), size
        if self.encoder is None:
            raise InputError(
                "images: this classifier has no encoder; give features, an array or a tensor [N, D]"
            )
        if len(shape) == 3 and shape[2] == 3 and self.layout is None:
            raise InputError(
                f"images: {shape} is a single one; give [N, H, W, 3] (images[None]), or say layout='HWC' if it is "
                f"{shape[0]} grey ones"
            )
        chunks = []
        for start in range(0, len(images), self.images_per_chunk):
            chunk = images[start : start + self.images_per_chunk]
            features, size = self._embed(self.encoder, chunk, parameter, size)
            chunks.append(features)
        return torch.cat(chunks), size

    def _embed(
        self, encoder: Encoder, images: Any, parameter: Tensor | None, size: Size | None
    ) -> tuple[Tensor, Size]:
        """[N, D] of the images of one chunk, and their size."""
        if self.preprocess is None:
            if not isinstance(images, (Tensor, np.ndarray)) or images.ndim != 4:
                raise InputError("images: without preprocess, give an array or a tensor [N, 3, H, W]")
            inputs = as_tensor(images)
            if not inputs.is_floating_point():
                raise InputError(
                    f"images: are {inputs.dtype}; an encoder takes floating ones, or give preprocess=Preprocess(…)"
                )
            found = self._checked_size(inputs.shape[2:], size)
            require_evaluation_mode(encoder)
            return encoder.embed(inputs if parameter is None else inputs.to(parameter)).features, found
        store = ImageStore.from_arrays(images, [0] * len(images), layout=self.layout)
        found = self._checked_size(store.image_size, size)
        if parameter is not None:
            store = store.to(parameter.device)
        rows = torch.arange(store.n_images, device=store.device)
        features = embed_rows(encoder, store, rows, self.preprocess, images_per_chunk=self.images_per_chunk)
        return features, found

    def _checked_size(self, found: Sequence[int], size: Size | None) -> Size:
        """Height and width of images; they must be the model's, or else those that came before."""
        height, width = found
        if self.image_size is not None and (height, width) != (self.image_size, self.image_size):
            raise InputError(
                f"images: are {width}×{height} pixels, the model takes {self.image_size}×{self.image_size}; "
                "resize them as in training"
            )
        if size is not None and (height, width) != size:
            raise InputError(
                f"images: are {width}×{height} pixels, those before them (of fit) {size[1]}×{size[0]}; resize them "
                "to one size"
            )
        return height, width


def _array(values: tuple[Hashable, ...]) -> NDArray[Any]:
    """Labels as an array: numbers or strings of one kind as such, others as objects."""
    if len({type(value) for value in values}) == 1 and isinstance(values[0], (bool, int, float, str)):
        array = np.array(values)
        if type(array.tolist()[0]) is type(values[0]):  # not so for integers beyond int64: they become floats
            return array
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value  # one by one: a tuple stays a tuple
    return array
