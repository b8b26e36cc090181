"""Pictures of an exported mesh: what the file shows, without a graphics library."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from sv4d_ns.export.colour.raster import rasterise
from sv4d_ns.geometry.rays import project_array
from sv4d_ns.utils.compiled import njit

if TYPE_CHECKING:
    from sv4d_ns.export.formats.asset import AnimatedMesh

SAMPLES = 2
"""Per pixel and axis, so that edges are not stairs."""


def draw(
    mesh: "AnimatedMesh", frame: float, c2w: Float[np.ndarray, "4 4"], focal: float, size: int
) -> UInt8[np.ndarray, "size size 4"]:
    """One square picture of a mesh in its own colours (they hold the light of the video already), straight alpha.

    Args:
        frame: from 0; between two frames the vertices are where the file has them, on the line between, and an
            animated texture is that of the frame before.
        c2w: OpenGL camera-to-world matrix, in the mesh's coordinates.
        focal: pixels; the principal point is the centre.
    """
    low = min(int(frame), mesh.num_frames - 1)
    share, high = frame - low, min(low + 1, mesh.num_frames - 1)
    positions = (1 - share) * mesh.positions[low] + share * mesh.positions[high]
    pixels, depth = project_array(positions, c2w, SAMPLES * focal, SAMPLES * size)
    seen = rasterise(pixels, depth, mesh.faces, SAMPLES * size)
    if mesh.texture is None:
        values, image = mesh.colors.astype(np.float32), np.zeros((0, 0, 3), np.uint8)
    else:
        moments = mesh.texture.moments
        image = mesh.texture.image if moments is None else moments.images[moments.shown[low]]
        values, image = mesh.texture.uv.astype(np.float32), np.ascontiguousarray(image)
    return _shaded(seen.face, seen.barycentric, np.ascontiguousarray(mesh.faces), values, image, SAMPLES)


@njit(cache=True, nogil=True)
def _shaded(shown, weights, faces, values, image, samples):  # type: ignore[no-untyped-def]
    """Means of `samples` squared samples a pixel; `values` are the corners' colours, or their places in `image`."""
    size, side = shown.shape[0] // samples, image.shape[0]
    picture = np.zeros((size, size, 4), np.uint8)
    color = np.zeros(3)
    for row in range(size):
        for column in range(size):
            color[:] = 0.0
            hits = 0
            for i in range(samples * row, samples * (row + 1)):
                for j in range(samples * column, samples * (column + 1)):
                    index = shown[i, j]
                    if index < 0:
                        continue
                    hits += 1
                    a, b, c = values[faces[index, 0]], values[faces[index, 1]], values[faces[index, 2]]
                    u, v, w = weights[i, j, 0], weights[i, j, 1], weights[i, j, 2]
                    if side == 0:
                        for k in range(3):
                            color[k] += u * a[k] + v * b[k] + w * c[k]
                        continue
                    # bilinear; the texel's centre is at a half
                    x = min(max((u * a[0] + v * b[0] + w * c[0]) * side - 0.5, 0.0), side - 1.0)
                    y = min(max((u * a[1] + v * b[1] + w * c[1]) * side - 0.5, 0.0), side - 1.0)
                    left, top = min(int(x), side - 2), min(int(y), side - 2)
                    x, y = x - left, y - top
                    for k in range(3):
                        upper = image[top, left, k] * (1 - x) + image[top, left + 1, k] * x
                        lower = image[top + 1, left, k] * (1 - x) + image[top + 1, left + 1, k] * x
                        color[k] += upper * (1 - y) + lower * y
            if hits > 0:
                for k in range(3):
                    picture[row, column, k] = min(int(color[k] / hits + 0.5), 255)
                picture[row, column, 3] = int(255 * hits / (samples * samples) + 0.5)
    return picture
