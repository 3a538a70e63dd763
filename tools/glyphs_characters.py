"""The scripts of Glyphs, the split of each, and the characters that may become classes.

Isolated base letters only: no combining marks, no conjuncts, so the basic text layout draws them fully.
"""

from __future__ import annotations

from typing import NamedTuple


class Script(NamedTuple):
    """One writing system: its name, its split and its candidate characters."""

    name: str
    split: str
    characters: str


def _range(*bounds: tuple[int, int]) -> str:
    return "".join(chr(code) for first, last in bounds for code in range(first, last + 1))


_HIRAGANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん"
_KATAKANA = "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワヲン"
_HAN = (
    "人大小山川水火木金土日月目手足心女子父母雨雪風天生白中文王車馬鳥魚門高長東西南北"
    "米竹花石田力刀弓首耳走食飛黒青赤気学国本夏春秋冬海米糸羊虫見言豆貝身酒里鹿鼻"
)
_HANGUL = (
    "가나다라마바사아자차카타파하고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후"
    "국물밥집꽃뿔흙닭값숲별봄달빛힘글말뜻쓸짝"
)

# Related scripts stand in one split: Greek letters beside Latin ones, the Indic abugidas together.
SCRIPTS = (
    Script("Latin", "train", _range((0x41, 0x5A), (0x61, 0x7A))),
    Script("Greek", "train", _range((0x391, 0x3A1), (0x3A3, 0x3A9), (0x3B1, 0x3C1), (0x3C3, 0x3C9))),
    Script("Cyrillic", "train", _range((0x410, 0x44F))),
    Script("Armenian", "train", _range((0x531, 0x556), (0x561, 0x586))),
    Script("Devanagari", "train", _range((0x905, 0x90B), (0x90F, 0x910), (0x913, 0x928), (0x92A, 0x939))),
    Script("Gujarati", "train", _range((0xA85, 0xA8B), (0xA8F, 0xA90), (0xA93, 0xAA8), (0xAAA, 0xAB9))),
    Script("Gurmukhi", "train", _range((0xA05, 0xA0A), (0xA0F, 0xA10), (0xA13, 0xA28), (0xA2A, 0xA39))),
    Script("Bengali", "train", _range((0x985, 0x98B), (0x98F, 0x990), (0x993, 0x9A8), (0x9AA, 0x9B9))),
    Script("Telugu", "train", _range((0xC05, 0xC0B), (0xC0E, 0xC10), (0xC12, 0xC28), (0xC2A, 0xC39))),
    Script("Kannada", "train", _range((0xC85, 0xC8B), (0xC8E, 0xC90), (0xC92, 0xCA8), (0xCAA, 0xCB9))),
    Script("Tamil", "train", _range((0xB85, 0xB8A), (0xB8E, 0xB90), (0xB92, 0xB95), (0xB99, 0xBB9))),
    Script("Malayalam", "train", _range((0xD05, 0xD0B), (0xD0E, 0xD10), (0xD12, 0xD28), (0xD2A, 0xD39))),
    Script("Hiragana", "train", _HIRAGANA),
    Script("Katakana", "train", _KATAKANA),
    Script("Han", "train", "".join(dict.fromkeys(_HAN))),
    Script("Hebrew", "val", _range((0x5D0, 0x5EA))),
    Script("Arabic", "val", _range((0x621, 0x63A), (0x641, 0x64A), (0x679, 0x679), (0x6AF, 0x6AF))),
    Script("Myanmar", "val", _range((0x1000, 0x102A))),
    Script("Sinhala", "val", _range((0xD85, 0xD8D), (0xD91, 0xD96), (0xD9A, 0xDB1), (0xDB3, 0xDC6))),
    Script("Thai", "test", _range((0xE01, 0xE2E))),
    Script("Lao", "test", _range((0xE81, 0xEAE))),
    Script("Khmer", "test", _range((0x1780, 0x17A2), (0x17A5, 0x17B3))),
    Script("Georgian", "test", _range((0x10D0, 0x10F0))),
    Script("Hangul", "test", _HANGUL),
    Script("Ethiopic", "test", _range(*((c + k, c + k) for c in range(0x1200, 0x1358, 8) for k in (0, 3)))),
)
