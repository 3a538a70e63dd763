from __future__ import annotations

from mtl_fast.training.font import distinct, drawable


def test_characters_that_the_font_lacks_are_left_out() -> None:
    assert drawable("鳥 Vögel\n鳥") == "Vögel"
    assert drawable("鳥") == drawable("") == drawable("\udcff") == "?"


def test_names_that_would_look_the_same_become_their_places() -> None:
    assert distinct(["犬", "cat", "猫 x", "鳥", "馬 y", "x", "a  b"]) == [
        *("class 1", "cat", "class 3", "class 4", "y", "x", "a b")
    ]
    assert distinct(["鳥"]) == ["class 1"]
    assert distinct(["?", "dog"]) == ["?", "dog"]
