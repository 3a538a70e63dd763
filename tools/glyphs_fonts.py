"""Debian font packages: fetch named versions, read their licences, draw characters from their faces."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MASK_SIZE = 32
LEVELS = 16  # 4 bits a pixel
DRAW_SIZE = 128  # pixels per em before the drawing is cropped and shrunk
FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# Licences a face may have; all else (GPL even with a font exception, LGPL, CC-BY, custom ones) is left out.
PERMISSIVE = frozenset(
    ("OFL-1.0", "OFL-1.1", "Apache-2.0", "MIT", "BSD-3-Clause", "CC0-1.0", "public-domain", "Bitstream-Vera")
)
# Non-characters: no font may map them, so they draw each font's .notdef.
_NOTDEF = ("\uffff", "\ufffe")
_SPELLINGS = (
    (
        r"(sil[- _])?(open[ _]font[ _]license|ofl|sil)[-, _]*(version[ _])?1\.1.*|sil open font license",
        "OFL-1.1",
    ),
    (r"ofl", "OFL-1.1"),
    (r"ofl-1\.0", "OFL-1.0"),
    (r"apache-2(\.0)?", "Apache-2.0"),
    (r"mit|expat", "MIT"),
    (r"bsd-3-clause", "BSD-3-Clause"),
    (r"cc0-1\.0", "CC0-1.0"),
    (r"public[- ]domain", "public-domain"),
    (r"bitstream-?vera(-fonts)?", "Bitstream-Vera"),
)
_STYLE_WORDS = re.compile(
    r"\b(ui|display|eco|yethangul|slanted|upright|inclined|italic|oblique|regular|normal|book|med|lt|blk|thn|reg|bd|"
    r"(semi|demi|extra|ultra|ext|sem)? ?(thin|hairline|light|medium|bold|bd|black|heavy|condensed|cond|"
    r"narrow|compact|expanded)|semi|demi|extra|ultra)\b|(?<=[a-z])(Semi|Extra|Ultra)?(Bold|Light|Medium|Regular)\b",
    re.IGNORECASE,
)
# Names of one design that differ in more than such words.
_ONE_DESIGN = (
    (r"( Mono)? CJK (HK|JP|KR|SC|TC)$", " CJK"),
    (r"^BIZ UDP", "BIZ UD"),
    (r"^CabinSketch$", "Cabin Sketch"),
    (r"^LXGW WenKai Mono$", "LXGW WenKai"),
    (r"^UKIJ_Mac ", "UKIJ "),
    (r"^kiloji [BDP]$", "kiloji"),
    (r"^NanumSquare_ac$", "NanumSquare"),
)


class Package(NamedTuple):
    """A line of glyphs_packages.txt: which version, which licence, and what in the copyright file says so."""

    name: str
    version: str
    licence: str
    evidence: str
    faces: str


class Face(NamedTuple):
    """One face of one font file of one package."""

    package: str
    version: str
    licence: str
    file: str
    index: int
    family: str
    style: str
    sha256: str


def read_packages(path: Path) -> list[Package]:
    """The pinned package list: `package version licence evidence faces` a line, `#` starts a comment.

    `evidence` is a token of the `Files:` field whose stanza carries the licence, or `text` for a copyright
    file without stanzas; `faces` is a comma-separated list of file-name patterns.
    """
    packages = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        if len(fields) != 5:
            raise ValueError(f"{path.name}: {len(fields)} fields in {line!r}; 5 expected")
        packages.append(Package(*fields))
    return sorted(packages)


def licences(short_name: str) -> list[str]:
    """The choices that a `License:` field gives, as SPDX names; what is not permissive keeps its spelling."""

    def spdx(name: str) -> str:
        name = name.strip()
        return next((to for pattern, to in _SPELLINGS if re.fullmatch(pattern, name, re.IGNORECASE)), name)

    choices = []
    for choice in re.split(r"\s+or\s+", short_name):
        parts = [spdx(part) for part in re.split(r"\s+and\s+", choice)]
        choices += parts[:1] if all(part in PERMISSIVE for part in parts) else [" and ".join(parts)]
    return choices


def licence_of(text: str, evidence: str) -> list[str]:
    """Licences in the stanza of a Debian copyright file that `evidence` names (see `read_packages`)."""
    if evidence == "text":
        if re.search(r"\bGPL\b|General Public|Affero", text):
            return []
        if "SIL Open Font License" in text or "SIL OPEN FONT LICENSE" in text:
            return ["OFL-1.1"]
        return ["public-domain"] if re.search(r"License: Public Domain", text) else []
    for stanza in re.split(r"\n[ \t]*\n", text):
        files = re.search(r"^Files:(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        licence = re.search(r"^License:[ \t]*(.*)", stanza, re.MULTILINE)
        if files and licence and evidence in files.group(1).split():
            if licence.group(1).strip() == "other" and "fonts accompanying this license" in " ".join(
                stanza.split()
            ):
                return ["Bitstream-Vera"]  # its text in full, not its name
            return licences(licence.group(1))
    return []


def fetch(packages: list[Package], cache: Path) -> None:
    """Download the missing packages into `cache` and unpack them there; nothing is installed."""
    cache.mkdir(parents=True, exist_ok=True)
    wanted = {
        package: cache / f"{package.name}_{package.version.replace(':', '%3a')}_all" for package in packages
    }
    missing = [package for package, folder in wanted.items() if not Path(f"{folder}.deb").exists()]
    for start in range(0, len(missing), 16):
        names = [f"{package.name}={package.version}" for package in missing[start : start + 16]]
        subprocess.run(["apt-get", "-qq", "download", *names], cwd=cache, check=True)
    for folder in wanted.values():
        if not folder.exists():
            subprocess.run(["dpkg-deb", "-x", f"{folder}.deb", str(folder)], check=True)


def family_of(name: str) -> str:
    """A face's design: its family name without words for weight, width and region."""
    family = " ".join(_STYLE_WORDS.sub(" ", name.replace("-", " ")).split()) or name
    for pattern, design in _ONE_DESIGN:
        family = re.sub(pattern, design, family)
    return family


def faces_of(package: Package, cache: Path) -> Iterator[tuple[Face, Path]]:
    """The faces of an unpacked package in a fixed order; its copyright file must confirm the licence."""
    folder = cache / f"{package.name}_{package.version.replace(':', '%3a')}_all"
    text = (folder / "usr/share/doc" / package.name / "copyright").read_text(
        encoding="utf-8", errors="replace"
    )
    stated = licence_of(text, package.evidence)
    if package.licence not in PERMISSIVE or package.licence not in stated:
        raise ValueError(f"{package.name}: its copyright file gives {stated}, not {package.licence}")
    patterns = package.faces.split(",")
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in FONT_SUFFIXES and not p.is_symlink())
    for path in sorted(paths, key=lambda p: p.relative_to(folder).as_posix()):
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns):
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for index in range(64):
            try:
                font = ImageFont.truetype(path, 16, index, layout_engine=ImageFont.Layout.BASIC)
            except OSError:  # no such face in the file, or not a scalable font
                break
            family, style = (part or "" for part in font.getname())
            name = path.relative_to(folder).as_posix()
            yield Face(*package[:3], name, index, family_of(family or path.stem), style, digest), path
            if path.suffix.lower() not in (".ttc", ".otc"):
                break


class Pen:
    """Draws single characters of one face as masks."""

    def __init__(self, path: Path, index: int) -> None:
        self.font = ImageFont.truetype(path, DRAW_SIZE, index, layout_engine=ImageFont.Layout.BASIC)
        self.notdef = {drawing.tobytes() for code in _NOTDEF if (drawing := self._draw(code)) is not None}

    def _draw(self, character: str) -> Image.Image | None:
        left, top, right, bottom = map(int, self.font.getbbox(character))
        if right - left < 1 or bottom - top < 1 or max(right - left, bottom - top) > 8 * DRAW_SIZE:
            return None
        image = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=self.font)
        box = image.getbbox()
        return None if box is None else image.crop(box)

    def mask(self, character: str) -> NDArray[np.uint8] | None:
        """The drawing, its longer side filling the square: uint8 [32, 32] of 0..15.

        None if the face draws nothing, its .notdef, or something smaller than the square.
        """
        try:
            drawing = self._draw(character)
        except OSError:
            return None
        if drawing is None or drawing.tobytes() in self.notdef or max(drawing.size) < MASK_SIZE:
            return None
        longest = max(drawing.size)
        width, height = (max(1, (2 * side * MASK_SIZE + longest) // (2 * longest)) for side in drawing.size)
        small = np.asarray(drawing.resize((width, height), Image.Resampling.BOX), dtype=np.int32)
        mask = np.zeros((MASK_SIZE, MASK_SIZE), dtype=np.uint8)
        top, left = (MASK_SIZE - height) // 2, (MASK_SIZE - width) // 2
        mask[top : top + height, left : left + width] = (small * (LEVELS - 1) + 127) // 255
        return mask
