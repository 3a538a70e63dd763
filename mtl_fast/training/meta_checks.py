"""What meta-training asks of its settings and of the pre-trained network before it starts."""

from __future__ import annotations

import os

from ..config import Config, MetaConfig
from ..errors import InputError
from .models import Model


def check_rounds(meta: MetaConfig) -> None:
    """K, K' and the number of tasks divide into updates.

    Raises:
        InputError: one does not; both numbers are named.
    """
    counts = {"n_tasks": meta.n_tasks}
    if meta.hard != "none":
        counts |= {
            "random_tasks_per_round": meta.random_tasks_per_round,
            "hard_tasks_per_round": meta.hard_tasks_per_round,
        }
    if meta.tasks_per_update < 1:
        raise InputError(f"--meta.tasks-per-update is {meta.tasks_per_update}; it must be at least 1")
    for name, value in counts.items():
        if value < 1 or value % meta.tasks_per_update:
            raise InputError(
                f"--meta.{name.replace('_', '-')} is {value}, which is no positive multiple of "
                f"--meta.tasks-per-update {meta.tasks_per_update}"
            )


def check_random_start(meta: MetaConfig) -> None:
    """Meta-training without a pre-trained network learns all weights, with batch statistics.

    Raises:
        InputError: it would learn only a part of a random network, or use statistics that nobody took.
    """
    if meta.learn != "weights" or meta.last_block_only or meta.norm != "episode":
        raise InputError(
            "--pretrained is missing: only --meta.learn weights of all blocks with --meta.norm episode starts from "
            "random weights (such as --preset maml); `mtl-fast pretrain` makes a model file"
        )


def check_normalisation(config: Config, pretrained: Model) -> None:
    """Images enter the network as they did in its pre-training.

    Raises:
        InputError: mean, standard deviation or the central square differ, or crops to boxes or the channel order of
            the same data.
    """
    names = ["mean", "std", "centre_crop"]
    # Other data have other options; how imported weights' images were read is not known.
    if not pretrained.is_imported and _same_place(pretrained.config.data.source, config.data.source):
        names += ["crop_to_box", "channel_order"]
    for name in names:
        there, here = (
            " ".join(map(str, value)) if isinstance(value := getattr(data, name), tuple) else str(value)
            for data in (pretrained.config.data, config.data)
        )
        if there != here:
            raise InputError(
                f"{pretrained.path}: was pre-trained with --data.{name.replace('_', '-')} {there}, not {here}; give the "
                "same, or the same --preset"
            )


def _same_place(a: str, b: str) -> bool:
    return a == b or os.path.realpath(os.path.expanduser(a)) == os.path.realpath(os.path.expanduser(b))


def check_statistics(meta: MetaConfig, pretrained: Model) -> None:
    """`frozen` norms have statistics to freeze.

    Raises:
        InputError: the encoder was imported without any.
    """
    if meta.norm == "frozen" and not pretrained.stored_statistics:
        raise InputError(
            f"{pretrained.path}: was imported without running statistics, which --meta.norm frozen needs; give "
            "--meta.norm episode"
        )
