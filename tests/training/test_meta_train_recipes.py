"""The recipes `tensorflow` and `pytorch` against their programs' conventions, transcribed in plain PyTorch.

Tiny widths and images, float64, fixed weights. What is compared comes from a run that is given the recipe's own
settings, so that a number that does not act, or acts otherwise, shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.config import Config, preset
from mtl_fast.data.store import ImageStore
from mtl_fast.engine.evaluate import embedded_parts, fit_and_predict
from mtl_fast.episodes import Episodes
from mtl_fast.training.evaluate import drawn_episodes, score
from mtl_fast.training.meta_train import MetaTraining
from mtl_fast.training.models import Model, architecture, build_encoder
from tests.conv_cases import assert_near
from tests.nn.plain_networks import randomise
from tests.training import tiny

# Dozens of layers of about 60 terms each, batch statistics of as few as 5·2·2 values, up to 100 inner steps.
TOLERANCE = 1e4 * 60**0.5 * torch.finfo(torch.float64).eps

pytestmark = pytest.mark.filterwarnings("ignore:norm ")


def stores(side: int) -> dict[str, ImageStore]:
    return {
        name: tiny.a_store(name, seed, n_images=20, size=side)
        for seed, name in enumerate(("train", "val", "test"))
    }


def a_run(config: Config, folder: Path, splits: dict[str, ImageStore]) -> MetaTraining:
    """A meta-training run whose weights are float64 and moved away from where they start."""
    config = replace(config, device="cpu")
    side = splits["train"].image_size[0]
    encoder = build_encoder(config.encoder, image_size=config.data.centre_crop or side).double()
    model = Model(config, encoder, None, side, {"architecture": architecture(config, side)}, folder)
    run = MetaTraining(config, model, folder, train=splits["train"], val=splits["val"])
    run.head.double()
    with torch.no_grad():
        randomise(run.encoder, scale_shift=True)
        # Features so small that every fit converges: one that oscillates would magnify rounding step by step.
        for conv in run.encoder.convs():
            if conv.norm is None:
                conv.weight.mul_(0.2)
            else:
                conv.norm.bias.mul_(0.2)
        run.head.bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    return run


def pixels(store: ImageStore, rows: Tensor) -> Tensor:
    return store.images[rows].permute(0, 3, 1, 2).double()


class TensorFlow:
    """MTL's TensorFlow program: shift in the place of the bias, losses summed over the classes."""

    STEP = 0.01

    def __init__(self, run: MetaTraining) -> None:
        self.layers: list[list[dict[str, Any]]] = []
        self.leaves: dict[str, list[Tensor]] = {"scale": [], "shift": [], "head": []}
        for layer in run.encoder.layers:
            block = []
            for conv in layer.convs:
                ss_weight = conv.scale.detach().clone().requires_grad_()
                ss_bias = (conv.bias + conv.shift).detach().clone().requires_grad_()
                self.leaves["scale"].append(ss_weight)
                self.leaves["shift"].append(ss_bias)
                block.append(
                    {
                        "w": conv.weight.detach(),
                        "ss": ss_weight,
                        "b": ss_bias,
                        "beta": conv.norm.bias.detach(),
                    }
                )
            self.layers.append([*block, {"w": layer.shortcut.weight.detach()}])
        self.w5 = run.head.weight.detach().T.clone().requires_grad_()  # [D, 5], as there
        self.b5 = run.head.bias.detach().clone().requires_grad_()
        self.leaves["head"] = [self.w5, self.b5]

    def features(self, x: Tensor) -> Tensor:
        """Of one split of one task, normalised by its own statistics."""
        x = x / 255
        for *convs, shortcut in self.layers:
            residual, out = F.conv2d(x, shortcut["w"]), x
            for conv in convs:
                z = F.conv2d(out, conv["w"] * conv["ss"], conv["b"], padding=1)
                mean = z.mean(dim=(0, 2, 3), keepdim=True)
                variance = (z - mean).square().mean(dim=(0, 2, 3), keepdim=True)
                out = F.leaky_relu((z - mean) / (variance + 1e-3).sqrt() + conv["beta"].view(-1, 1, 1), 0.1)
            x = F.max_pool2d(out + residual, 2)
        return x.mean(dim=(2, 3))

    def query_logits(
        self, support: Tensor, labels: Tensor, query: Tensor, n_shot: int, n_steps: int
    ) -> Tensor:
        features, w, b = self.features(support), self.w5, self.b5
        for _ in range(n_steps):
            loss = F.cross_entropy(features @ w + b, labels, reduction="sum") / n_shot
            gw, gb = torch.autograd.grad(loss, (w, b), create_graph=True)
            w, b = w - self.STEP * gw, b - self.STEP * gb
        return self.features(query) @ w + b


def gradients_of(run: MetaTraining) -> dict[str, list[Tensor]]:
    convs, head = run.encoder.convs(), run.head
    found = {
        "scale": [c.scale for c in convs if c.scale is not None],
        "shift": [c.shift for c in convs if c.shift is not None],
        "gamma": [c.norm.weight for c in convs if c.norm is not None and c.norm.weight is not None],
        "beta": [c.norm.bias for c in convs if c.norm is not None],
        "head": [head.weight, head.bias],
    }
    return {name: [p.grad for p in parameters if p.grad is not None] for name, parameters in found.items()}


def split_up(store: ImageStore, episodes: Episodes, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Support images and labels and query images of one task."""
    return pixels(store, episodes.support[t]), episodes.support_labels[t], pixels(store, episodes.query[t])


def compare_step(
    run: MetaTraining, plain: Any, query_logits: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Episodes:
    """Loss, query logits and gradients of the run's next update against the transcription."""
    episodes, hard = run.next_episodes()
    assert not hard
    out = run.engine.step(episodes)
    ours = gradients_of(run)
    losses, logits = [], []
    for t in range(episodes.n_tasks):
        logits.append(query_logits(*split_up(run.train, episodes, t)))
        losses.append(F.cross_entropy(logits[-1], episodes.query_labels[t]))
    (sum(losses) / len(losses)).backward()
    assert_near(out.loss, torch.stack(losses).detach(), TOLERANCE, "loss")
    largest = max(float(g.abs().max()) for g in ours["scale"])
    for name, leaves in plain.leaves.items():
        assert len(ours[name]) == len(leaves) > 0, name
        for i, (mine, leaf) in enumerate(zip(ours[name], leaves, strict=True)):
            expected = (
                leaf.grad.T if name == "head" and leaf.dim() == 2 and leaf.shape != mine.shape else leaf.grad
            )
            # Batch statistics cancel most shifts' gradients: there nothing but rounding is left to compare.
            if float(expected.abs().max()) < 1e-10 * largest:
                assert float((mine - expected).abs().max()) < TOLERANCE * largest, (name, i)
            else:
                assert_near(mine, expected, TOLERANCE, f"{name} {i}")
    moved = {name for name, parameters in ours.items() if parameters}
    assert moved == set(plain.leaves)
    again = run.engine.query_logits(episodes)
    assert_near(again.detach(), torch.stack(logits).detach(), TOLERANCE, "query logits")
    return episodes


def compare_test(
    run: MetaTraining, store: ImageStore, query_logits: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Episodes:
    """Query logits and accuracies of the test with the recipe's settings against the transcription."""
    config = replace(run.config, evaluation=replace(run.config.evaluation, n_tasks=3))
    episodes = drawn_episodes(config, store)
    expected = torch.stack([query_logits(*split_up(store, episodes, t)).detach() for t in range(3)])
    options = {"norm": config.meta.norm, "mirror_support": config.evaluation.mirror_support}
    (embedded,) = embedded_parts(run.encoder, store, episodes, run.preprocess, **options)
    inner = config.inner
    found = fit_and_predict(embedded, run.head, inner_lr=inner.lr_at_test, inner_steps=inner.test_steps)
    assert_near(found, expected, TOLERANCE, "query logits of the test")
    model = Model(config, run.encoder, run.head, run.image_size, {}, Path("none"))
    result, _ = score(model, config, store, episodes)
    right = (expected.argmax(dim=2) == episodes.query_labels).double().mean(dim=1)
    assert_near(result.task_accuracy.double(), right, 1e-6, "accuracy")
    return episodes


@pytest.mark.parametrize("n_shot", [1, 5])
def test_tensorflow(n_shot: int, tmp_path: Path) -> None:
    config = preset("tensorflow", n_shot=n_shot)
    config = replace(
        config,
        encoder=replace(config.encoder, widths=(4, 5, 6, 4)),
        data=replace(config.data, image_size=None),
    )
    splits = stores(16)
    run = a_run(config, tmp_path, splits)
    plain = TensorFlow(run)
    episodes = compare_step(run, plain, lambda x, y, q: plain.query_logits(x, y, q, n_shot, 20))
    assert (episodes.n_tasks, episodes.n_way, episodes.n_shot, episodes.n_query) == (2, 5, n_shot, 15)

    def mirrored(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        return plain.query_logits(torch.cat([x, x.flip(3)]), torch.cat([y, y]), q, n_shot, 100)

    tested = compare_test(run, splits["test"], mirrored)
    assert (tested.n_shot, tested.n_query) == (n_shot, n_shot)


class PyTorch:
    """MTL's PyTorch program: running averages that training moves, γ and β learned, first order, mean losses."""

    STEP = 0.01
    MEAN, STD = (torch.tensor(v).double().view(3, 1, 1) for v in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))

    def __init__(self, run: MetaTraining) -> None:
        self.leaves: dict[str, list[Tensor]] = {"scale": [], "shift": [], "gamma": [], "beta": []}
        self.stem = self._conv(run.encoder.stem)
        self.stages = [[self._block(block) for block in stage] for stage in run.encoder.stages]
        self.fc1_w = run.head.weight.detach().clone().requires_grad_()
        self.fc1_b = run.head.bias.detach().clone().requires_grad_()
        self.leaves["head"] = [self.fc1_w, self.fc1_b]
        self.side = run.network_size

    def _conv(self, conv: Any) -> dict[str, Any]:
        leaf = {
            name: getattr(conv.norm, name).detach().clone().requires_grad_() for name in ("weight", "bias")
        }
        out = {
            "w": conv.weight.detach(),
            "mtl_weight": conv.scale.detach().clone().requires_grad_(),
            "bias": None,
            "stride": conv.stride,
            "gamma": leaf["weight"],
            "beta": leaf["bias"],
            "mean": conv.norm.running_mean.clone(),
            "var": conv.norm.running_var.clone(),
        }
        if conv.bias is not None:
            out["mtl_bias"] = conv.shift.detach().clone().requires_grad_()
            out["bias"] = conv.bias.detach()
            self.leaves["shift"].append(out["mtl_bias"])
        for name, key in (("scale", "mtl_weight"), ("gamma", "gamma"), ("beta", "beta")):
            self.leaves[name].append(out[key])
        return out

    def _block(self, block: Any) -> dict[str, Any]:
        shortcut = None if block.shortcut is None else self._conv(block.shortcut)
        return {"shortcut": shortcut, "convs": [self._conv(conv) for conv in block.convs]}

    def apply(self, conv: dict[str, Any], x: Tensor, training: bool) -> Tensor:
        bias = None if conv["bias"] is None else conv["bias"] + conv["mtl_bias"]
        padding = conv["w"].shape[2] // 2
        z = F.conv2d(x, conv["w"] * conv["mtl_weight"], bias, conv["stride"], padding)
        return F.batch_norm(z, conv["mean"], conv["var"], conv["gamma"], conv["beta"], training, 0.1, 1e-5)

    def features(self, x: Tensor, training: bool) -> Tensor:
        edge = (x.shape[2] - self.side) // 2
        x = x[:, :, edge : edge + self.side, edge : edge + self.side]
        x = F.relu(self.apply(self.stem, (x - self.MEAN) / self.STD, training))
        for block in (block for stage in self.stages for block in stage):
            residual = x if block["shortcut"] is None else self.apply(block["shortcut"], x, training)
            first, second = block["convs"]
            out = F.relu(self.apply(first, x, training))
            x = F.relu(self.apply(second, out, training) + residual)
        return x.mean(dim=(2, 3))

    def query_logits(self, support: Tensor, labels: Tensor, query: Tensor, training: bool) -> Tensor:
        embedded_query = self.features(query, training)  # the query split comes first
        embedded = self.features(support, training)
        w, b = self.fc1_w, self.fc1_b
        for _ in range(100):
            loss = F.cross_entropy(embedded @ w.T + b, labels)
            gw, gb = torch.autograd.grad(loss, (w, b), retain_graph=True)
            w, b = w - self.STEP * gw, b - self.STEP * gb
        return embedded_query @ w.T + b


@pytest.mark.parametrize("n_shot", [1, 2])
def test_pytorch(n_shot: int, tmp_path: Path) -> None:
    config = preset("pytorch", n_shot=n_shot)
    config = replace(
        config,
        encoder=replace(config.encoder, widths=(4, 5, 6)),
        # As 92 and 80 pixels, smaller.
        data=replace(config.data, image_size=None, centre_crop=16),
    )
    splits = stores(20)
    run = a_run(config, tmp_path, splits)
    plain = PyTorch(run)
    training, testing = (functools.partial(plain.query_logits, training=t) for t in (True, False))
    episodes = compare_step(run, plain, training)
    assert (episodes.n_tasks, episodes.n_way, episodes.n_shot, episodes.n_query) == (1, 5, n_shot, 15)
    # Step and query logits each moved the averages here; there one pass did.
    training(*split_up(run.train, episodes, 0))
    theirs = [
        plain.stem,
        *(c for s in plain.stages for b in s for c in (b["shortcut"], *b["convs"]) if c is not None),
    ]
    for norm, conv in zip(run.encoder.norms(), theirs, strict=True):
        assert_near(norm.running_mean, conv["mean"], TOLERANCE, "running mean")
        assert_near(norm.running_var, conv["var"], TOLERANCE, "running variance")
    tested = compare_test(run, splits["test"], testing)
    assert (tested.n_shot, tested.n_query) == (n_shot, 15)
