"""The ``.npy`` dictionaries of MTL's TensorFlow code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config import preset
from ..errors import InputError
from .foreign_files import read_npy
from .ledger import Imported, Ledger

_LAYOUT = "[k, k, I, O] → [O, I, k, k]"


def import_tensorflow(paths: Sequence[Path]) -> Imported:
    """The authors' TensorFlow dictionaries: weights, ss_weights and fc_weights, told apart by what they hold.

    Its norms have no γ; their β is in no file, and the program itself tests with β at 0. Running statistics do not
    exist there, so the model is one of norm ``episode``.

    Raises:
        InputError: as of `import_weights`.
    """
    parts: dict[str, Ledger] = {}
    for path in paths:
        tensors = read_npy(path)
        first = tensors.get("block1_conv1")
        if first is None:
            role = "head" if tensors.keys() == {"w5", "b5"} else ""
        else:
            role = "scale and shift" if tuple(first.shape[:2]) == (1, 1) else "weights"
        if not role:
            raise InputError(
                f"{path}: holds {', '.join(sorted(tensors)[:3])}; neither 'block1_conv1' of MTL's ResNet-12 "
                "nor the 'w5' and 'b5' of its head"
            )
        if role in parts:
            raise InputError(f"{path}: holds {role}, as {parts[role].name} does; give one of them")
        parts[role] = Ledger(str(path), tensors)
    if "weights" not in parts:
        raise InputError(f"{paths[0]}: holds {next(iter(parts))} only; give the file of the weights too")
    weights, ss, head = (parts.get(role) for role in ("weights", "scale and shift", "head"))
    assert weights is not None
    widths = tuple(weights.width(f"block{i}_conv3", -1) for i in range(1, 5))
    recipe = preset("tensorflow")
    config = replace(recipe, encoder=replace(recipe.encoder, widths=widths))
    imported = Imported("tensorflow", config, is_meta=len(parts) > 1, stored_statistics=False)
    out, n_in = imported.tensors, 3

    def hwio(ledger: Ledger, key: str, target: str, shape: tuple[int, ...]) -> None:
        out[target] = ledger.take(key, target, shape, _LAYOUT, lambda t: t.permute(3, 2, 0, 1))

    for i, width in enumerate(widths):
        block, ours = f"block{i + 1}", f"encoder.layers.{i}"
        hwio(weights, f"{block}_conv_res", f"{ours}.shortcut.weight", (width, n_in, 1, 1))
        for j in range(3):
            conv, shape = f"{ours}.convs.{j}", (width, n_in if j == 0 else width)
            key, bias = f"{block}_conv{j + 1}", f"{block}_bias{j + 1}"
            hwio(weights, key, f"{conv}.weight", (*shape, 3, 3))
            out[f"{conv}.bias"] = weights.take(bias, f"{conv}.bias", (width,))
            if ss is not None:
                hwio(ss, key, f"{conv}.scale", (*shape, 1, 1))
                shift = ss.take(bias, f"{conv}.shift", (width,), "minus the bias, which it replaces there")
                # In float64, so that bias + shift is the source's value to one rounding.
                out[f"{conv}.shift"] = (shift.double() - out[f"{conv}.bias"].double()).float()
        n_in = width
    if ss is None and head is not None:
        imported.config = replace(imported.config, meta=replace(imported.config.meta, learn="head"))
    weights.leave(lambda key: key in ("w5", "b5"), "the classifier of pre-training")
    if head is not None:
        n_way = head.width("b5", 0)
        imported.take_head(
            head.take("w5", "head.weight", (n_way, widths[-1]), "transposed", lambda t: t.permute(1, 0)),
            head.take("b5", "head.bias", (n_way,)),
        )
    for ledger in parts.values():
        ledger.close()
        imported.entries += ledger.entries
    return imported
