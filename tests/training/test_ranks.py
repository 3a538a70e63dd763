"""Training on n ranks is training in one process; whatever ends a rank ends all, and the checkpoint goes on with any n."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast import cli
from mtl_fast.engine import ALONE, Ranks
from mtl_fast.engine.ranks import SharedInputError
from mtl_fast.errors import InputError
from mtl_fast.training import checkpoint
from mtl_fast.training.ranks import command_ranks, refuse_ranks, require_same, store_digest
from tests.rank_forks import ROOT, RankForks, said
from tests.training import rank_jobs, tiny

# Adam divides by |gradient| + 1e-8: of a gradient near 0 a step with rate r keeps r/1e-8 times the rounding of float64
# sums, 1e-15 of gradients of size 1, in each update. Later updates start from there.
TOLERANCE = 15 * 1e-3 / 1e-8 * 1e-15
PRETRAINING_TOLERANCE = 30 * 1e-2 / 1e-8 * 1e-15


@pytest.fixture(scope="module")
def forks() -> Iterator[RankForks]:
    forks = RankForks("tests.training.rank_jobs")
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def alone(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The meta-training of one process."""
    folder = tmp_path_factory.mktemp("alone")
    rank_jobs.one_process("meta-train", folder, str(pretrained))
    return folder


def train(
    forks: RankForks, size: int, output: Path, pretrained: Path | str = "", **options: Any
) -> tuple[list[int], str]:
    """Statuses, and what all ranks printed."""
    folder = output.with_name(f"{output.name}-{size}-{options.get('resume', False)}")
    statuses = forks.run(
        "train",
        size,
        folder,
        **{"name": "meta-train", "output": str(output), "pretrained": str(pretrained)} | options,
    )
    return statuses, "".join(said(folder))


def assert_near(a: Path, b: Path, tolerance: float = TOLERANCE) -> None:
    """Two runs that drew the same tasks in the same order, held the same pool, and ended alike to rounding."""
    for name in ("model.safetensors", "checkpoint.safetensors"):
        (tensors, meta), (others, other_meta) = (checkpoint.load(folder / name) for folder in (a, b))
        assert tensors.keys() == others.keys()
        for key, value in tensors.items():
            if value.is_floating_point():
                torch.testing.assert_close(
                    value, others[key], rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
                )
            else:
                assert torch.equal(value, others[key]), key
        assert meta["config"] == other_meta["config"]
    rows, other_rows = tiny.rows_of(a), tiny.rows_of(b)
    assert [row["step"] for row in rows] == [row["step"] for row in other_rows]
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        assert row["validation_accuracy"] == other["validation_accuracy"]


@pytest.mark.parametrize("size", [2, 3])
def test_images_in_host_memory_are_gathered_by_the_rank_that_needs_them(
    size: int, forks: RankForks, alone: Path, pretrained: Path, tmp_path: Path
) -> None:
    """The update is that of one process with its images on the device; an idle rank gathers none."""
    statuses, text = train(forks, size, tmp_path / "meta", pretrained, on_host=True)
    assert statuses == [0] * size, text
    assert_near(tmp_path / "meta", alone)
    assert text.count("training images stay in host memory") == 1
    rank_jobs.one_process("pretrain", tmp_path / "alone")
    statuses, text = train(forks, size, tmp_path / "pre", name="pretrain", on_host=True)
    assert statuses == [0] * size, text
    assert_near(tmp_path / "pre", tmp_path / "alone", PRETRAINING_TOLERANCE)


def test_a_rank_whose_memory_runs_out_halves_its_own_images_and_says_so(
    forks: RankForks, alone: Path, pretrained: Path, tmp_path: Path
) -> None:
    """The others wait in the exchange, which it enters once."""
    statuses, text = train(forks, 2, tmp_path / "run", pretrained, point="full 7")
    assert statuses == [0, 0], text
    assert text.count("out of memory with") == 1
    assert_near(tmp_path / "run", alone)


@pytest.mark.parametrize("name", ["pretrain", "meta-train"])
def test_ranks_in_half_precision_keep_the_same_scale_and_weights(
    name: str, forks: RankForks, pretrained: Path, tmp_path: Path
) -> None:
    """That the weights agree is what a run asks of its ranks before every checkpoint."""
    statuses, text = train(forks, 2, tmp_path / "run", pretrained, name=name, precision="fp16")
    assert statuses == [0, 0], text


@pytest.mark.parametrize("size", [1, 2, 3])
def test_meta_training_on_ranks_is_that_of_one_process(
    size: int, forks: RankForks, alone: Path, pretrained: Path, tmp_path: Path
) -> None:
    """Two tasks an update: of three ranks one is idle."""
    statuses, text = train(forks, size, tmp_path / "run", pretrained)
    assert statuses == [0] * size, text
    assert_near(tmp_path / "run", alone)
    # One rank tells its progress, and nobody else says anything.
    assert text.count("update 15 of 15") == 1, text
    assert "rror" not in text, text
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(p.name for p in alone.iterdir())


def test_inner_loops_of_all_weights_on_ranks_are_those_of_one_process(
    forks: RankForks, tmp_path: Path
) -> None:
    """From random weights, with hard tasks; two tasks an update: of three ranks one is idle."""
    statuses, text = train(forks, 3, tmp_path / "run", name="maml")
    assert statuses == [0, 0, 0], text
    rank_jobs.one_process("maml", tmp_path / "alone")
    assert_near(tmp_path / "run", tmp_path / "alone")


def test_pretraining_on_ranks_is_that_of_one_process(forks: RankForks, tmp_path: Path) -> None:
    """Batches of 16 over 3 ranks: statistics, dropout, augmentation; 30 updates with a rate of 1e-2."""
    statuses, text = train(forks, 3, tmp_path / "run", name="pretrain")
    assert statuses == [0, 0, 0], text
    rank_jobs.one_process("pretrain", tmp_path / "alone")
    assert_near(tmp_path / "run", tmp_path / "alone", PRETRAINING_TOLERANCE)


@pytest.mark.parametrize(
    ("point", "guilty", "saved"),
    [
        ("update 0", 1, 0),  # at the start
        ("update 11", 2, 8),  # between updates, hard tasks with them
        ("exchange 11", 1, 8),  # in the middle of an update, the others wait for its part of the sum
        ("validation", 1, 0),
        ("write 2 checkpoint.safetensors", 0, 8),  # half of a checkpoint is on disk
        ("renamed 2 checkpoint.safetensors", 0, 15),
    ],
)
def test_a_killed_rank_ends_the_run_and_another_number_of_ranks_goes_on(
    point: str, guilty: int, saved: int, forks: RankForks, alone: Path, pretrained: Path, tmp_path: Path
) -> None:
    run, start = tmp_path / "run", time.monotonic()
    statuses, text = train(forks, 3, run, pretrained, point=point, guilty=guilty)
    assert statuses == [-9 if rank == guilty else 1 for rank in range(3)], text
    assert text.count(f"rank {guilty} of 3 is gone") == 1, text
    assert time.monotonic() - start < 30
    if saved:
        assert checkpoint.load(run / "checkpoint.safetensors")[1]["update"] == saved
    assert not (run / "model.safetensors").exists()
    statuses, text = train(forks, 2, run, pretrained, resume=True)
    assert statuses == [0, 0], text
    assert_near(run, alone)


def test_ctrl_c_on_one_rank_stops_all_after_the_same_update(
    forks: RankForks, alone: Path, pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    statuses, text = train(forks, 2, run, pretrained, point="interrupt 4")
    assert statuses == [130, 130], text
    assert text.count("stopped meta-training after update 5 of 15") == 1, text
    assert checkpoint.load(run / "checkpoint.safetensors")[1]["update"] == 5
    rank_jobs.one_process("meta-train", run, str(pretrained), resume=True)
    assert_near(run, alone)


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ("nan 3", "meta-training: a loss or gradient became non-finite by update 8"),
        ("drift 3", "the state of rank 1 (there) and rank 0 (here) differ: weights is"),
    ],
)
def test_numbers_that_go_wrong_on_one_rank_stop_all_with_one_line(
    point: str, says: str, forks: RankForks, pretrained: Path, tmp_path: Path
) -> None:
    statuses, text = train(forks, 2, tmp_path / "run", pretrained, point=point)
    assert statuses == [2, 2], text
    errors = [line for line in text.splitlines() if line.startswith("mtl-fast: error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_wrong_input_is_one_line_on_all_ranks(
    forks: RankForks, alone: Path, pretrained: Path, tmp_path: Path
) -> None:
    statuses, text = train(forks, 3, alone, pretrained)
    assert statuses == [2, 2, 2], text
    assert text == (
        f"mtl-fast: error: rank 0: {alone}: holds a run already (checkpoint.safetensors); --resume continues it, or "
        "give another --output\n"
    )
    command = forks.run("command", 2, tmp_path / "c", arguments=["meta-train", "--preset", "none"])
    assert (command, "".join(said(tmp_path / "c")).count("\n")) == ([2, 2], 1)


@pytest.mark.parametrize("command", ["demo", "results", "ablation", "embed"])
def test_what_is_for_one_process_says_so(command: str, forks: RankForks, tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = [command, "--output", str(output)] + ["--checkpoint", "none"] * (command == "embed")
    assert forks.run("command", 2, tmp_path / "said", arguments=arguments) == [2, 2]
    text = "".join(said(tmp_path / "said"))
    assert text.startswith(f"mtl-fast: error: mtl-fast {command} runs in one process")
    assert text.count("\n") == 1
    assert not output.exists()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def torchrun(size: int, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, str(size), "-m", "tests.training.rank_jobs", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_of_the_command_killed_and_resumed(tmp_path: Path) -> None:
    """As users start it: one rank of two dies by kill −9, and three go on."""
    data, run = tiny.write_class_folders(tmp_path / "data", n_images=12), tmp_path / "run"
    pre = tmp_path / "pre"
    source = [f"--data.source={data}", "--device=cpu"]
    network = ["--encoder.widths", "4", "4", "4", "4", "--pretrain.epochs=1", "--pretrain.validation-tasks=4"]
    assert cli.main(["pretrain", "--output", str(pre), *source, *network, "--episodes.n-query=6"]) == 0
    arguments = ["meta-train", "--pretrained", str(pre), "--output", str(run), *source, "--meta.n-tasks=12"]
    arguments += [
        "--meta.random-tasks-per-round=4",
        "--meta.hard-tasks-per-round=2",
        "--meta.validate-every=4",
    ]
    arguments += ["--meta.validation-tasks=4", "--inner.train-steps=2", "--episodes.n-query=6"]
    killed = torchrun(2, arguments, TEST_POINT="update 3")
    assert killed.returncode == 1
    assert re.search(r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9", killed.stderr), killed.stderr
    assert checkpoint.load(run / "checkpoint.safetensors")[1]["update"] == 2
    resumed = torchrun(3, [*arguments, "--resume"])
    assert (resumed.returncode, resumed.stdout) == (0, f"meta-trained model: {run}/model.safetensors\n"), (
        resumed.stderr
    )
    assert [row["step"] for row in tiny.rows_of(run)] == ["0", "2", "4", "6"]
    # No process stays.
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert not [command for command in commands if str(run).encode() in command]


@pytest.mark.parametrize("options", [[], ["--by-step"]], ids=str)
def test_an_evaluation_of_inner_loops_of_all_weights_on_ranks_too(
    options: list[str], forks: RankForks, maml_trained: Path, tmp_path: Path
) -> None:
    source = tiny.write_class_folders(tmp_path / "data", n_images=12)
    test = ["evaluate", "--checkpoint", str(maml_trained), "--data", str(source), "--device=cpu", *options]
    test += ["--evaluation.n-tasks=230", "--n-query=2"]
    assert cli.main([*test, "--output", str(tmp_path / "one")]) == 0
    statuses = forks.run(
        "command", 3, tmp_path / "ranks", arguments=[*test, "--output", str(tmp_path / "three")]
    )
    assert statuses == [0, 0, 0], said(tmp_path / "ranks")
    one, three = (checkpoint.load(tmp_path / n / "evaluation.safetensors")[0] for n in ("one", "three"))
    assert tiny.same_tensors(one, three)


@pytest.mark.parametrize("norm", ["frozen", "episode"])
def test_an_evaluation_on_ranks_gives_the_scores_of_one_process(
    norm: str, forks: RankForks, pretrained: Path, tmp_path: Path
) -> None:
    """Of a model whose episodes are embedded image by image, or task by task."""
    source = tiny.write_class_folders(tmp_path / "data", n_images=12)
    run = tmp_path / "run"
    config = tiny.with_meta(n_tasks=6, validate_every=6, norm=norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tiny.meta_training(run, pretrained, config).run()
    test = [
        "evaluate",
        "--checkpoint",
        str(run),
        "--data",
        str(source),
        "--evaluation.n-tasks=230",
        "--device=cpu",
    ]
    assert cli.main([*test, "--output", str(tmp_path / "one")]) == 0
    statuses = forks.run(
        "command", 2, tmp_path / "ranks", arguments=[*test, "--output", str(tmp_path / "two")]
    )
    text = "".join(said(tmp_path / "ranks"))
    assert statuses == [0, 0], text
    assert text.count("230 test tasks") == 1
    scores = [
        checkpoint.load(tmp_path / n / "evaluation.safetensors")[0]["task_accuracy"] for n in ("one", "two")
    ]
    assert torch.equal(*scores)


class Others(Ranks):
    """Two ranks of which the other gives something else."""

    def gather_objects(self, own: Any) -> list[Any]:
        return [own, own | {"torch": "1.0"}]


def test_facts_are_compared_with_those_of_the_first_rank() -> None:
    require_same(ALONE, "the start", {"torch": "2.0"})
    with pytest.raises(
        SharedInputError, match=r'^the start of rank 1 \(there\) and rank 0 \(here\) differ: torch is "1.0"'
    ):
        require_same(Others(), "the start", {"torch": "2.0"})


def test_a_digest_sees_names_labels_and_images() -> None:
    store = tiny.split("train")
    digests = {
        store_digest(s)
        for s in (
            store,
            replace(store, class_names=("x", *store.class_names[1:])),
            replace(store, labels=store.labels.flip(0)),
            replace(store, images=store.images.flip(1)),
            tiny.split("val"),
        )
    }
    assert len(digests) == 5
    assert store_digest(store) == store_digest(tiny.a_store("train", 0))


def test_outside_of_torchrun_nothing_is_refused_and_one_is_alone() -> None:
    refuse_ranks("demo")
    with command_ranks("cpu", 1.0) as ranks:
        assert ranks is ALONE
    for timeout in (0.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--rank-timeout is"), command_ranks("cpu", timeout):
            pass
    with pytest.raises(InputError, match="device 'tpu'"), command_ranks("tpu", 1.0):
        pass
