"""Which drawings, faces and characters enter Glyphs: rules on masks alone, exact on every machine.

Correlations come from sums of small integers, which float64 holds exactly in any order of addition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SAME_FACE = 0.98  # two drawings that correlate above this are one face
MISDRAWN = 0.35  # a drawing must correlate at least this much with the mean drawing of its character
CONFUSED = 0.05  # and may correlate with another character's mean by no more than this above its own
LOOK_ALIKE = 0.80  # no two classes' mean drawings correlate above this


def correlation(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    """Pearson correlation of the rows of integer [N, P] and [M, P] -> [N, M]; 0 where a row is flat."""
    pixels = a.shape[1]
    a, b = a.astype(np.float64), b.astype(np.float64)
    # [N, P] @ [P, M] -> [N, M], whole numbers below 2^53
    covariance = pixels * (a @ b.T) - np.outer(a.sum(1), b.sum(1))
    variance_a = pixels * (a * a).sum(1) - a.sum(1) ** 2
    variance_b = pixels * (b * b).sum(1) - b.sum(1) ** 2
    scale = np.sqrt(np.outer(variance_a, variance_b))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


def family_mean(masks: NDArray, families: NDArray) -> NDArray[np.int64]:
    """Sum over families of the mean drawing of masks [N, P], in 1/16 -> [P]: a design counts once."""
    total = np.zeros(masks.shape[1], dtype=np.int64)
    for family in np.unique(families):
        rows = masks[families == family].astype(np.int64)
        total += 16 * rows.sum(0) // len(rows)
    return total


def keep_true_drawings(masks: list[NDArray], families: list[NDArray]) -> list[NDArray[np.bool_]]:
    """For each character's drawings [N_c, P], which to keep: those that look like their character.

    Drops drawings far from their character's mean (a wrong encoding, an ornament, a placeholder) and those
    nearer to another character's mean of the same script (capitals in the place of small letters).
    """
    means = np.stack([family_mean(m, f) for m, f in zip(masks, families, strict=True)])
    keep = []
    for character, drawings in enumerate(masks):
        near = correlation(drawings, means)
        own = near[:, character].copy()
        near[:, character] = -1
        keep.append((own >= MISDRAWN) & (near.max(1, initial=-1) <= own + CONFUSED))
    return keep


def choose_faces(masks: NDArray, families: NDArray, count: int) -> NDArray[np.int64]:
    """Rows of [N, P] masks to take, at most `count`: families first, then the farthest from those taken.

    The first is the one nearest to the mean. Each next comes from the families used least so far, and is the
    drawing whose greatest correlation with any taken one is least; a drawing above SAME_FACE is never taken.
    """
    chosen: list[int] = []
    if len(masks) == 0:
        return np.array(chosen, dtype=np.int64)
    nearest = correlation(masks, family_mean(masks, families)[None])[:, 0]
    closeness = np.full(len(masks), -1.0)  # greatest correlation with a taken drawing
    wide = masks.astype(np.float64)  # once, not in every step
    used = np.zeros(int(families.max()) + 1, dtype=np.int64)
    row = int(nearest.argmax())
    while True:
        chosen.append(row)
        used[families[row]] += 1
        closeness = np.maximum(closeness, correlation(wide, wide[row : row + 1])[:, 0])
        closeness[row] = 1.0
        free = closeness <= SAME_FACE
        if len(chosen) == count or not free.any():
            return np.array(chosen, dtype=np.int64)
        free &= used[families] == used[families[free]].min()
        row = int(np.where(free, closeness, 2.0).argmin())


def choose_characters(sums: NDArray, scripts: NDArray, count: int) -> NDArray[np.int64]:
    """Rows of summed drawings [C, P] to take, at most `count` a script, no two correlating above LOOK_ALIKE.

    Scripts take turns, the one with the fewest characters left first; each takes its character whose greatest
    correlation with all taken ones, of any script, is least.
    """
    near = correlation(sums, sums)
    closeness = np.full(len(sums), -1.0)
    chosen: list[int] = []
    taken = np.zeros(int(scripts.max()) + 1, dtype=np.int64)
    while True:
        free = (closeness <= LOOK_ALIKE) & (taken[scripts] < count)
        if not free.any():
            return np.array(sorted(chosen), dtype=np.int64)
        left = np.bincount(scripts[free], minlength=len(taken))
        need = np.where(left > 0, left - (count - taken), len(sums))  # the least room to spare goes first
        row = int(np.where(free & (scripts == need.argmin()), closeness, 2.0).argmin())
        chosen.append(row)
        taken[scripts[row]] += 1
        closeness = np.maximum(closeness, near[row])
        closeness[row] = 2.0
