"""What pictures can show of names: the characters of DejaVu, the font that comes with matplotlib."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence


@functools.cache
def _known_characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def drawable(text: str) -> str:
    """What of a name the font has; a missing character would be an empty box and a warning."""
    return " ".join("".join(c for c in text if ord(c) in _known_characters()).split()) or "?"


def distinct(names: Sequence[str]) -> list[str]:
    """Names of classes as pictures show them, told apart.

    Characters that the font lacks are left out; a name of which nothing is left, or the same as of another, becomes
    its place among `names`, such as ``class 3`` for the third.
    """
    shown = [drawable(name) for name in names]
    counts = Counter(shown)
    cut = [short != " ".join(name.split()) for name, short in zip(names, shown, strict=True)]
    return [
        f"class {i}" if is_cut and (short == "?" or counts[short] > 1) else short
        for i, (short, is_cut) in enumerate(zip(shown, cut, strict=True), start=1)
    ]
