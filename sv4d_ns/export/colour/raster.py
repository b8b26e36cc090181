"""A small z-buffer rasteriser: which triangle is seen at each sample of a picture or of a texture atlas.

Used for visibility and texture baking; compiled by numba, no graphics library.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sv4d_ns.utils.compiled import njit


@dataclass(frozen=True)
class Coverage:
    """What each pixel of a square raster shows. `face` is -1 where it shows nothing."""

    face: Int[np.ndarray, "size size"]
    barycentric: Float[np.ndarray, "size size 3"]
    """Weights of the face's corners at the pixel's centre, perspective-correct (float32)."""
    depth: Float[np.ndarray, "size size"]
    """Along the optical axis, infinite where nothing is seen (float32)."""


def rasterise(
    pixels: Float[np.ndarray, "n 2"], depth: Float[np.ndarray, " n"], faces: Int[np.ndarray, "f 3"], size: int
) -> Coverage:
    """The nearest face at every pixel centre.

    Args:
        pixels: vertices in continuous pixel coordinates, x right, y down, pixel centres at i + 0.5.
        depth: positive distance of the vertices along the optical axis; all ones for a flat atlas. Faces with a corner
            at or behind the camera are left out.
    """
    face = np.full((size, size), -1, np.int32)
    barycentric = np.zeros((size, size, 3), np.float32)
    nearest = np.full((size, size), np.inf, np.float32)
    _rasterise(
        np.ascontiguousarray(pixels, dtype=np.float64),
        np.ascontiguousarray(depth, dtype=np.float64),
        np.ascontiguousarray(faces, dtype=np.int64),
        face,
        barycentric,
        nearest,
    )
    return Coverage(face, barycentric, nearest)


@njit(cache=True, nogil=True)
def _rasterise(pixels, depth, faces, shown, barycentric, nearest):  # type: ignore[no-untyped-def]
    size = shown.shape[0]
    for index in range(faces.shape[0]):
        a, b, c = faces[index, 0], faces[index, 1], faces[index, 2]
        if depth[a] <= 0.0 or depth[b] <= 0.0 or depth[c] <= 0.0:
            continue
        x0, y0, x1, y1 = pixels[a, 0], pixels[a, 1], pixels[b, 0], pixels[b, 1]
        x2, y2 = pixels[c, 0], pixels[c, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if area == 0.0:
            continue
        left, right = max(int(np.floor(min(x0, x1, x2) - 0.5)), 0), min(int(np.ceil(max(x0, x1, x2))), size)
        top, bottom = max(int(np.floor(min(y0, y1, y2) - 0.5)), 0), min(int(np.ceil(max(y0, y1, y2))), size)
        for row in range(top, bottom):
            for column in range(left, right):
                x, y = column + 0.5, row + 0.5
                u = ((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) / area
                v = ((x2 - x) * (y0 - y) - (x0 - x) * (y2 - y)) / area
                w = 1.0 - u - v
                if u < 0.0 or v < 0.0 or w < 0.0:
                    continue
                u, v, w = u / depth[a], v / depth[b], w / depth[c]
                total = u + v + w
                distance = np.float32(1.0 / total)
                if distance < nearest[row, column]:
                    nearest[row, column] = distance
                    shown[row, column] = index
                    barycentric[row, column, 0] = u / total
                    barycentric[row, column, 1] = v / total
                    barycentric[row, column, 2] = w / total
