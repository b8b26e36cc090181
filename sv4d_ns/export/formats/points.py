"""Points that ride on an animated mesh: area-uniform in the first frame, the same surface points in all frames."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from sv4d_ns.export.colour.baking import SurfacePoints
from sv4d_ns.export.formats.asset import AnimatedMesh


@dataclass(frozen=True, eq=False)
class MovingPoints:
    """k surface points over all frames, in world coordinates (z up)."""

    on: SurfacePoints
    positions: Float[np.ndarray, "t k 3"]
    """With the root motion, if there is any."""
    normals: Float[np.ndarray, "t k 3"]
    """Unit length."""
    colors: UInt8[np.ndarray, "k 3"]
    """sRGB."""
    confidence: Float[np.ndarray, " k"]
    """Of the nearest corner."""


def sample_points(mesh: AnimatedMesh, count: int, seed: int = 0) -> MovingPoints:
    """`count` points of the surface; colours come from the texture where there is one."""
    rng = np.random.default_rng(seed)
    corner = mesh.positions[0][mesh.faces].astype(np.float64)
    area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=-1)
    # one stratum per point along the faces' running area: no clumps
    where = (np.arange(count) + rng.random(count)) / count * area.sum()
    face = np.minimum(np.searchsorted(np.cumsum(area), where), len(area) - 1)
    u, v = np.sqrt(rng.random(count)), rng.random(count)
    points = SurfacePoints(face, np.stack([1 - u, u * (1 - v), u * v], axis=-1).astype(np.float32))
    positions = np.stack([points.at(frame, mesh.faces) for frame in mesh.placed()])
    normals = np.stack([points.at(frame, mesh.faces) for frame in mesh.normals])
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
    nearest = mesh.faces[face, points.barycentric.argmax(axis=1)]
    return MovingPoints(
        points,
        positions.astype(np.float32),
        normals.astype(np.float32),
        _colors(mesh, points),
        mesh.confidence[nearest],
    )


def _colors(mesh: AnimatedMesh, points: SurfacePoints) -> UInt8[np.ndarray, "k 3"]:
    if mesh.texture is None:
        return np.round(points.at(mesh.colors, mesh.faces)).astype(np.uint8)
    size = len(mesh.texture.image)
    texel = (points.at(mesh.texture.uv, mesh.faces) * size).astype(int).clip(0, size - 1)
    return mesh.texture.image[texel[:, 1], texel[:, 0]]
