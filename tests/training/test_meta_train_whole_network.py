"""Meta-training with inner loops of all weights: rounds with hard tasks, resuming, the random start, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.config import Config
from mtl_fast.engine import EpisodicEngine, Ranks, WholeNetworkEngine
from mtl_fast.errors import InputError
from mtl_fast.training import models, phase, scoring
from mtl_fast.training.evaluate import drawn_episodes, evaluate_model, score
from mtl_fast.training.meta_train import MetaTraining, meta_train
from mtl_fast.training.models import load_model
from mtl_fast.training.run import Interrupted
from tests.training import tiny
from tests.training.tiny import CONFIG, MAML, at_update, ctrl_c


def maml(folder: Path, config: Config = MAML, *, resume: bool = False) -> MetaTraining:
    """Meta-training from random weights."""
    return MetaTraining(config, None, folder, resume=resume, **tiny.splits())


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    maml(tmp_path / "finished").run()
    return tmp_path / "finished"


def test_two_rounds_with_hard_tasks_move_every_weight(tmp_path: Path) -> None:
    run = maml(tmp_path)
    hard = []
    original = run.next_episodes
    run.next_episodes = lambda: (lambda drawn: (hard.append(drawn[1]), drawn)[1])(original())  # type: ignore[method-assign]
    before = {name: p.clone() for name, p in run.encoder.named_parameters()}
    model = load_model(run.run())
    assert hard == [False, False, True] * 2
    assert len(tiny.rows_of(tmp_path)) == 4
    moved = {name for name, p in run.encoder.named_parameters() if not torch.equal(p, before[name])}
    # A bias before batch statistics has no gradient.
    assert moved >= {name for name in before if "norm" in name or name.endswith("weight")}
    assert model.head is not None
    assert model.meta["kind"] == "meta"


def test_ctrl_c_saves_and_going_on_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    run = maml(tmp_path / "cut")
    at_update(run, 2, ctrl_c)
    with pytest.raises(Interrupted, match="update 3 of 6"):
        run.run()
    again = maml(tmp_path / "cut", resume=True)
    assert again.update == 3
    again.run()
    tiny.assert_same_run(finished, tmp_path / "cut")


def test_the_seed_draws_the_random_start(finished: Path, tmp_path: Path) -> None:
    other = maml(tmp_path / "other", replace(MAML, seed=1))
    one = maml(tmp_path / "one")
    same = maml(tmp_path / "same")
    weight = [run.encoder.convs()[0].weight for run in (one, same, other)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


def test_the_pretrained_network_is_a_start_too(pretrained: Path, tmp_path: Path) -> None:
    config = replace(MAML, encoder=CONFIG.encoder, inner=replace(MAML.inner, checkpoint=True))
    run = tiny.meta_training(tmp_path, pretrained, config)
    assert isinstance(run.engine, WholeNetworkEngine)
    assert run.engine.checkpoint
    start = load_model(pretrained).encoder.state_dict()
    assert tiny.same_tensors(dict(run.encoder.state_dict()), dict(start))
    assert run.run().exists()


def test_the_inner_loop_is_that_of_the_settings(pretrained: Path, tmp_path: Path) -> None:
    head = tiny.meta_training(tmp_path / "head", pretrained).engine
    run = maml(tmp_path / "all", replace(MAML, meta=replace(MAML.meta, images_per_chunk=15)))
    assert isinstance(head, EpisodicEngine)
    engine = run.engine
    assert isinstance(engine, WholeNetworkEngine)
    assert (engine.norm, engine.order, engine.inner_lr, engine.inner_steps) == ("episode", "second", 0.05, 2)
    assert (engine.images_per_chunk, engine.checkpoint) == (15, False)


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_the_tasks_are_shared_out_over_the_ranks_given(adapt: str, pretrained: Path, tmp_path: Path) -> None:
    ranks = Ranks()
    config, start = (MAML, None) if adapt == "all" else (CONFIG, load_model(pretrained))
    assert MetaTraining(config, start, tmp_path, ranks=ranks, **tiny.splits()).engine.ranks is ranks


@pytest.mark.parametrize(
    "changes", [{"learn": "scale_shift"}, {"learn": "head"}, {"norm": "frozen"}, {"norm": "running"}], ids=str
)
def test_a_random_start_that_makes_no_sense_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    base = MAML if "norm" in changes else CONFIG
    with pytest.raises(InputError, match=r"--pretrained is missing: .* --meta\.norm episode") as caught:
        maml(tmp_path / "run", replace(base, meta=replace(base.meta, **changes)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_the_start_it_had(finished: Path, pretrained: Path) -> None:
    with pytest.raises(InputError, match="encoder"):
        tiny.meta_training(finished, pretrained, replace(MAML, encoder=CONFIG.encoder), resume=True)


def test_the_command_needs_no_pretrained_model(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase, "load_split", lambda source, split, size: tiny.split(split))
    meta_train(MAML, None, tmp_path / "run")
    tiny.assert_same_run(finished, tmp_path / "run")


def test_model_files_are_tested_as_they_were_trained_or_as_asked(
    finished: Path, pretrained: Path, meta_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_split", lambda source, split, size: tiny.split(split))
    norms, original = [], scoring.evaluate_all_weights

    def spy(*arguments: Any, **options: Any) -> Any:
        norms.append(options["norm"])
        return original(*arguments, **options)

    monkeypatch.setattr(scoring, "evaluate_all_weights", spy)
    tasks = MAML.evaluation
    own = evaluate_model(finished, evaluation=tasks)
    head = evaluate_model(finished, evaluation=tasks, adapt="head")
    assert norms == ["episode"]
    assert not torch.equal(own.task_accuracy, head.task_accuracy)
    evaluate_model(pretrained, evaluation=tasks)
    evaluate_model(pretrained, evaluation=tasks, adapt="all")
    assert norms == ["episode", "frozen"]
    # What is tested alone is tested with all splits at hand as well.
    model, store = load_model(finished), tiny.split("test")
    config = replace(model.config, evaluation=tasks)
    assert torch.equal(
        score(model, config, store, drawn_episodes(config, store))[0].task_accuracy, own.task_accuracy
    )
    with pytest.raises(InputError, match=r"inner\.adapt is 'all'"):
        evaluate_model(meta_trained, evaluation=tasks, adapt="all")
