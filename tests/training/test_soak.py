"""A handful of `make soak`: each phase killed at two random moments and gone on with; and what the soak would see."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.training.forks import Forks
from tests.training.soak import PHASES, Soak


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    with closing(Forks()) as forks:
        yield Soak(tmp_path_factory.mktemp("soak"), forks, random.Random(0))


@pytest.mark.parametrize("name", PHASES)
def test_killed_at_random_moments_and_gone_on_with_gives_the_bits_of_one_left_alone(
    name: str, soak: Soak
) -> None:
    n_compared, _ = soak.soak(PHASES[name], 2)
    assert n_compared >= 1


def test_other_bits_a_half_file_and_a_failed_run_are_seen(soak: Soak, tmp_path: Path) -> None:
    def changed(name: str, content: bytes) -> Path:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(soak.given["model"], folder)
        (folder / name).write_bytes(content)
        return folder

    case = PHASES["meta-train"]
    model = soak.given["model"]
    case.same(changed("log.csv", (model / "log.csv").read_bytes()), model)
    for name, content in (
        ("log.csv", b"step\n1\n"),
        (".model.safetensors.partial", b"half"),
        ("model.safetensors", (soak.given["pretrained"] / "model.safetensors").read_bytes()),
    ):
        with pytest.raises(AssertionError):
            case.same(changed(name, content), model)
    half = (model / "checkpoint.safetensors").read_bytes()[:-100]
    folder = changed("checkpoint.safetensors", half)
    assert soak.run(case, folder) == 1
    with pytest.raises(AssertionError, match="cut short"):
        soak._done(1, folder)
