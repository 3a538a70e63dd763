"""Rebuild the drawings of Glyphs, bit for bit, from named versions of Debian font packages.

    python tools/build_glyphs.py --cache FOLDER            # writes masks.npz and faces.csv
    python tools/build_glyphs.py --cache FOLDER --check    # compares with the files in the package instead

Needs apt-get and dpkg-deb, the network once, about two gigabytes in FOLDER, and the Pillow named below: its
wheel holds the FreeType that draws. Nothing is installed. Fonts are needed only here; the package ships the
drawings.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from glyphs_characters import SCRIPTS
from glyphs_fonts import Face, Package, Pen, faces_of, fetch, read_packages
from glyphs_select import choose_characters, choose_faces, keep_true_drawings
from numpy.typing import NDArray

PILLOW = "13.0.0"
CHARACTERS = 16  # a script
FACES = 30  # a character
FAMILIES = 3  # a character, at least
HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "mtl_fast" / "data" / "glyphs"
SPLITS = ("train", "val", "test")


def draw_package(package: Package, cache: Path) -> list[tuple[Face, list[dict[str, NDArray[np.uint8]]]]]:
    """The faces of one package, each with its drawings: for each script, character -> mask [32 * 32]."""
    found = []
    for face, path in faces_of(package, cache):
        pen = Pen(path, face.index)
        drawings: list[dict[str, NDArray[np.uint8]]] = []
        for script in SCRIPTS:
            probe = script.characters[:: max(1, len(script.characters) // 8)]
            covered = any(pen.mask(character) is not None for character in probe)
            masks = {
                c: m.reshape(-1) for c in script.characters if covered and (m := pen.mask(c)) is not None
            }
            seen = [m.tobytes() for m in masks.values()]  # one drawing for several characters: a placeholder
            drawings.append({c: m for c, m in masks.items() if seen.count(m.tobytes()) == 1})
        found.append((face, drawings))
    return found


def draw_all(cache: Path, jobs: int) -> tuple[list[Face], list[dict[str, dict[int, NDArray[np.uint8]]]]]:
    """Every face of every package, and for each script: character -> face number -> mask [32 * 32]."""
    packages = read_packages(HERE / "glyphs_packages.txt")
    fetch(packages, cache)
    faces: list[Face] = []
    drawings: list[dict[str, dict[int, NDArray[np.uint8]]]] = [{c: {} for c in s.characters} for s in SCRIPTS]
    with ProcessPoolExecutor(jobs) as pool:
        for found in pool.map(draw_package, packages, [cache] * len(packages)):
            for face, by_script in found:
                for masks, by_character in zip(by_script, drawings, strict=True):
                    for character, mask in masks.items():
                        by_character[character][len(faces)] = mask
                faces.append(face)
            print(f"{len(faces)} faces", file=sys.stderr)
    return faces, drawings


def select(
    faces: list[Face], drawings: list[dict[str, dict[int, NDArray[np.uint8]]]]
) -> tuple[dict[str, NDArray], str]:
    """The arrays of masks.npz and the text of faces.csv."""
    names = sorted({face.family for face in faces})
    family = np.array([names.index(face.family) for face in faces])
    rows: list[tuple[int, int, NDArray[np.int64], NDArray[np.uint8]]] = []
    for number, (script, by_character) in enumerate(zip(SCRIPTS, drawings, strict=True)):
        usable = [c for c in script.characters if len(by_character[c]) >= FACES]
        ids = [np.array(list(by_character[c])) for c in usable]
        masks = [np.stack(list(by_character[c].values())) for c in usable]
        keep = keep_true_drawings(masks, [family[i] for i in ids])
        candidates = 0
        for character, i, m, k in zip(usable, ids, masks, keep, strict=True):
            i, m = i[k], m[k]
            chosen = np.sort(choose_faces(m, family[i], FACES))
            if len(chosen) == FACES and len(np.unique(family[i[chosen]])) >= FAMILIES:
                rows.append((number, ord(character), i[chosen], m[chosen]))
                candidates += 1
        print(f"{script.name}: {candidates} candidate characters", file=sys.stderr)
    sums = np.stack([m.sum(0, dtype=np.int64) for *_, m in rows])
    taken = [rows[i] for i in choose_characters(sums, np.array([r[0] for r in rows]), CHARACTERS)]

    used = sorted({int(i) for _, _, ids, _ in taken for i in ids})
    renumber = {old: new for new, old in enumerate(used)}
    packed = np.stack([m for *_, m in taken])  # [C, F, 1024]
    arrays = {
        "script_names": np.array([s.name for s in SCRIPTS]),
        "script_splits": np.array([SPLITS.index(s.split) for s in SCRIPTS], dtype=np.uint8),
        "class_scripts": np.array([r[0] for r in taken], dtype=np.uint8),
        "codepoints": np.array([r[1] for r in taken], dtype=np.uint32),
        "faces": np.array([[renumber[int(i)] for i in r[2]] for r in taken], dtype=np.uint16),
        "masks": packed[..., 0::2] << 4 | packed[..., 1::2],  # two pixels a byte, the left one high
    }
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("face", *Face._fields, "images"))
    images = np.bincount(arrays["faces"].ravel())
    for old, new in renumber.items():
        table.writerow((new, *faces[old], images[new]))
    return arrays, text.getvalue()


def report(arrays: dict[str, NDArray], table: str) -> str:
    """A line a script: classes, images and families a class; for the data sheet."""
    family = [row["family"] for row in csv.DictReader(io.StringIO(table))]
    lines = [
        "| script | split | classes | faces | families | families a class, least to most |",
        "|---|---|---|---|---|---|",
    ]
    for number, name in enumerate(arrays["script_names"]):
        faces = arrays["faces"][arrays["class_scripts"] == number]
        a_class = sorted(len({family[i] for i in row}) for row in faces) or [0]
        every = {int(i) for i in faces.ravel()}
        split = SPLITS[arrays["script_splits"][number]]
        lines.append(
            f"| {name} | {split} | {len(faces)} | {len(every)} | {len({family[i] for i in every})} "
            f"| {a_class[0]} to {a_class[-1]} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Build, then write or compare. Exit status 1 when the comparison finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for the downloaded and unpacked packages"
    )
    parser.add_argument("--output", type=Path, default=DATA, help="folder of masks.npz and faces.csv")
    parser.add_argument(
        "--check", action="store_true", help="compare with the files in --output, write nothing"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that draw")
    options = parser.parse_args()
    if PIL.__version__ != PILLOW:
        parser.error(f"Pillow {PIL.__version__} draws other bits; install Pillow {PILLOW}")
    arrays, table = select(*draw_all(options.cache.resolve(), options.jobs))
    print(report(arrays, table))
    for name, array in arrays.items():
        print(f"{name}: {array.dtype} {array.shape} sha256 {hashlib.sha256(array.tobytes()).hexdigest()}")
    masks, faces = options.output / "masks.npz", options.output / "faces.csv"
    if not options.check:
        options.output.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(masks, **arrays)
        faces.write_text(table, encoding="utf-8")
        print(f"wrote {masks} ({masks.stat().st_size} bytes) and {faces}")
        return 0
    with np.load(masks) as stored:
        different = [
            n
            for n in {*arrays, *stored.files}
            if n not in stored.files
            or n not in arrays
            or arrays[n].dtype != stored[n].dtype
            or not np.array_equal(arrays[n], stored[n])
        ]
    if table != faces.read_text(encoding="utf-8"):
        different.append(faces.name)
    print(f"differs: {', '.join(sorted(different))}" if different else "same bits")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
