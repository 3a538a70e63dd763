"""The .pth files of MTL's PyTorch code and of LibFewShot: names, Φ, head, and what the network computes."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_fast.errors import InputError
from mtl_fast.training.import_state_dict import import_state_dict
from mtl_fast.training.import_weights import import_weights
from mtl_fast.training.models import Model, load_model
from tests.conv_cases import assert_near
from tests.training.foreign_networks import N_WAY, RESNET12, RESNET25, Learner, ResNet12, ResNet25, trained

# 25 layers of up to 72 terms.
TOLERANCE = 25 * 72**0.5 * 4 * torch.finfo(torch.float64).eps


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "source.pth")
    return folder / "source.pth"


def imported(folder: Path, content: Any, size: int = 20, **options: Any) -> Model:
    import_weights([saved(folder, content)], folder / "model.safetensors", image_size=size, **options)
    return load_model(folder)


def assert_computes_the_same(model: Model, network: nn.Module) -> None:
    x = torch.randn(3, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_near(model.encoder.double()(x), network.double()(x), TOLERANCE)


def test_the_names_are_those_of_the_public_programs() -> None:
    """Spelt out, so that the networks of these tests cannot agree with the import on wrong ones."""
    meta = Learner(ResNet25(mtl=True), "encoder", 8).state_dict()
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    for name in (
        "encoder.conv1.weight",
        "encoder.conv1.bias",
        "encoder.conv1.mtl_weight",
        "encoder.conv1.mtl_bias",
        *(f"encoder.bn1.{key}" for key in bn),
        "encoder.layer1.0.downsample.0.mtl_weight",
        *(f"encoder.layer3.0.downsample.1.{key}" for key in bn),
        "encoder.layer3.3.conv2.weight",
        "encoder.layer3.3.conv2.mtl_weight",
        "base_learner.fc1_w",
        "base_learner.fc1_b",
        "base_learner.vars.0",
        "base_learner.vars.1",
    ):
        assert name in meta
    # 28 convolutions with weight and scale, 28 norms of 5 entries, the stem's bias and shift, the head twice.
    assert len(meta) == 28 * 2 + 28 * 5 + 2 + 4
    twelve = Learner(ResNet12(mtl=True), "emb_func", 7, pretraining=True).state_dict()
    for name in ("emb_func.layer4.0.conv3.mtl_weight", "emb_func.layer1.0.bn3.bias", "base_learner.var.1"):
        assert name in twelve
    assert len(twelve) == 16 * 2 + 16 * 5 + 4 + 4


@pytest.mark.parametrize(
    ("network", "name", "content", "source"),
    [
        (ResNet25, "encoder", lambda state: {"params": state}, "pytorch"),
        (ResNet25, "emb_func", lambda state: state, "libfewshot"),
        (ResNet12, "emb_func", lambda state: state, "libfewshot"),
        (
            ResNet12,
            "emb_func",
            lambda state: {"epoch": 9, "model": state, "optimizer": {}, "lr_scheduler": {"gamma": 0.5}},
            "libfewshot",
        ),
        (
            ResNet12,
            "emb_func",
            lambda state: OrderedDict(
                (k.replace("emb_func.", "emb_func.module."), v) for k, v in state.items()
            ),
            "libfewshot",
        ),
    ],
    ids=["authors", "lfs_resnet25", "lfs_resnet12", "lfs_last", "lfs_parallel"],
)
def test_a_meta_trained_model_computes_the_same(
    network: Callable[..., nn.Module], name: str, content: Any, source: str, tmp_path: Path
) -> None:
    widths = RESNET25 if network is ResNet25 else RESNET12
    learner = trained(Learner(network(mtl=True), name, widths[-1]))
    model = imported(tmp_path, content(learner.state_dict()))
    assert_computes_the_same(model, getattr(learner, name))
    assert model.head is not None
    assert torch.equal(model.head.weight, learner.base_learner.fc1_w)
    assert torch.equal(model.head.bias, learner.base_learner.fc1_b)
    assert model.meta["kind"] == "meta"
    assert model.meta["imported"] == {"format": source, "files": ["source.pth"]}
    config = model.config
    assert config.encoder.name == ("resnet25" if network is ResNet25 else "resnet12")
    assert config.encoder.widths == widths
    assert (config.meta.norm, config.meta.train_affine, config.episodes.n_way) == ("running", True, N_WAY)
    assert config.data.mean[0] == {"pytorch": 125.3, "libfewshot": 120.39586422}[source]
    assert (config.inner.lr, config.inner.order) == (0.01, "first")


@pytest.mark.parametrize("mtl", [False, True], ids=["plain", "with_identity"])
def test_a_pretrained_encoder_computes_the_same(mtl: bool, tmp_path: Path) -> None:
    network = trained(ResNet25(mtl=mtl), moved=False)
    model = imported(tmp_path, {"params": network.state_dict()})
    assert_computes_the_same(model, network)
    assert (model.head, model.meta["kind"], model.norm) == (None, "pretrained", "frozen")
    assert not list(model.encoder.scale_shift_parameters())


def test_what_pretraining_needed_only_is_left_out(tmp_path: Path) -> None:
    learner = trained(Learner(ResNet12(mtl=True), "emb_func", 7, pretraining=True), moved=False)
    done = import_state_dict([saved(tmp_path, learner.state_dict())])
    assert not done.is_meta
    left = {entry.source: entry.note for entry in done.entries if not entry.target}
    reasons = {name: note.removeprefix("left out: ") for name, note in left.items()}
    assert reasons["pre_fc.2.weight"] == "the classifier of pre-training"
    assert reasons["base_learner.fc1_w"] == reasons["base_learner.var.0"]
    assert reasons["base_learner.fc1_w"] == "a head that pre-training does not train"
    assert reasons["emb_func.layer1.0.conv1.mtl_weight"].startswith("the identity")
    assert reasons["emb_func.layer1.0.bn1.num_batches_tracked"].startswith("running averages")
    assert len(left) == 16 + 16 + 4 + 4


def test_a_head_that_pretraining_leaves_is_none_beside_a_moved_phi(tmp_path: Path) -> None:
    learner = trained(Learner(ResNet12(mtl=True), "emb_func", 7, pretraining=True))
    model = imported(tmp_path, learner.state_dict())
    assert_computes_the_same(model, learner.emb_func)
    assert model.head is not None
    assert not model.head.weight.any()


def test_a_moved_phi_without_a_head_gets_a_head_of_zeros(tmp_path: Path) -> None:
    network = trained(ResNet12(mtl=True))
    model = imported(tmp_path, network.state_dict())
    assert_computes_the_same(model, network)
    assert model.head is not None
    assert model.head.weight.shape == (5, 7)
    assert not model.head.weight.any()


def test_every_key_is_accounted_for_once(tmp_path: Path) -> None:
    learner = trained(Learner(ResNet25(mtl=True), "encoder", 8))
    done = import_weights([saved(tmp_path, {"params": learner.state_dict()})], tmp_path / "model.safetensors")
    assert sorted(entry.source for entry in done.entries if entry.source) == sorted(learner.state_dict())
    # The stem alone has a bias and a shift: nothing of ours is without a source.
    assert all(entry.source for entry in done.entries)
    assert sorted(e.target for e in done.entries if e.target) == sorted(done.tensors)
    assert {e.note for e in done.entries if e.source.startswith("base_learner.vars")} == {
        "left out: the same as base_learner.fc1_w",
        "left out: the same as base_learner.fc1_b",
    }
    data = load_model(tmp_path).config.data
    assert (data.image_size, data.centre_crop) == (92, 80)


def test_the_format_may_be_named(tmp_path: Path) -> None:
    network = trained(ResNet25(mtl=False))
    assert imported(tmp_path, network.state_dict(), format="pytorch").config.data.mean[0] == 125.3


def changed(**changes: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A state_dict with other tensors (None: without them); ``_`` stands for a dot in the names."""

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {name.replace(".", "_"): name for name in state}
        wanted = {names.get(key, key): value for key, value in changes.items()}
        return {key: value for key, value in (dict(state) | wanted).items() if value is not None}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            changed(encoder_layer2_1_bn2_bias=None),
            "has no 'encoder.layer2.1.bn2.bias', which encoder.stages.1.1",
        ),
        (changed(encoder_layer2_1_conv2_mtl_weight=None), "has no 'encoder.layer2.1.conv2.mtl_weight'"),
        (changed(encoder_conv1_mtl_bias=None), "has no 'encoder.conv1.mtl_bias', which encoder.stem.shift"),
        (changed(base_learner_fc1_b=None), "has no 'base_learner.fc1_b', whose shape tells"),
        (changed(base_learner_vars_0=torch.ones(3, 8)), "'base_learner.vars.0' is another head than"),
        (changed(extra=torch.ones(2)), "'extra' [2] is unknown to this format"),
        (
            changed(encoder_conv1_weight=torch.ones(3, 3, 5, 5)),
            "'encoder.conv1.weight' is [3, 3, 5, 5], which does not fit encoder.stem.weight [3, 3, 3, 3]",
        ),
        (
            changed(encoder_bn1_weight=torch.tensor([1.0, torch.nan, 1.0])),
            "holds numbers that are not finite",
        ),
        (changed(encoder_layer3_3_conv2_weight=None), "holds neither a ResNet-25"),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named(change: Any, says: str, tmp_path: Path) -> None:
    state = trained(Learner(ResNet25(mtl=True), "encoder", 8)).state_dict()
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        import_state_dict([saved(tmp_path, {"params": change(state)})])
    assert "source.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contents_of_another_kind_are_named(tmp_path: Path) -> None:
    state = trained(ResNet12(mtl=False)).state_dict()
    for content, says in (
        (torch.ones(3), "holds Tensor, not a dictionary of weights"),
        ({"model": state, "best": 0.5}, "'best' is unknown beside a LibFewShot 'model'"),
        ({"state_dict": state}, "'state_dict' is OrderedDict, not a tensor"),
        ({}, "holds dict, not a dictionary of weights"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            import_state_dict([saved(tmp_path, content)])
    with pytest.raises(InputError, match=r"is a second file; a \.pth is imported alone"):
        import_state_dict([tmp_path / "a.pth", tmp_path / "b.pth"])
