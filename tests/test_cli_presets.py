"""A recipe through all commands, on small images and a slim network: its settings reach validation and test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtl_fast.cli import main
from mtl_fast.config import Config, preset
from mtl_fast.training import meta_train, pretrain
from tests.training import tiny

pytestmark = pytest.mark.filterwarnings("ignore:norm ")

SHORT = {
    "pretrain": ["--pretrain.n-updates=3", "--pretrain.validation-tasks=3"],
    "meta-train": ["--meta.n-tasks=4", "--meta.validation-tasks=3", "--meta.validate-every=4"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 classes of 20 images of 20×20."""
    return tiny.write_class_folders(tmp_path_factory.mktemp("data"), n_images=20, size=20)


@pytest.mark.parametrize(
    ("name", "widths", "sizes", "side"),
    [
        ("tensorflow", "4 4 4 4", "--data.image-size 16", 16),
        ("hard-tasks", "4 4 4 4", "--data.image-size 16", 16),
        ("pytorch", "16 16 16", "--data.image-size 20 --data.centre-crop 16", 16),
    ],
)
def test_a_recipe_through_all_commands(
    name: str,
    widths: str,
    sizes: str,
    side: int,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    validations: list[dict[str, Any]] = []
    for module in (pretrain, meta_train):

        def watched(
            encoder: Any,
            head: Any,
            store: Any,
            episodes: Any,
            *rest: Any,
            _of: Any = module.evaluate,
            **options: Any,
        ) -> Any:
            validations.append(
                options | {"n_query": episodes.n_query, "n_shot": episodes.n_shot, "size": rest[0].size}
            )
            return _of(encoder, head, store, episodes, *rest, **options)

        monkeypatch.setattr(module, "evaluate", watched)
    common = ["--preset", name, f"--data.source={data}", *sizes.split(), "--device=cpu"]
    crop = ["--pretrain.crop-size=18"] if name == "pytorch" else []
    first = ["pretrain", *common, "--encoder.widths", *widths.split(), *crop, *SHORT["pretrain"]]
    assert main([*first, "--output", str(tmp_path / "pre")]) == 0
    shape = ["--episodes.n-shot=2", "--episodes.n-query-train=3"]
    second = ["meta-train", *common, *shape, *SHORT["meta-train"]]
    assert main([*second, "--pretrained", str(tmp_path / "pre"), "--output", str(tmp_path / "meta")]) == 0
    recipe = preset(name)
    config = Config.from_dict(json.loads((tmp_path / "meta" / "config.json").read_text()))
    assert config.evaluation == recipe.evaluation
    assert config.inner == recipe.inner
    assert {v["n_shot"] for v in validations} == {1, 2}  # pre-training's are 1-shot
    for options in validations:
        assert options["inner_lr"] == {"tensorflow": 0.10, "hard-tasks": 0.05, "pytorch": 0.01}[name]
        assert options["mirror_support"] == (name == "tensorflow")
        assert options["n_query"] == (15 if name == "pytorch" else options["n_shot"])
        assert options["size"] == (16 if name == "pytorch" else None)
    capsys.readouterr()
    test = ["evaluate", "--checkpoint", str(tmp_path / "meta"), "--evaluation.n-tasks=4", "--device=cpu"]
    assert main([*test, "--output", str(tmp_path / "test")]) == 0
    assert capsys.readouterr().out.startswith(f"5-way 2-shot, 4 test tasks of {data}: ")
    tested = json.loads((tmp_path / "test" / "evaluation.json").read_text())["config"]
    assert tested["evaluation"] == {"n_tasks": 4, "split": "test", "mirror_support": name == "tensorflow"}
    assert tested["inner"]["test_lr"] == recipe.inner.test_lr
    assert (tmp_path / "meta" / "hard_classes.png").exists() == (name == "hard-tasks")


def test_a_test_may_leave_the_mirror_images_out(data: Path, tmp_path: Path) -> None:
    sizes = ["--data.image-size=16", "--encoder.widths", "4", "4", "4", "4"]
    common = ["pretrain", "--preset=tensorflow", f"--data.source={data}", "--device=cpu", *sizes]
    assert main([*common, *SHORT["pretrain"], "--output", str(tmp_path / "pre")]) == 0
    test = ["evaluate", "--checkpoint", str(tmp_path / "pre"), "--device=cpu", "--evaluation.n-tasks=4"]
    for given, expected in (([], True), (["--evaluation.mirror-support", "False"], False)):
        assert main([*test, *given, "--output", str(tmp_path / f"{expected}")]) == 0
        config = json.loads((tmp_path / f"{expected}" / "evaluation.json").read_text())["config"]
        assert config["evaluation"]["mirror_support"] is expected


def test_pretraining_has_no_options_that_it_would_not_use(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its validation is 1-shot and fits a fresh head, whatever the tasks and the inner loop to come."""
    command = ["pretrain", "--output", str(tmp_path / "run"), f"--data.source={data}", "--preset=maml"]
    command += ["--encoder.widths=4", "--device=cpu", *SHORT["pretrain"]]
    for unused in (
        *("--episodes.n-shot=5", "--episodes.n-query-train=3", "--inner.train-steps=3"),
        *("--inner.order=first", "--inner.checkpoint", "--inner.adapt=all"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command, unused])
        assert caught.value.code == 2
        assert unused.partition("=")[0] in capsys.readouterr().err
    used = ["--episodes.n-way=3", "--episodes.n-query=4", "--inner.lr=0.3", "--inner.test-lr=0.2"]
    assert main([*command, *used, "--inner.test-steps=7"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    recipe = preset("maml")
    episodes, inner = recipe.episodes, recipe.inner
    assert config["episodes"] == vars(replace(episodes, n_way=3, n_query=4))
    assert config["inner"] == vars(replace(inner, lr=0.3, test_lr=0.2, test_steps=7))
