"""`FewShotClassifier` against gradient descent written out; every form of images and labels; model files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_fast import FewShotClassifier
from mtl_fast.data.store import ImageStore
from mtl_fast.engine import Preprocess, embed_rows, evaluate
from mtl_fast.errors import InputError
from mtl_fast.nn import Embeddings, Encoder, LinearHead, NetworkEncoder, convert
from mtl_fast.training.meta_train import MetaTraining
from mtl_fast.training.models import load_model
from tests.conv_cases import assert_near
from tests.engine.cases import PREPROCESS, fitted, images, make_encoder, tasks
from tests.nn.user_network import user_images, user_network
from tests.training import tiny

# Twelve layers of about 60 terms and the inner loop over all of it.
TOLERANCE = 1000 * 12 * 60**0.5 * torch.finfo(torch.float64).eps
PREPROCESS_TINY = Preprocess(tiny.CONFIG.data.mean, tiny.CONFIG.data.std)
LABELS = ["wren", "tit", "wren", "jay", "jay", "wren", "tit"]
ORDER = ["jay", "tit", "wren"]


def features(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(n_way: int, feature_dim: int = 6) -> LinearHead:
    return LinearHead(feature_dim, n_way, generator=torch.Generator().manual_seed(1)).double()


def expected_logits(support: Tensor, labels: list[str], query: Tensor, start: LinearHead | None) -> Tensor:
    weight = torch.zeros(3, support.shape[1], dtype=support.dtype) if start is None else start.weight
    bias = torch.zeros(3, dtype=support.dtype) if start is None else start.bias
    codes = torch.tensor([ORDER.index(label) for label in labels])
    w, b = fitted(support, codes, weight, bias, 0.3, 12, "first")
    return (query @ w.T + b).detach()


@pytest.mark.parametrize("n_way", [None, 3, 5], ids=["no-head", "its-head", "another-head"])
def test_it_is_gradient_descent_of_a_head(n_way: int | None) -> None:
    start = None if n_way is None else head(n_way)
    classifier = FewShotClassifier(head=start, inner_lr=0.3, inner_steps=12)
    assert classifier.fit(features(7), LABELS) is classifier
    query = features(20, seed=2)
    logits = expected_logits(features(7), LABELS, query, start if n_way == 3 else None)
    assert classifier.classes_.tolist() == ORDER
    assert classifier.predict(query).tolist() == [ORDER[i] for i in logits.argmax(dim=1)]
    probabilities = classifier.predict_proba(query)
    assert_near(torch.from_numpy(probabilities), logits.softmax(dim=1), TOLERANCE)
    assert_near(
        torch.from_numpy(classifier.predict_proba(query.float().numpy())),
        logits.softmax(dim=1),
        100 * torch.finfo(torch.float32).eps,
    )
    assert classifier.weight_.shape == (3, 6)
    if start is not None:
        assert torch.equal(start.weight, head(n_way or 0).weight)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([9, 4, 9, 7, 7, 9, 4], "i"),
        (np.array([9, 4, 9, 7, 7, 9, 4], dtype=np.int16), "i"),
        (torch.tensor([9, 4, 9, 7, 7, 9, 4]), "i"),
        (LABELS, "U"),
        (np.array(LABELS), "U"),
        ([0.5, 0.25, 0.5, 1.0, 1.0, 0.5, 0.25], "f"),
        ([label == "wren" for label in LABELS], "b"),
        ([("bird", label) for label in LABELS], "O"),
        ([None if label == "jay" else label for label in LABELS], "O"),
        ([2**63 if label == "jay" else -1 for label in LABELS], "O"),
    ],
    ids=["int", "int16", "tensor", "str", "str-array", "float", "bool", "tuple", "mixed", "huge"],
)
def test_predictions_are_the_caller_s_labels(labels: Any, kind: str) -> None:
    # Each support feature is an axis of its own: far enough along it, its own label is the answer.
    support = 10 * torch.eye(7)
    predicted = FewShotClassifier(inner_lr=0.5).fit(support, labels).predict(support)
    assert predicted.dtype.kind == kind
    assert predicted.tolist() == (labels if isinstance(labels, list) else labels.tolist())


def test_a_copy_of_the_head_when_there_are_no_steps() -> None:
    start = head(3)
    classifier = FewShotClassifier(head=start, inner_steps=0).fit(features(7), LABELS)
    with torch.no_grad():
        start.weight.zero_()
    assert torch.equal(classifier.weight_, head(3).weight)


def of_images(**options: Any) -> FewShotClassifier:
    options = {"preprocess": PREPROCESS, "inner_lr": 0.3, "inner_steps": 12, **options}
    return FewShotClassifier(make_encoder(), head(3, 7), **options)


@pytest.mark.parametrize("images_per_chunk", [1, 3, 256])
def test_images_of_every_form_are_embedded_a_chunk_at_a_time(
    small_store: ImageStore, images_per_chunk: int
) -> None:
    pixels, encoder = small_store.images[:30], make_encoder()
    embedded = encoder.embed(images(small_store, torch.arange(30), torch.float64)).features.detach()
    logits = expected_logits(embedded[:7], LABELS, embedded[7:], head(3, 7))
    forms: list[Any] = [
        pixels,
        pixels.numpy(),
        pixels.permute(0, 3, 1, 2),
        pixels.double() / 255,
        list(pixels.numpy()),
    ]
    sizes: list[int] = []
    for form in forms:
        classifier = of_images(images_per_chunk=images_per_chunk)
        assert classifier.encoder is not None
        embed = classifier.encoder.embed
        classifier.encoder.embed = lambda x, embed=embed, **o: sizes.append(len(x)) or embed(x, **o)  # type: ignore
        found = classifier.fit(form[:7], LABELS).predict_proba(form[7:])
        assert_near(torch.from_numpy(found), logits.softmax(dim=1), TOLERANCE)
    assert max(sizes) == min(images_per_chunk, 23)
    assert sum(sizes) == 30 * len(forms)


def test_normalised_images_and_features_go_around_preprocess(small_store: ImageStore) -> None:
    inputs = images(small_store, torch.arange(12), torch.float64)
    expected = of_images().fit(small_store.images[:7], LABELS).predict_proba(small_store.images[7:12])
    found = of_images(preprocess=None).fit(inputs[:7], LABELS).predict_proba(inputs[7:].numpy())
    assert_near(torch.from_numpy(found), torch.from_numpy(expected), TOLERANCE)
    embedded = make_encoder().embed(inputs).features
    found = of_images().fit(embedded[:7], LABELS).predict_proba(embedded[7:].detach().float())
    assert_near(torch.from_numpy(found), torch.from_numpy(expected), 100 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_probabilities_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    support, query = features(7).to(dtype), features(20, seed=2).to(dtype)
    classifier = FewShotClassifier(inner_lr=0.3, inner_steps=12).fit(support, LABELS)
    found = torch.from_numpy(classifier.predict_proba(query))
    assert found.dtype == torch.float32
    assert_near(found.sum(dim=1), torch.ones(20), 4 * torch.finfo(torch.float32).eps)
    expected = expected_logits(support.double(), LABELS, query.double(), None).softmax(dim=1)
    # θ', six products and the logits are rounded to the dtype.
    assert_near(found.double(), expected, 8 * 6**0.5 * torch.finfo(dtype).eps)
    assert classifier.predict(query).tolist() == [ORDER[i] for i in found.argmax(dim=1)]
    encoder = make_encoder(dtype=dtype)
    inputs = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert FewShotClassifier(encoder).fit(inputs, LABELS).predict_proba(inputs).dtype == np.float32


def test_arrays_of_any_memory(small_store: ImageStore) -> None:
    """Backward strides, read-only memory and foreign byte order, which PyTorch takes none of."""
    inputs = images(small_store, torch.arange(12), torch.float64).numpy()
    embedded = features(12).numpy()
    for classifier, given in ((of_images(preprocess=None), inputs), (FewShotClassifier(), embedded)):
        expected = classifier.fit(given[:7], LABELS).predict_proba(given[7:])
        backward, foreign = given[::-1].copy()[::-1], given.astype(">f8")
        foreign.flags.writeable = False
        for other in (backward, foreign):
            assert np.array_equal(classifier.fit(other[:7], LABELS).predict_proba(other[7:]), expected)


class Pixels(Encoder):
    """All pixels as features; no parameter."""

    feature_dim = 3 * 16 * 16

    def embed(self, images: Tensor, **options: Any) -> Embeddings:
        return Embeddings(images.flatten(1), [])


def test_an_encoder_without_parameters(small_store: ImageStore) -> None:
    inputs = images(small_store, torch.arange(12), torch.float32)
    expected = FewShotClassifier().fit(inputs.flatten(1)[:7], LABELS).predict_proba(inputs.flatten(1)[7:])
    for preprocess, given in ((None, inputs), (PREPROCESS, small_store.images[:12])):
        classifier = FewShotClassifier(Pixels(), preprocess=preprocess).fit(given[:7], LABELS)
        found = torch.from_numpy(classifier.predict_proba(given[7:]))
        # 768 features of a hundred steps; the pixels' normalisation rounds in another order.
        assert_near(found, torch.from_numpy(expected), 100 * 768**0.5 * torch.finfo(torch.float32).eps)


def test_images_of_predict_are_of_the_size_of_fit(small_store: ImageStore) -> None:
    pixels, inputs = small_store.images[:12], images(small_store, torch.arange(12), torch.float64)
    for options, form, tall in (
        ({}, pixels, pixels.repeat(1, 2, 1, 1)),
        ({"preprocess": None}, inputs, inputs.repeat(1, 1, 2, 1)),
    ):
        classifier = of_images(images_per_chunk=2, **options).fit(form[:7], LABELS)
        with pytest.raises(
            InputError, match=r"images: are 16×32 pixels, those before them \(of fit\) 16×16; resize"
        ):
            classifier.predict(tall[7:])
        assert len(classifier.predict(form[7:])) == 5
        assert len(classifier.fit(tall[:7], LABELS).predict(tall[7:])) == 5
    with pytest.raises(InputError, match="images: are 16×32 pixels, those before them"):
        of_images(images_per_chunk=5).fit([*pixels[:5], *pixels[5:7].repeat(1, 2, 1, 1)], LABELS)


def test_a_single_image_is_no_batch(small_store: ImageStore) -> None:
    pixels = small_store.images[:8]
    classifier = of_images().fit(pixels[:7], LABELS)
    with pytest.raises(InputError, match=r"images: \[16, 16, 3\] is a single one; give \[N, H, W, 3\]"):
        classifier.predict(pixels[7])
    assert len(classifier.predict(pixels[7][None])) == 1
    classifier.layout = "HWC"
    with pytest.raises(InputError, match="images: are 3×16 pixels, those before them"):
        classifier.predict(pixels[7])
    grey = of_images().fit(pixels[:7, :, :, 0], LABELS)
    assert len(grey.predict(pixels[:, :, :, 0])) == 8


def test_a_user_s_network_without_a_head() -> None:
    network = user_network()
    x = user_images(12)
    classifier = FewShotClassifier(NetworkEncoder(convert(network), 10), inner_lr=0.3, inner_steps=12)
    embedded = network.eval()(x).detach()
    found = classifier.fit(x[:7], LABELS).predict_proba(x[7:])
    expected = expected_logits(embedded[:7], LABELS, embedded[7:], None).softmax(dim=1)
    assert_near(torch.from_numpy(found), expected, TOLERANCE)


def test_an_encoder_in_training_mode_with_dropout_is_an_error(small_store: ImageStore) -> None:
    for options in ({}, {"preprocess": None}):
        classifier = of_images(**options)
        assert classifier.encoder is not None
        classifier.encoder.train()
        given = small_store.images[:7] if not options else torch.zeros(7, 3, 16, 16)
        with pytest.raises(ValueError, match="training mode, with dropout"):
            classifier.fit(given, LABELS)


X = torch.zeros(7, 16, 16, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("options", "support", "labels", "message"),
    [
        ({}, X, LABELS[:6], "labels: 6 for 7 images; give one each"),
        ({}, X, ["wren"] * 7, "labels: all are 'wren'; there must be at least two classes"),
        ({}, X[:0], [], "images: there are none"),
        ({}, X.long(), LABELS, "images: are int64; give uint8"),
        ({"image_size": 32}, X, LABELS, "images: are 16×16 pixels, the model takes 32×32; resize"),
        ({"preprocess": None}, X, LABELS, "images: are torch.uint8; an encoder takes floating ones"),
        ({"preprocess": None}, list(X), LABELS, "images: without preprocess, give an array or a tensor"),
        ({"preprocess": None, "image_size": 32}, X.permute(0, 3, 1, 2).double(), LABELS, "16×16 pixels"),
        ({}, torch.zeros(7, 7, dtype=torch.int64), LABELS, r"features: \[N, D\] must be floating"),
    ],
    ids=["count", "one-class", "none", "kind", "size", "bytes", "list", "input-size", "features"],
)
def test_what_does_not_fit_is_named(options: Any, support: Any, labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        of_images(**options).fit(support, labels)


def test_other_wrong_inputs_are_named() -> None:
    with pytest.raises(InputError, match=r"not fitted yet; call fit\(support, labels\) first"):
        FewShotClassifier().predict(features(2))
    with pytest.raises(InputError, match="has no encoder; give features"):
        FewShotClassifier().fit(X, LABELS)
    with pytest.raises(InputError, match="features: have width 5, those of fit had 6"):
        FewShotClassifier().fit(features(7), LABELS).predict(features(2)[:, :5])
    with pytest.raises(InputError, match="images_per_chunk is 0; it must be at least 1"):
        FewShotClassifier(images_per_chunk=0)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    tiny.pretraining(folder, tiny.with_pretrain(epochs=1)).run()
    return folder


def meta_trained(folder: Path, pretrained: Path, **changes: Any) -> Path:
    config = tiny.with_meta(n_tasks=6, hard="none", validate_every=6, **changes)
    tiny.meta_training(folder, pretrained, config).run()
    return folder


def test_from_a_model_file_it_scores_as_the_evaluation_does(pretrained: Path, tmp_path: Path) -> None:
    folder = meta_trained(tmp_path / "ss", pretrained)
    store, model = tiny.split("test"), load_model(folder)
    episodes = tasks(store, 4)
    assert model.head is not None
    expected = evaluate(
        model.encoder,
        model.head,
        store,
        episodes,
        PREPROCESS_TINY,
        inner_lr=model.config.inner.lr,
        inner_steps=model.config.inner.test_steps,
    )
    classifier = FewShotClassifier.load(folder, device="cpu")
    for t in range(4):
        classifier.fit(store.images[episodes.support[t]], episodes.support_labels[t])
        assert (
            classifier.predict(store.images[episodes.query[t]]).tolist() == expected.predictions[t].tolist()
        )
    with pytest.raises(InputError, match="are 8×8 pixels, the model takes 16×16"):
        classifier.predict(store.images[:2, :8, :8])


def test_from_a_pretrained_model_it_starts_at_zero(pretrained: Path) -> None:
    classifier = FewShotClassifier.load(pretrained / "model.safetensors", inner_lr=0.5, device="cpu")
    assert classifier.head is None
    assert (classifier.inner_lr, classifier.inner_steps) == (0.5, tiny.CONFIG.inner.test_steps)
    assert classifier.preprocess == PREPROCESS_TINY
    store = tiny.split("test")
    found = classifier.fit(store.images[::12], store.labels[::12]).predict_proba(store.images)
    rows = torch.arange(store.n_images)
    embedded = embed_rows(load_model(pretrained).encoder, store, rows, PREPROCESS_TINY)
    plain = FewShotClassifier(inner_lr=0.5, inner_steps=tiny.CONFIG.inner.test_steps)
    expected = plain.fit(embedded[::12], store.labels[::12]).predict_proba(embedded)
    near = 1000 * torch.finfo(torch.float32).eps  # chunks of other sizes round differently
    assert_near(torch.from_numpy(found), torch.from_numpy(expected), near)


def test_a_model_of_episode_norm_is_refused(pretrained: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="batch statistics follow"):
        folder = meta_trained(tmp_path / "episode", pretrained, norm="episode")
    with pytest.raises(InputError, match="its norm takes the statistics of each task"):
        FewShotClassifier.load(folder)


def test_a_model_whose_inner_loop_adapts_all_weights_is_refused(tmp_path: Path) -> None:
    MetaTraining(tiny.MAML, None, tmp_path / "run", **tiny.splits()).run()
    with pytest.raises(InputError, match=r"its inner loop adapts all weights .* fits the head alone"):
        FewShotClassifier.load(tmp_path / "run")
