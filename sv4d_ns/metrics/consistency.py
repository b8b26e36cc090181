"""What can be said of views without truth: do they flicker, and can one solid object have these silhouettes?"""

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from sv4d_ns.geometry.cameras import OBJECT_BOX
from sv4d_ns.geometry.rays import project_array
from sv4d_ns.metrics.images import OPAQUE
from sv4d_ns.utils.images import over_white

HULL_RESOLUTION = 64
"""Cells along each side of the box that a hull is carved in."""


def flicker(rgba: UInt8[np.ndarray, "t v h w 4"]) -> Float[np.ndarray, " v"]:
    """Temporal flicker of each view's video: mean |I(t-1) - 2 I(t) + I(t+1)| / 2 on white, in [0, 1].

    The mean is over the pixels that the object covers at any of the three moments, colours and times. A video that
    stands still or fades evenly has 0; one that alternates between two pictures has their difference. Fast true motion
    counts too, so compare with the truth's own figure or between methods on the same video. 0 below three frames.
    """
    if len(rgba) < 3:
        return np.zeros(rgba.shape[1])
    pictures = over_white(rgba).astype(np.float32) / 255.0
    covered = rgba[..., 3] >= OPAQUE
    curve = np.abs(pictures[:-2] - 2 * pictures[1:-1] + pictures[2:]).mean(-1) / 2
    looked_at = covered[:-2] | covered[1:-1] | covered[2:]
    axes = (0, 2, 3)
    return np.where(looked_at, curve, 0).sum(axes, dtype=np.float64) / np.maximum(looked_at.sum(axes), 1)


def hull_agreement(
    alpha: UInt8[np.ndarray, "v h w"],
    c2w: Float[np.ndarray, "v 4 4"],
    focal_px: float,
    resolution: int = HULL_RESOLUTION,
    half_extent: float = OBJECT_BOX,
) -> Float[np.ndarray, " v"]:
    """Cross-view consistency of the silhouettes of one moment: how much of each one its visual hull can explain.

    A cell of the box belongs to the hull if every view sees it inside its silhouette (grown by a cell's half diagonal,
    so that discretisation alone does not carve). The hull is drawn back into each view; what remains uncovered no solid
    object can show together with the other views. The figure is the covered share of each silhouette: 1 for silhouettes
    of one object, and of empty ones alone; 0 for all where one is empty among others. Colours play no part.
    """
    size, masks = alpha.shape[-1], alpha >= OPAQUE
    if not masks.any(axis=(1, 2)).all():  # no cell is inside all of them
        return np.full(len(masks), float(not masks.any()))
    axis = (np.arange(resolution) + 0.5) / resolution * 2 * half_extent - half_extent
    hull = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    cell_px = focal_px * (half_extent / resolution) * np.sqrt(3)  # half a cell's diagonal at unit depth
    for mask, matrix in zip(masks, c2w, strict=True):
        column, row, depth, seen = _pixels(hull, matrix, focal_px, size)
        outside_by = ndimage.distance_transform_edt(~mask)
        keep = np.zeros(len(hull), bool)
        keep[seen] = outside_by[row[seen], column[seen]] <= cell_px / depth[seen] + 1.0
        hull = hull[keep]
    shares = []
    for mask, matrix in zip(masks, c2w, strict=True):
        column, row, depth, seen = _pixels(hull, matrix, focal_px, size)
        drawn = np.zeros((size, size), bool)
        drawn[row[seen], column[seen]] = True
        if seen.any():
            drawn = ndimage.distance_transform_edt(~drawn) <= cell_px / depth[seen].min() + 1.0
        shares.append((drawn & mask).sum() / mask.sum())
    return np.array(shares, float)


def _pixels(
    points: Float[np.ndarray, "n 3"], c2w: Float[np.ndarray, "4 4"], focal_px: float, size: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Column and row of the pixel each world point falls on, its depth, and whether it is in the picture (OpenGL)."""
    pixels, depth = project_array(points, c2w, focal_px, size)
    column, row = np.floor(pixels).T
    depth = np.maximum(depth, 1e-6)
    seen = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    return np.where(seen, column, 0).astype(int), np.where(seen, row, 0).astype(int), depth, seen
