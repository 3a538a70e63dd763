"""Glyphs: from drawings to colour images, in integer arithmetic alone, so every machine makes the same bits.

Every random choice is a hash of (seed, image number, slot), so chunks can be rendered in any order.
Lengths are half pixels from the image's centre, opacities 0..128, colours int16; no value leaves its type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 32
_CHUNK = 64  # images whose planes stay in a core's cache
_BORDER = 2  # empty pixels around a drawing
_PADDED = SIZE + 2 * _BORDER
_OPAQUE = 128

# round(64 * sin(2 pi k / 64)) for k = 0..16: the unit of the direction table
_QUARTER = (0, 6, 12, 19, 24, 30, 36, 41, 45, 49, 53, 56, 59, 61, 63, 64, 64)
_SINE = np.array(
    [*_QUARTER[:16], *_QUARTER[:0:-1], *(-v for v in _QUARTER[:16]), *(-v for v in _QUARTER[:0:-1])],
    dtype=np.int32,
)

_AXIS = np.arange(SIZE, dtype=np.int32) * 2 - (SIZE - 1)
_X = _AXIS.reshape(1, 1, SIZE)
_Y = _AXIS.reshape(1, SIZE, 1)


@dataclass(frozen=True)
class Difficulty:
    """What varies between images. Pairs are inclusive bounds."""

    inverse_size: tuple[int, int]  # 256 * drawing pixels per image pixel
    aspect: int  # up to this / 256, either way
    slant: int  # horizontal shear, / 256
    turn: int  # rotation, / 256 rad
    shift: int  # half pixels, each axis
    contrast: tuple[int, int]  # luminance between character and background
    chroma: int  # colour levels
    gradient: int  # levels from the centre to an edge
    texture: int  # levels of the smooth background
    noise: int  # levels of the pixel noise
    blobs: int  # discs behind the character
    fragments: int  # parts of other characters behind it, at the edges
    strokes: int  # strokes behind it
    arcs: int  # curved strokes behind it
    cuts: int  # thin strokes across it
    clutter: tuple[int, int]  # clutter's luminance, / 256 of the way from background to character


DIFFICULTIES = {
    "soft": Difficulty(
        inverse_size=(284, 360), aspect=24, slant=60, turn=26, shift=5, contrast=(110, 190), chroma=70,
        gradient=24, texture=16, noise=12, blobs=1, fragments=0, strokes=1, arcs=1, cuts=0, clutter=(-96, 96),
    ),
    "mid": Difficulty(
        inverse_size=(284, 420), aspect=36, slant=84, turn=40, shift=8, contrast=(90, 180), chroma=90,
        gradient=32, texture=28, noise=24, blobs=1, fragments=2, strokes=1, arcs=1, cuts=1,
        clutter=(-128, 144),
    ),
}  # fmt: skip


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A 32-bit integer hash (two rounds of xor-shift and multiply; wraps)."""
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


class _Dice:
    """The random numbers of a chunk of images: an independent one for each image and slot, slots in order."""

    def __init__(self, seed: int, image_ids: NDArray[np.uint32]) -> None:
        key = _mix(np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))
        self.key = _mix(_mix(image_ids + key[0]) ^ key[1])
        self.slot = 0

    def raw(self, *shape: int) -> NDArray[np.uint32]:
        """uint32 [images, *shape]."""
        size = int(np.prod(shape, dtype=np.int64))
        slots = np.arange(self.slot, self.slot + size, dtype=np.uint32) * np.uint32(0x9E3779B9)
        self.slot += size
        return _mix(self.key[:, None] + slots).reshape(len(self.key), *shape)

    def between(self, low: int, high: int, *shape: int) -> NDArray[np.int32]:
        """int32 [images, *shape], uniform in low..high inclusive."""
        span = np.uint64(high - low + 1)
        return (self.raw(*shape).astype(np.uint64) * span >> np.uint64(32)).astype(np.int32) + np.int32(low)

    def plane(self, low: int, high: int) -> NDArray[np.int32]:
        """int32 [images, 1, 1]."""
        return self.between(low, high, 1, 1)

    def direction(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """64 * (cosine, sine) of a uniform angle, each int32 [images, 1, 1]."""
        angle = self.plane(0, 63)
        return _SINE[(angle + 16) & 63], _SINE[angle]


def _neighbours(masks: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """[N, 32, 32] masks of 0..15 -> [N * 36 * 36]: four neighbouring pixels in one number, so one look-up.

    From the low bits: the pixel, its right one, its lower one, the one below that right one; 4 bits each.
    """
    wide = np.zeros((len(masks), _PADDED + 1, _PADDED + 1), dtype=np.uint16)
    wide[:, _BORDER : _BORDER + SIZE, _BORDER : _BORDER + SIZE] = masks
    corner = wide[:, :-1, :-1] | wide[:, :-1, 1:] << 4 | wide[:, 1:, :-1] << 8 | wide[:, 1:, 1:] << 12
    return corner.astype(np.uint16).reshape(-1)


def _drawing(
    table: NDArray[np.uint16], rows: NDArray[np.int64], dice: _Dice, level: Difficulty, x: NDArray, y: NDArray
) -> NDArray[np.int16]:
    """Opacity [images, 32, 32] of the drawings `rows`, centred at (x, y), of random size, slant and turn."""
    size = dice.plane(*level.inverse_size)
    tall = size * (256 + dice.plane(-level.aspect, level.aspect)) >> 8
    turn = dice.plane(-level.turn, level.turn)
    slant = dice.plane(-level.slant, level.slant) - turn
    dx, dy = _X - x, _Y - y
    centre = (_BORDER * 2 + SIZE - 1) << 7  # 1/256 pixel
    limit = ((_PADDED - 1) << 8) - 1
    u = np.clip((size * dx + (size * slant >> 8) * dy >> 1) + centre, 0, limit)
    v = np.clip((tall * dy + (tall * turn >> 8) * dx >> 1) + centre, 0, limit)
    index = (u >> 8) + (v >> 8) * _PADDED
    four = np.take(table, index + rows[:, None, None] * (_PADDED * _PADDED))
    fu, fv = (u >> 4 & 15).astype(np.int16), (v >> 4 & 15).astype(np.int16)
    four = four.view(np.int16)
    top = (four & 15) * (16 - fu) + (four >> 4 & 15) * fu
    bottom = (four >> 8 & 15) * (16 - fu) + (four >> 12 & 15) * fu
    # 0..3840, halved so that the product with 25 (1.5 * 128 * 256 / 1920, rounded down) stays in uint16;
    # half as much again, so that hairlines thinner than a pixel stay visible
    opacity = (top * (16 - fv) + bottom * fv >> 1).view(np.uint16) * np.uint16(25) >> np.uint16(8)
    return np.minimum(opacity, np.uint16(_OPAQUE)).view(np.int16)


def _coverage(distance: NDArray) -> NDArray[np.int16]:
    """Opacity of a shape from its signed inner distance in 1/128 pixel, blurred over one pixel."""
    return np.clip(distance + 64, 0, _OPAQUE).astype(np.int16)


def _stroke(dice: _Dice, reach: int, width: tuple[int, int], length: tuple[int, int]) -> NDArray[np.int16]:
    """A straight stroke; `width` and `length` are halves, in 1/128 pixel."""
    cosine, sine = dice.direction()
    dx, dy = _X - dice.plane(-reach, reach), _Y - dice.plane(-reach, reach)
    across = _coverage(dice.plane(*width) - np.abs(dx * sine - dy * cosine))
    return np.minimum(across, _coverage(dice.plane(*length) - np.abs(dx * cosine + dy * sine)))


def _arc(dice: _Dice, reach: int, width: tuple[int, int], radius: tuple[int, int]) -> NDArray[np.int16]:
    """Part of a ring; `width` is half, in 1/128 pixel, `radius` in half pixels."""
    cosine, sine = dice.direction()
    r = dice.plane(*radius)
    dx, dy = _X - dice.plane(-reach, reach), _Y - dice.plane(-reach, reach)
    # |d - r| = |d^2 - r^2| / (d + r), near the ring |d^2 - r^2| / 2r
    ring = _coverage(dice.plane(*width) - (np.abs(dx * dx + dy * dy - r * r) * 32 // r))
    return np.minimum(ring, _coverage(dx * cosine + dy * sine - dice.plane(-16, 16) * r))


def _blob(dice: _Dice, reach: int, radius: tuple[int, int]) -> NDArray[np.int16]:
    """A disc with a soft edge."""
    r = dice.plane(*radius)
    dx, dy = _X - dice.plane(-reach, reach), _Y - dice.plane(-reach, reach)
    return np.clip((r * r - dx * dx - dy * dy) * 8 // r, 0, _OPAQUE).astype(np.int16)


def _blend(image: NDArray[np.int16], colour: NDArray[np.int16], opacity: NDArray[np.int16]) -> None:
    """image [images, 3, 32, 32] += (colour - image) * opacity / 128, in place."""
    change = colour - image
    change *= opacity[:, None]
    change >>= 7
    image += change


def _colour(dice: _Dice, luminance: NDArray[np.int32], chroma: int) -> NDArray[np.int16]:
    """Colours [images, 3, 1, 1] of about the luminance [images, 1, 1], of random hue."""
    tint = dice.between(-chroma, chroma, 3, 1, 1)
    own = (77 * tint[:, 0] + 150 * tint[:, 1] + 29 * tint[:, 2]) >> 8
    return np.clip(luminance[:, None] + tint - own[:, None], 0, 255).astype(np.int16)


def _smooth(dice: _Dice, amplitude: int) -> NDArray[np.int16]:
    """A smooth field [images, 32, 32] of -amplitude..amplitude, linear between 5 x 5 points."""
    points = dice.between(-amplitude, amplitude, 5, 5).astype(np.int64)
    cell, step = np.arange(SIZE) // 8, np.arange(SIZE) % 8
    rows: NDArray[np.int64] = points[:, cell] * (8 - step)[:, None] + points[:, cell + 1] * step[:, None]
    return (rows[:, :, cell] * (8 - step) + rows[:, :, cell + 1] * step >> 6).astype(np.int16)


def _chunk(
    table: NDArray[np.uint16], rows: NDArray[np.int64], per_class: int, dice: _Dice, level: Difficulty
) -> NDArray[np.uint8]:
    """One chunk of images: uint8 [images, 32, 32, 3]."""
    n_drawings = len(table) // (_PADDED * _PADDED)
    contrast = dice.plane(*level.contrast)
    dark = 16 + (dice.between(0, 255, 1, 1) * (223 - contrast) >> 8)
    light_on_dark = dice.plane(0, 1)
    ground = dark + (1 - light_on_dark) * contrast
    ink = dark + light_on_dark * contrast

    def clutter_colour() -> NDArray[np.int16]:
        return _colour(dice, ground + ((ink - ground) * dice.plane(*level.clutter) >> 8), level.chroma)

    image = np.empty((len(rows), 3, SIZE, SIZE), dtype=np.int16)
    image[...] = _colour(dice, ground, level.chroma)
    for channel in range(3):
        slope_x, slope_y = (dice.plane(-level.gradient, level.gradient) for _ in range(2))
        image[:, channel] += (slope_x * _X + slope_y * _Y) >> 5
    image += _smooth(dice, level.texture)[:, None]
    np.clip(image, 0, 255, out=image)  # what _blend needs to stay in int16
    for _ in range(level.blobs):
        _blend(image, clutter_colour(), _blob(dice, 31, (8, 22)))
    for _ in range(level.fragments):
        cosine, sine = dice.direction()
        away = dice.plane(26, 38)  # 13 to 19 pixels from the centre
        # any drawing but those of the image's own class
        other = dice.between(0, n_drawings - per_class - 1).astype(np.int64)
        other = (rows // per_class * per_class + per_class + other) % n_drawings
        shape = _drawing(table, other, dice, level, cosine * away >> 6, sine * away >> 6)
        _blend(image, clutter_colour(), shape)
    for _ in range(level.strokes):
        _blend(image, clutter_colour(), _stroke(dice, 28, (60, 160), (500, 1600)))
    for _ in range(level.arcs):
        _blend(image, clutter_colour(), _arc(dice, 28, (60, 150), (8, 26)))
    x, y = dice.plane(-level.shift, level.shift), dice.plane(-level.shift, level.shift)
    _blend(image, _colour(dice, ink, level.chroma), _drawing(table, rows, dice, level, x, y))
    for _ in range(level.cuts):
        _blend(image, clutter_colour(), _stroke(dice, 16, (24, 64), (700, 1800)))

    bits = dice.raw(SIZE, SIZE)
    for channel in range(3):
        low, high = (
            bits >> np.uint32(10 * channel) & np.uint32(31),
            bits >> np.uint32(10 * channel + 5) & np.uint32(31),
        )
        image[:, channel] += ((low + high).astype(np.int16) - 31) * np.int16(level.noise) >> 5
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def render(
    masks: NDArray[np.uint8], image_ids: NDArray[np.uint32], per_class: int, difficulty: str, seed: int
) -> NDArray[np.uint8]:
    """Images of a split's drawings.

    Args:
        masks: uint8 [N, 32, 32] of 0..15, class after class, `per_class` each.
        image_ids: uint32 [N], numbers of the images in the whole set.
        difficulty: a key of DIFFICULTIES.
        seed: 0 .. 2^64 - 1.

    Returns:
        uint8 [N, 32, 32, 3] RGB. Distractor fragments come from the other classes of `masks`.
    """
    level = DIFFICULTIES[difficulty]
    table = _neighbours(masks)
    images = np.empty((len(masks), SIZE, SIZE, 3), dtype=np.uint8)
    for start in range(0, len(masks), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(masks)))
        images[rows] = _chunk(table, rows, per_class, _Dice(seed, image_ids[rows]), level)
    return images
