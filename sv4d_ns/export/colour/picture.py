"""Pictures of an exported mesh: what the file shows, without a graphics library."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from sv4d_ns.export.colour.raster import rasterise
from sv4d_ns.geometry.rays import project_array

if TYPE_CHECKING:
    from sv4d_ns.export.formats.asset import AnimatedMesh

SAMPLES = 2
"""Per pixel and axis, so that edges are not stairs."""


def draw(
    mesh: "AnimatedMesh", frame: int, c2w: Float[np.ndarray, "4 4"], focal: float, size: int
) -> UInt8[np.ndarray, "size size 4"]:
    """One square picture of a mesh in its own colours (they hold the light of the video already), straight alpha.

    Args:
        c2w: OpenGL camera-to-world matrix, in the mesh's coordinates.
        focal: pixels; the principal point is the centre.
    """
    fine = SAMPLES * size
    pixels, depth = project_array(mesh.positions[frame], c2w, SAMPLES * focal, fine)
    seen = rasterise(pixels, depth, mesh.faces, fine)
    inside = seen.face >= 0
    colour = np.zeros((fine, fine, 4), np.float32)
    corners, weights = mesh.faces[seen.face[inside]], seen.barycentric[inside][..., None]
    if mesh.texture is None:
        colour[inside, :3] = (mesh.colors[corners] * weights).sum(1)
    else:
        colour[inside, :3] = _texels(mesh.texture.image, (mesh.texture.uv[corners] * weights).sum(1))
    colour[inside, 3] = 255
    mean = colour.reshape(size, SAMPLES, size, SAMPLES, 4).mean((1, 3))
    mean[..., :3] /= np.maximum(mean[..., 3:] / 255, 1e-6)
    return mean.round().clip(0, 255).astype(np.uint8)


def _texels(image: UInt8[np.ndarray, "s s 3"], uv: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "m 3"]:
    """Bilinear samples of a texture."""
    side = len(image)
    place = np.clip(uv * side - 0.5, 0, side - 1)
    low = np.minimum(place.astype(int), side - 2)
    x, y = (place - low).astype(np.float32).T[..., None]
    (column, row) = low.T
    top = image[row, column] * (1 - x) + image[row, column + 1] * x
    return top * (1 - y) + (image[row + 1, column] * (1 - x) + image[row + 1, column + 1] * x) * y
