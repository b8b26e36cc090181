"""A small z-buffer rasteriser: which triangle is seen at each sample of a picture or of a texture atlas.

Used for visibility and texture baking; compiled by numba, no graphics library.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sv4d_ns.utils.compiled import njit

ON_EDGE = 1e-9
"""What a corner's weight may be below 0 at a pixel's centre that lies on the opposite edge."""


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
    corners, places = np.ascontiguousarray(faces, dtype=np.int64), np.ascontiguousarray(pixels, dtype=np.float64)
    depth = np.ascontiguousarray(depth, dtype=np.float64)
    face, inverse = _nearest_faces(places, depth, corners, size)
    return Coverage(face, _barycentric(places, depth, corners, face, inverse), _distances(inverse))


def depth_map(
    pixels: Float[np.ndarray, "n 2"], depth: Float[np.ndarray, " n"], faces: Int[np.ndarray, "f 3"], size: int
) -> Float[np.ndarray, "size size"]:
    """`rasterise(...).depth` alone."""
    corners, places = np.ascontiguousarray(faces, dtype=np.int64), np.ascontiguousarray(pixels, dtype=np.float64)
    return _distances(_nearest_faces(places, np.ascontiguousarray(depth, dtype=np.float64), corners, size)[1])


def _distances(inverse: Float[np.ndarray, "size size"]) -> Float[np.ndarray, "size size"]:
    with np.errstate(divide="ignore"):
        return (1 / inverse).astype(np.float32)


@njit(cache=True, nogil=True)
def _nearest_faces(pixels, depth, faces, size):  # type: ignore[no-untyped-def]
    """The nearest face at each pixel centre, -1 for none, and the inverse of its depth there, 0 for none."""
    shown, inverse = np.full((size, size), -1, np.int32), np.zeros((size, size))
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
        # the weights of two corners and the inverse depth are linear over the picture
        u_x, u_y = (y1 - y2) / area, (x2 - x1) / area
        v_x, v_y = (y2 - y0) / area, (x0 - x2) / area
        near_a, near_b, near_c = 1.0 / depth[a], 1.0 / depth[b], 1.0 / depth[c]
        for row in range(top, bottom):
            y = row + 0.5
            u_row, v_row = u_y * (y - y2) - u_x * x2, v_y * (y - y2) - v_x * x2
            for column in range(left, right):
                x = column + 0.5
                u, v = u_row + u_x * x, v_row + v_x * x
                w = 1.0 - u - v
                # a centre on an edge is of both its faces, whichever way it is rounded
                if u < -ON_EDGE or v < -ON_EDGE or w < -ON_EDGE:
                    continue
                near = u * near_a + v * near_b + w * near_c
                if near > inverse[row, column]:
                    inverse[row, column] = near
                    shown[row, column] = index
    return shown, inverse


@njit(cache=True, nogil=True)
def _barycentric(pixels, depth, faces, shown, inverse):  # type: ignore[no-untyped-def]
    size = shown.shape[0]
    weights = np.zeros((size, size, 3), np.float32)
    for row in range(size):
        for column in range(size):
            if shown[row, column] < 0:
                continue
            index = shown[row, column]
            a, b, c = faces[index, 0], faces[index, 1], faces[index, 2]
            x, y = column + 0.5, row + 0.5
            x0, y0, x1, y1 = pixels[a, 0] - x, pixels[a, 1] - y, pixels[b, 0] - x, pixels[b, 1] - y
            x2, y2 = pixels[c, 0] - x, pixels[c, 1] - y
            area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
            u, v = max((x1 * y2 - x2 * y1) / area, 0.0), max((x2 * y0 - x0 * y2) / area, 0.0)
            w = max(1.0 - u - v, 0.0)
            weights[row, column, 0] = u / depth[a] / inverse[row, column]
            weights[row, column, 1] = v / depth[b] / inverse[row, column]
            weights[row, column, 2] = w / depth[c] / inverse[row, column]
    return weights
