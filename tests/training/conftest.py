"""Finished tiny runs that many tests start from; nobody writes to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_fast.training.meta_train import MetaTraining
from tests.training import tiny


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pre-training run that was left alone."""
    folder = tmp_path_factory.mktemp("pretrained")
    tiny.pretraining(folder).run()
    return folder


@pytest.fixture(scope="session")
def meta_trained(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a meta-training run with hard tasks that was left alone."""
    folder = tmp_path_factory.mktemp("meta-trained")
    tiny.meta_training(folder, pretrained).run()
    return folder


@pytest.fixture(scope="session")
def maml_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a meta-training run from random weights whose inner loop adapts all of them."""
    folder = tmp_path_factory.mktemp("maml-trained")
    MetaTraining(tiny.MAML, None, folder, **tiny.splits()).run()
    return folder
