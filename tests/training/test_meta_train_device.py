"""What a meta-training run does for its device: nothing read back, precision, images in flight, lack of memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.errors import InputError
from mtl_fast.training import checkpoint, meta_train
from mtl_fast.training.meta_train import MetaTraining
from mtl_fast.training.run import Interrupted
from tests.read_back import NothingReadBack
from tests.training import tiny
from tests.training.tiny import CONFIG, at_update, ctrl_c

ROUND = 3  # updates: two of random tasks, one of hard ones


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("hard", ["resample", "reuse"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_whole_round_reads_nothing_back(
    hard: str, precision: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling, step, optimiser, pool, hard tasks, the log's sums: what happens between two checkpoints."""
    # The range of indices is checked on the CPU alone, where nothing waits.
    monkeypatch.setattr(sys.modules["mtl_fast.ops.images"], "_check_window", lambda *_: None)
    run = tiny.meta_training(tmp_path, pretrained, replace(tiny.with_meta(hard=hard), precision=precision))
    # Adam's counters are the host's on a CPU; the traces of `test_meta_train_capture` show it on a GPU.
    run.optimizer = torch.optim.SGD(run.optimizer.param_groups, momentum=0.9)
    with NothingReadBack():
        for _ in range(ROUND + 1):
            run._update()
    assert bool(run.all_finite)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_says_what_it_costs_and_goes_on_to_the_same_bits(
    precision: str,
    pretrained: Path,
    meta_trained: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = replace(CONFIG, precision=precision)
    tiny.meta_training(tmp_path / "alone", pretrained, config).run()
    assert [line for line in said(capfd) if line.startswith(f"precision {precision}: on a CPU")]
    run = tiny.meta_training(tmp_path / "cut", pretrained, config)
    at_update(run, 5, ctrl_c)
    with pytest.raises(Interrupted):
        run.run()
    again = tiny.meta_training(tmp_path / "cut", pretrained, config, resume=True)
    again.run()
    tiny.assert_same_run(tmp_path / "alone", tmp_path / "cut")
    # In half precision, but not far off: the losses differ by what rounding does to twelve layers.
    ours, full = (float(tiny.rows_of(folder)[1]["loss"]) for folder in (tmp_path / "alone", meta_trained))
    assert ours != full
    assert ours == pytest.approx(full, rel=12 * 4 * torch.finfo(torch.bfloat16).eps)
    tensors, _ = checkpoint.load(tmp_path / "alone" / "checkpoint.safetensors")
    floating = {t.dtype for t in tensors.values() if t.is_floating_point()}
    assert floating == {torch.float32}
    assert ("loss_scale.scale" in tensors) == (precision == "fp16")


def test_a_gradient_that_overflows_float16_halves_the_scale_and_skips_the_update(
    pretrained: Path, tmp_path: Path
) -> None:
    run = tiny.meta_training(tmp_path, pretrained, replace(CONFIG, precision="fp16"))
    assert run.loss_scale is not None
    run.loss_scale.scale.fill_(2.0**120)
    before = run.head.weight.detach().clone()
    run._update()
    assert float(run.loss_scale.scale) == 2.0**119
    assert torch.equal(run.head.weight, before)
    assert bool(run.all_finite)
    run.loss_scale.scale.fill_(run.loss_scale.LEAST)
    run.engine.loss_scale = torch.tensor(float("inf"))
    run._update()
    with pytest.raises(InputError, match="non-finite"):
        run._require_finite()


def test_pretraining_in_half_precision(tmp_path: Path, pretrained: Path) -> None:
    for precision in ("bf16", "fp16"):
        folder = tmp_path / precision
        config = replace(CONFIG, precision=precision)
        run = tiny.pretraining(folder / "a", config)
        at_update(run, 4, ctrl_c)
        with pytest.raises(Interrupted):
            run.run()
        tiny.pretraining(folder / "a", config, resume=True).run()
        tiny.pretraining(folder / "b", config).run()
        tiny.assert_same_run(folder / "a", folder / "b")
        ours, full = (float(tiny.rows_of(f)[-1]["loss"]) for f in (folder / "a", pretrained))
        assert ours == pytest.approx(full, rel=0.2)
        assert {t.dtype for t in tiny.model_of(folder / "a").values()} == {torch.float32}


def in_flight(run: MetaTraining) -> int:
    return run._loop_facts()["images_per_chunk"]


def test_the_default_takes_all_images_where_they_fit_and_is_said_once(
    pretrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    run.run()
    (line,) = [line for line in said(capfd) if line.startswith("images in flight")]
    assert line.startswith("images in flight: 30 of an update's 30 (")
    assert "an image; --meta.images-per-chunk 30)" in line
    assert in_flight(run) == 30


def test_the_default_follows_free_memory_and_a_resumed_run_keeps_its_own(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same bits after a kill, also on a day with other free memory."""
    free = [0]
    monkeypatch.setattr(meta_train, "free_memory", lambda device: free[0])
    monkeypatch.setattr(meta_train, "bytes_per_image", lambda *_, **__: 1000)
    free[0] = 2 * 19_000
    run = tiny.meta_training(tmp_path / "alone", pretrained)
    run.run()
    assert in_flight(run) == 16
    cut = tiny.meta_training(tmp_path / "cut", pretrained)
    at_update(cut, 5, ctrl_c)
    with pytest.raises(Interrupted):
        cut.run()
    free[0] = 10**9
    said(capfd)
    again = tiny.meta_training(tmp_path / "cut", pretrained, resume=True)
    again.run()
    assert in_flight(again) == 16
    assert not [line for line in said(capfd) if line.startswith("images in flight")]
    tiny.assert_same_run(tmp_path / "alone", tmp_path / "cut")
    given = tiny.meta_training(tmp_path / "given", pretrained, tiny.with_meta(images_per_chunk=7))
    assert in_flight(given) == 7


@pytest.mark.filterwarnings("ignore:norm 'episode'")
def test_the_default_leaves_a_split_of_batch_statistics_whole(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meta_train, "free_memory", lambda device: 1)
    run = tiny.meta_training(tmp_path, pretrained, tiny.with_meta(norm="episode", n_tasks=2, hard="none"))
    run.run()
    assert in_flight(run) == 12


def full_above(run: MetaTraining, limit: int) -> None:
    """No memory for more images than that."""
    embed = run.encoder.embed

    def full(images: torch.Tensor, **options: Any) -> Any:
        if len(images) > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return embed(images, **options)

    run.encoder.embed = full  # type: ignore[method-assign,assignment]


def test_out_of_memory_is_survived_once_and_remembered(
    pretrained: Path, meta_trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    full_above(run, 15)
    run.run()
    assert [line for line in said(capfd) if line.startswith("out of memory")] == [
        "out of memory with 30 images in flight: going on with images_per_chunk 15"
    ]
    _, meta = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert meta["images_per_chunk"] == 15
    ours, whole = (float(tiny.rows_of(folder)[1]["loss"]) for folder in (tmp_path, meta_trained))
    assert ours == pytest.approx(whole, rel=1e-4)


def test_out_of_memory_a_second_time_is_one_line(pretrained: Path, tmp_path: Path) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    full_above(run, 7)
    with pytest.raises(InputError, match=r"out of memory with 15 images in flight .*--meta.images-per-chunk"):
        run.run()


def test_out_of_memory_in_pretraining_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.pretraining(tmp_path)

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    monkeypatch.setattr(run, "_update", full)
    with pytest.raises(InputError) as caught:
        run.run()
    assert str(caught.value) == (
        "pre-training: out of memory after update 0 (CUDA out of memory.); give a smaller --pretrain.batch-size"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_the_captured_run_is_the_run_itself(
    precision: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # In deterministic mode cuBLAS asks for a variable that must be set before the process starts.
    torch.use_deterministic_algorithms(False)
    try:
        config = replace(CONFIG, device="cuda", precision=precision)
        tiny.meta_training(tmp_path / "captured", pretrained, config).run()
        monkeypatch.setattr(meta_train, "capture", lambda step, *_: step)
        tiny.meta_training(tmp_path / "plain", pretrained, config).run()
    finally:
        torch.use_deterministic_algorithms(True)
    captured, plain = (tiny.model_of(tmp_path / name) for name in ("captured", "plain"))
    for name, value in plain.items():
        torch.testing.assert_close(captured[name], value, rtol=1e-3, atol=1e-4)
