"""The rules by which tools/build_glyphs.py chooses, on drawings made by hand: no fonts, no network."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module", autouse=True)
def _tools_on_the_path():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


def _patterns(*rows: str) -> np.ndarray:
    return np.array([[15 * int(digit) for digit in row] for row in rows], dtype=np.uint8)


def test_correlation_is_pearsons():
    from glyphs_select import correlation

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 16, (5, 97)), rng.integers(0, 16, (3, 97))
    expected = np.corrcoef(a, b)[:5, 5:]
    np.testing.assert_allclose(correlation(a, b), expected, rtol=0, atol=1e-13)
    assert correlation(np.full((1, 97), 7), b).tolist() == [[0.0, 0.0, 0.0]]


def test_families_come_before_distance():
    from glyphs_select import choose_faces

    rng = np.random.default_rng(1)
    masks = rng.integers(0, 16, (12, 64)).astype(np.uint8)
    families = np.array([0] * 8 + [1, 2, 3, 3])
    chosen = choose_faces(masks, families, 4)
    assert sorted(families[chosen].tolist()) == [0, 1, 2, 3]
    chosen = choose_faces(masks, families, 6)
    assert np.bincount(families[chosen]).tolist() == [2, 1, 1, 2]  # families 1 and 2 have one face each


def test_the_farthest_face_of_a_family_is_taken():
    from glyphs_select import choose_faces

    masks = _patterns("11110000", "11110001", "11100000", "00001111")
    # row 1 is nearest to the mean, row 3 farthest from row 1
    assert choose_faces(masks, np.zeros(4, dtype=np.int64), 2).tolist() == [1, 3]


def test_one_face_under_two_names_counts_once():
    from glyphs_select import choose_faces

    masks = _patterns("11110000", "11110000", "00111100")
    masks[1, 7] = 1  # correlates above 0.98 with the first
    assert len(choose_faces(masks, np.array([0, 1, 2]), 3)) == 2
    assert len(choose_faces(masks[:0], np.zeros(0, dtype=np.int64), 3)) == 0


def test_wrong_drawings_are_dropped():
    from glyphs_select import keep_true_drawings

    first = _patterns(*["11110000"] * 5, "00001111", "11110011")
    second = _patterns(*["01010101"] * 6, "11110000")  # the last one is a drawing of the first character
    keep = keep_true_drawings([first, second], [np.arange(7), np.arange(7)])
    assert keep[0].tolist() == [True] * 5 + [False, True]
    assert keep[1].tolist() == [True] * 6 + [False]


def test_look_alikes_exclude_each_other_across_scripts():
    from glyphs_select import LOOK_ALIKE, choose_characters, correlation

    rng = np.random.default_rng(2)
    sums = rng.integers(0, 450, (40, 64))
    sums[20:] = sums[:20] + rng.integers(
        0, 60, (20, 64)
    )  # every character of script 1 copies one of script 0
    scripts = np.repeat([0, 1], 20)
    chosen = choose_characters(sums, scripts, 8)
    near = correlation(sums[chosen], sums[chosen])
    assert np.triu(near, 1).max() <= LOOK_ALIKE
    assert np.bincount(scripts[chosen]).tolist() == [8, 8]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("OFL-1.1", ["OFL-1.1"]),
        ("SIL Open Font License, Version 1.1 – 26 February 2007", ["OFL-1.1"]),
        ("OFL-1.1-RFN", ["OFL-1.1"]),
        ("Expat and BitstreamVera", ["MIT"]),
        ("CC-BY-SA-3.0 or OFL-1.1", ["CC-BY-SA-3.0", "OFL-1.1"]),
        ("OFL-1.1 and GPL-2 + Font Exception", ["OFL-1.1 and GPL-2 + Font Exception"]),
        ("GPL-2+ with Font exception", ["GPL-2+ with Font exception"]),
    ],
)
def test_licence_spellings(field, expected):
    from glyphs_fonts import licences

    assert licences(field) == expected


def test_the_licence_is_read_from_the_stanza_of_the_fonts():
    from glyphs_fonts import licence_of

    text = "Format: x\n\nFiles: *\nLicense: GPL-3+\n\nFiles: src/*\n more/*\nLicense: OFL-1.1\n text\n"
    assert licence_of(text, "*") == ["GPL-3+"]
    assert licence_of(text, "more/*") == ["OFL-1.1"]
    assert licence_of(text, "docs/*") == []
    assert licence_of("under the SIL Open Font License 1.1", "text") == ["OFL-1.1"]
    assert licence_of("the SIL Open Font License; parts under the GPL", "text") == []


def test_a_package_under_another_licence_is_refused(tmp_path):
    from glyphs_fonts import Package, faces_of

    folder = tmp_path / "fonts-x_1%3a2_all" / "usr/share/doc/fonts-x"
    folder.mkdir(parents=True)
    (folder / "copyright").write_text("Files: *\nLicense: GPL-2+\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"fonts-x: its copyright file gives \['GPL-2\+'\], not OFL-1.1"):
        list(faces_of(Package("fonts-x", "1:2", "OFL-1.1", "*", "*"), tmp_path))


def test_weights_and_widths_are_one_family():
    from glyphs_fonts import family_of

    names = (
        "Noto Sans Thai",
        "Noto Sans Thai UI",
        "Noto Sans Thai ExtraCondensed SemiBold",
        "Noto Sans Thai Thin",
    )
    assert {family_of(name) for name in names} == {"Noto Sans Thai"}
    assert family_of("Light") == "Light"


def test_the_package_list_is_pinned_and_permissive():
    from glyphs_fonts import PERMISSIVE, read_packages

    packages = read_packages(TOOLS / "glyphs_packages.txt")
    assert len(packages) > 100
    assert all(package.version and package.licence in PERMISSIVE for package in packages)


def test_a_short_line_of_the_package_list_is_named(tmp_path):
    from glyphs_fonts import read_packages

    (tmp_path / "list.txt").write_text("# comment\nfonts-x 1 OFL-1.1 *\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list.txt: 4 fields in 'fonts-x 1 OFL-1.1 \*'; 5 expected"):
        read_packages(tmp_path / "list.txt")


def test_every_script_has_one_split_and_distinct_characters():
    from glyphs_characters import SCRIPTS

    assert len({script.name for script in SCRIPTS}) == len(SCRIPTS) == 25
    for script in SCRIPTS:
        assert len(set(script.characters)) == len(script.characters) >= 16
    everything = [character for script in SCRIPTS for character in script.characters]
    assert len(set(everything)) == len(everything)
