"""`mtl-fast presets`: what each recipe sets otherwise than `paper`, as text and as JSON."""

from __future__ import annotations

import json

import pytest

from mtl_fast.cli import main
from mtl_fast.config import PRESETS, RECIPES, Config, different_settings, preset


def test_each_recipe_has_its_differences_from_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    tables = {part.partition(":")[0]: part for part in text.split("\n\n") if not part.startswith("setting")}
    assert [*tables][: len(RECIPES)] == list(RECIPES)
    for name in RECIPES:
        assert main(["presets", name]) == 0
        lines = capsys.readouterr().out.splitlines()
        differences = different_settings(preset("paper"), preset(name))
        found = {line.split()[0]: line for line in lines[4:]}
        assert list(found) == list(differences)
        assert "\n".join(lines) in text
    assert main(["presets", "pytorch"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["encoder.widths", "64", "128", "256", "512", "160", "320", "640"] in rows
    assert ["meta.lr", "0.001", "0.0001"] in rows
    assert ["meta.decay_first", "None", "900"] in rows


def test_what_a_data_set_changes_has_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[-6:]]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert cells["paper"] == ["data.image_size 84", "data.image_size 32", "data.image_size 84"]
    assert cells["tensorflow"] == ["as it is"] * 3


def test_json_holds_all_settings_and_both_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(PRESETS)
    for name, entry in found.items():
        assert Config.from_dict(entry["settings"]) == preset(name)
        assert entry["description"]
    assert found["maml"]["differences"]["inner.lr"] == {"paper": 0.05, "here": 0.01}
    assert found["paper-fc100"]["differences"] == {
        "data.source": {"paper": "glyphs", "here": "fc100"},
        "data.image_size": {"paper": None, "here": 32},
    }
    assert main(["presets", "tensorflow-fc100", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["tensorflow-fc100"]


def test_an_unknown_recipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "tensorflow-cub"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "preset 'tensorflow-cub' is unknown" in err
