"""The named recipes as text and as JSON: what each sets otherwise than `paper`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from .config import DATA, PRESETS, RECIPES, different_settings, preset
from .text_table import grid


def recipes_as_text(names: Sequence[str] = ()) -> str:
    """A table a recipe, and one of what each data set of the paper changes.

    Args:
        names: recipes, with a data set or without; none: all recipes and all data sets.

    Raises:
        InputError: there is no such recipe.
    """
    shown = [_one(name) for name in names or [name for name in PRESETS if not _data_set(name)]]
    if not names:
        shown.append(_data_sets())
    return "\n\n".join(shown)


def recipes_as_json(names: Sequence[str] = ()) -> str:
    """Each recipe, those of data sets too: its settings, and those of `paper` and its own where they differ.

    Raises:
        InputError: there is no such recipe.
    """
    found: dict[str, Any] = {}
    for name in names or PRESETS:
        config = preset(name)
        differences = different_settings(preset("paper"), config)
        found[name] = {
            "description": _description(name),
            "differences": {
                key: {"paper": paper, "here": here} for key, (paper, here) in differences.items()
            },
            "settings": dataclasses.asdict(config),
        }
    return json.dumps(found, indent=2, ensure_ascii=False)


def _one(name: str) -> str:
    differences = different_settings(preset("paper"), preset(name))
    head = f"{name}: {_description(name)}"
    if not differences:
        return head
    rows = [[key, _text(paper), _text(here)] for key, (paper, here) in differences.items()]
    return f"{head}\n\n{grid(['setting', 'paper', name], rows, 'plain')}"


def _data_sets() -> str:
    """What the name of a data set changes, recipe by recipe."""
    rows = []
    for name, (_, config) in RECIPES.items():
        changes = [different_settings(config, preset(name, data)) for data in DATA]
        for change in changes:
            del change["data.source"]  # the name of the data set
        rows.append(
            [name, *("; ".join(f"{k} {_text(v)}" for k, (_, v) in c.items()) or "as it is" for c in changes)]
        )
    return (
        "With the name of a data set behind it, such as tensorflow-fc100, a recipe also brings images to its size; "
        "meta-train's\n--episodes.n-shot makes any of them 5- or 10-shot. --data.source says where the images are, by "
        "default in a folder\nof that name.\n\n"
        + grid(["recipe", *(f"-{data}" for data in DATA)], rows, "plain")
    )


def _data_set(name: str) -> str | None:
    return next((data for data in DATA if name.endswith(f"-{data}")), None)


def _description(name: str) -> str:
    data = _data_set(name)
    if data is not None:
        return f"{RECIPES[name.removesuffix(f'-{data}')][0]}; on {data}"
    if name in RECIPES:
        return RECIPES[name][0]
    like = name.removeprefix("glyphs-")
    way = f"{RECIPES[like][0]};" if like in RECIPES else "the demo's way"
    return f"{way} on the embedded characters"


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
