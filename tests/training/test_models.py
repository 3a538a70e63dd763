"""Networks from settings, devices, and model files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.config import EncoderConfig
from mtl_fast.data import load_split
from mtl_fast.errors import InputError
from mtl_fast.nn import Conv4, LinearHead, ResNet12, ResNet25
from mtl_fast.random_streams import RandomStreams
from mtl_fast.training import checkpoint
from mtl_fast.training.models import (
    Model,
    architecture,
    build_encoder,
    device_of,
    fingerprint,
    learnable,
    load_model,
    load_weights,
    new_head,
    split_for,
    square_size,
    weights_of,
)
from tests.data.copies import TIERED_IMAGES, TIERED_LABELS, cub, tiered
from tests.training import tiny
from tests.training.tiny import CONFIG

WIDTHS = (3, 5, 4, 7)


def encoder_of(seed: int = 0, **changes: object) -> ResNet12:
    config = replace(CONFIG.encoder, widths=WIDTHS, **changes)  # type: ignore[arg-type]
    encoder = build_encoder(config, image_size=16, generator=torch.Generator().manual_seed(seed))
    assert isinstance(encoder, ResNet12)
    return encoder


def test_an_encoder_is_what_its_settings_say() -> None:
    common, authors = encoder_of(), encoder_of(form="tensorflow", shortcut_scale_shift=True)
    assert [block.convs[2].weight.shape[0] for block in common.layers] == list(WIDTHS)
    assert all(block.shortcut.norm is not None for block in common.layers)
    assert all(block.shortcut.norm is None for block in authors.layers)
    assert (common.dropout, common.shortcut_scale_shift, authors.shortcut_scale_shift) == (0.1, False, True)
    conv4 = build_encoder(EncoderConfig("conv4", widths=(6,)), image_size=37)
    assert isinstance(conv4, Conv4)
    assert conv4.feature_dim == 6 * 2 * 2
    assert conv4(torch.zeros(1, 3, 37, 37)).shape == (1, 24)
    resnet25 = build_encoder(EncoderConfig("resnet25", widths=(6, 7, 9), dropout=0.2), image_size=5)
    assert isinstance(resnet25, ResNet25)
    assert resnet25.dropout == 0.2
    assert resnet25.eval()(torch.zeros(1, 3, 5, 5)).shape == (1, 9)


def test_initial_weights_come_from_the_stream() -> None:
    one, same, other = (weights_of(encoder_of(seed)) for seed in (3, 3, 4))
    assert tiny.same_tensors(one, same)
    assert not tiny.same_tensors(one, other)


@pytest.mark.parametrize("name", ["resnet12", "conv4"])
def test_images_too_small_for_four_poolings_are_named(name: str) -> None:
    config = EncoderConfig(name, widths=(2, 2, 2, 2))  # type: ignore[arg-type]
    assert build_encoder(config, image_size=16)(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    with pytest.raises(InputError, match=f"15×15 pixels are too small for {name}.*--data.image-size .* 16"):
        build_encoder(config, image_size=15)


@pytest.mark.parametrize("last_block_only", [False, True])
@pytest.mark.parametrize("learn", ["scale_shift", "weights", "head"])
def test_what_learns_is_what_was_named(learn: str, last_block_only: bool) -> None:
    encoder = encoder_of()
    encoder.train()
    opened = learnable(encoder, tiny.with_meta(learn=learn, last_block_only=last_block_only))
    assert not encoder.training
    names = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(opened) == len(names)
    blocks = {int(name.split(".")[1]) for name in names}
    assert blocks == (set() if learn == "head" else {3} if last_block_only else {0, 1, 2, 3})
    ends = {name.rsplit(".", 1)[1] for name in names if "norm" not in name}
    assert ends == {"scale_shift": {"scale", "shift"}, "weights": {"weight", "bias"}, "head": set()}[learn]
    assert not any("norm" in name for name in names)
    with_shortcut = any("shortcut" in name for name in names)
    assert with_shortcut == (learn == "weights")


@pytest.mark.parametrize("last_block_only", [False, True])
@pytest.mark.parametrize("learn", ["scale_shift", "weights", "head"])
def test_the_norms_affine_learns_beside_it(learn: str, last_block_only: bool) -> None:
    encoder, without = encoder_of(), encoder_of()
    meta = {"learn": learn, "last_block_only": last_block_only}
    n_without = len(learnable(without, tiny.with_meta(**meta)))
    opened = learnable(encoder, tiny.with_meta(**meta, train_affine=True))
    names = {name for name, p in encoder.named_parameters() if p.requires_grad and "norm" in name}
    assert len(opened) == n_without + len(names)
    assert len(names) == 2 * 4 * (1 if last_block_only else 4)
    assert {int(name.split(".")[1]) for name in names} == ({3} if last_block_only else {0, 1, 2, 3})


def test_a_shift_may_keep_to_the_convolutions_with_a_bias() -> None:
    config = EncoderConfig("resnet25", widths=(4, 4, 4))
    for shift, n_shifts in (("every", 28), ("biased", 1)):
        encoder = build_encoder(config, image_size=16)
        learnable(encoder, tiny.with_meta(shift=shift))
        assert sum(conv.shift is not None for conv in encoder.convs()) == n_shifts
        assert all(conv.scale is not None for conv in encoder.convs())


@pytest.mark.parametrize(("granularity", "shape"), [("kernel", (5, 3, 1, 1)), ("filter", (5, 1, 1, 1))])
def test_granularity_is_that_of_the_settings(granularity: str, shape: tuple[int, ...]) -> None:
    encoder = encoder_of()
    learnable(encoder, tiny.with_meta(granularity=granularity))
    scale = encoder.layers[1].convs[0].scale
    assert scale.shape == shape


def test_devices_have_names() -> None:
    for name in ("cpu", "cpu:0"):
        assert device_of(replace(CONFIG, device=name)) == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert device_of(replace(CONFIG, device="auto")).type == best
    for name, says in {
        "gpu": "is unknown; use auto, cpu, cuda or cuda:N",
        "": "is unknown",
        "meta": "is none that this package runs on",
    }.items():
        with pytest.raises(InputError, match=f"device {name!r} {says}"):
            device_of(replace(CONFIG, device=name))


def test_a_device_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="'cuda': this PyTorch sees no CUDA device; use --device cpu"):
        device_of(replace(CONFIG, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(replace(CONFIG, device="cuda:1")) == torch.device("cuda:1")
    with pytest.raises(InputError, match="'cuda:2': this machine has 2 CUDA devices"):
        device_of(replace(CONFIG, device="cuda:2"))


def test_a_gpu_named_by_its_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cpu", "cuda", "auto"):
        device_of(replace(CONFIG, device=name))
    assert current == []
    assert device_of(replace(CONFIG, device="cuda:1")) == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


def test_images_must_be_squares_of_one_size() -> None:
    a, b = tiny.a_store("a", 0, size=16), tiny.a_store("b", 0, size=18)
    wide = replace(a, images=a.images.repeat(1, 1, 2, 1), name="wide")
    assert square_size(a, a) == 16
    with pytest.raises(
        InputError, match=r"b: images are 18×18 pixels, those of a 16×16.*image-size, such as 16"
    ):
        square_size(a, b)
    with pytest.raises(InputError, match=r"wide: images are 32×16 pixels; .*--data.image-size, such as 16"):
        square_size(wide, wide)


def test_weights_go_out_and_come_back_to_the_bit() -> None:
    encoder, head = encoder_of(1), LinearHead(7, 3, generator=torch.Generator().manual_seed(0))
    tensors = weights_of(encoder, head)
    assert {name.partition(".")[0] for name in tensors} == {"encoder", "head"}
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())
    other, other_head = encoder_of(2), LinearHead(7, 3)
    strides = [p.stride() for p in other.parameters()]
    load_weights(tensors, other, other_head)
    assert tiny.same_tensors(weights_of(other, other_head), tensors)
    assert [p.stride() for p in other.parameters()] == strides
    # Copies: what trains on does not move them.
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(1)
    assert tiny.same_tensors(tensors, kept)


def test_weights_that_do_not_fit_are_named() -> None:
    tensors = weights_of(encoder_of(), LinearHead(7, 3))
    wider = build_encoder(replace(CONFIG.encoder, widths=(4, 5, 4, 7)), image_size=16)
    with_phi = encoder_of()
    learnable(with_phi, CONFIG)
    for encoder, head, says in (
        (wider, LinearHead(7, 3), "[3, 3, 1, 1] there and [4, 3, 1, 1] here"),
        (with_phi, LinearHead(7, 3), "here and unknown there"),
        (encoder_of(), LinearHead(7, 5), "head.weight is [3, 7] there and [5, 7] here"),
    ):
        with pytest.raises(InputError, match=re.escape(says)) as caught:
            load_weights(tensors, encoder, head)
        assert "\n" not in str(caught.value)


def test_a_fingerprint_tells_weights_apart() -> None:
    tensors = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert fingerprint(tensors) == fingerprint(dict(reversed(tensors.items())))
    assert fingerprint(tensors) != fingerprint({"a": torch.tensor([0.0, 0.0, -0.0]), "b": torch.ones(2)})
    assert fingerprint(tensors) != fingerprint({"c": torch.zeros(3), "b": torch.ones(2)})


def test_architecture_is_what_weights_need_alike() -> None:
    base = architecture(CONFIG, 16)
    trained_otherwise = replace(
        CONFIG, encoder=replace(CONFIG.encoder, dropout=0.5, shortcut_scale_shift=True)
    )
    assert architecture(trained_otherwise, 16) == base
    for other in (
        architecture(CONFIG, 32),
        architecture(replace(CONFIG, encoder=replace(CONFIG.encoder, form="tensorflow")), 16),
        architecture(replace(CONFIG, encoder=replace(CONFIG.encoder, widths=WIDTHS)), 16),
    ):
        assert other != base


def test_a_model_file_comes_back_as_network_and_head(pretrained: Path, meta_trained: Path) -> None:
    plain, meta = load_model(pretrained), load_model(meta_trained / "model.safetensors", kind="meta")
    assert plain.head is None
    assert plain.image_size == 16
    assert plain.path == pretrained / "model.safetensors"
    assert plain.config == CONFIG
    assert tiny.same_tensors(weights_of(plain.encoder), tiny.model_of(pretrained))
    assert meta.head is not None
    assert tiny.same_tensors(weights_of(meta.encoder, meta.head), tiny.model_of(meta_trained))
    assert list(meta.encoder.scale_shift_parameters())
    for model in (plain, meta):
        assert not model.encoder.training
        assert not any(p.requires_grad for p in model.encoder.parameters())


def test_files_that_are_no_such_model_are_named(pretrained: Path, meta_trained: Path, tmp_path: Path) -> None:
    for path, kind, says in (
        (
            meta_trained,
            "pretrained",
            "holds a meta model where a pretrained one is needed; `mtl-fast pretrain`",
        ),
        (pretrained, "meta", "holds a pretrained model where a meta one is needed; `mtl-fast meta-train`"),
        (pretrained / "checkpoint.safetensors", None, "is no model file (kind 'checkpoint')"),
        (tmp_path, None, "does not exist"),
        (tmp_path / "nothing", None, "does not exist"),
    ):
        with pytest.raises(InputError, match=re.escape(says)) as caught:
            load_model(path, kind=kind)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    payload = (pretrained / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(payload[: len(payload) // 2])
    with pytest.raises(InputError, match="cut short"):
        load_model(tmp_path)


def trained_on(folder: Path, **data: Any) -> Model:
    """A model whose images came from elsewhere, or were read otherwise."""
    model = load_model(folder)
    return replace(model, config=replace(CONFIG, data=replace(CONFIG.data, **data)))


def test_other_data_are_cropped_to_their_boxes_as_those_of_training(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained_on(pretrained, crop_to_box=True)
    birds = cub(tmp_path)
    found = split_for(model, str(birds), "test").images
    assert torch.equal(found, load_split(birds, "test", 16, crop_to_box=True).images)
    assert not torch.equal(found, load_split(birds, "test", 16).images)
    assert capsys.readouterr().err == ""
    folders = tiny.write_class_folders(tmp_path / "folders")
    for data in (str(folders), "glyphs"):
        assert torch.equal(split_for(model, data, "test").images, load_split(data, "test", 16).images)
        assert capsys.readouterr().err == (
            f"{data}: has no boxes; {model.path} was trained on crops to boxes, and sees whole images here\n"
        )


def test_other_data_are_read_in_the_channel_order_of_training(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained_on(pretrained, channel_order="rgb")
    arrays = tiered(tmp_path / "arrays", TIERED_IMAGES, TIERED_LABELS, "test")
    found = split_for(model, str(arrays), "test").images
    assert torch.equal(found, load_split(arrays, "test", 16, channel_order="rgb").images)
    assert capsys.readouterr().err == f"{arrays}: is read as RGB, as {model.path} was trained\n"
    folders = tiny.write_class_folders(tmp_path / "folders")
    assert torch.equal(split_for(model, str(folders), "test").images, load_split(folders, "test", 16).images)
    assert capsys.readouterr().err == (
        f"{folders}: tells its channel order; the RGB of {model.path} is not applied\n"
    )


def test_data_of_training_that_are_not_here_are_named_as_the_model_s(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = trained_on(pretrained, source="birds")
    with pytest.raises(InputError) as caught:
        split_for(model, None, "test")
    assert str(caught.value) == (
        f"{model.path}: was trained on birds, where nothing is from here; name its images with --data"
    )
    (tmp_path / "birds").mkdir()
    with pytest.raises(InputError, match="birds: holds nothing, which is no data set"):
        split_for(model, None, "test")


def test_a_model_file_says_where_it_comes_from(meta_trained: Path) -> None:
    meta = checkpoint.load(meta_trained / "model.safetensors")[1]
    assert meta["architecture"] == {
        "encoder": {"name": "resnet12", "form": "common", "widths": [4, 4, 4, 4]},
        "image_size": 16,
    }
    assert meta["provenance"]["torch"] == torch.__version__


def test_the_head_starts_from_the_initial_stream() -> None:
    encoder = encoder_of()
    heads = [new_head(CONFIG, encoder, RandomStreams(seed)) for seed in (0, 0, 1)]
    assert heads[0].weight.shape == (3, 7)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    zeros = new_head(tiny.with_meta(head_init="zeros"), encoder, RandomStreams(0))
    assert not zeros.weight.any()
