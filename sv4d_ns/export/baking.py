"""Colours for a moving surface from pictures of it, and which cameras saw it.

A picture is anything with a camera and a moment: a frame of the input video, a generated view, a rendering of the
field. Each surface point takes the colours of the pictures that see it, the best-seen ones most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import ndimage, sparse

from sv4d_ns.export.mesh import smooth_fill, vertex_graph
from sv4d_ns.export.raster import project, rasterise

DEPTH_SIZE = 512
"""Pixels along the side of the depth maps that decide what hides what (a pixel is 2.4 mm at the object)."""
DEPTH_TOLERANCE = 0.008
"""World units a point may lie behind the depth map and still be seen; slanted surfaces get their slope on top."""
LEAST_FACING = 0.15
"""Cosine between normal and line of sight below which a picture says nothing: grazing pixels mix a whole side."""
SHARPNESS = 4.0
"""Power of that cosine in a picture's weight: high, so that the best-seen pictures decide and edges stay sharp."""
SILHOUETTE = 1.5
"""Pixels along a picture's silhouette that are not trusted: they hold background, or another limb a frame late."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One square picture of the object."""

    rgba: UInt8[np.ndarray, "s s 4"]
    """sRGB, straight alpha."""
    c2w: Float[np.ndarray, "4 4"]
    """OpenGL camera-to-world."""
    fov_focal: float
    """Focal length in picture widths."""
    frame: int
    """Index of the moment it shows."""
    trust: float = 1.0
    """How much it counts against other pictures that see a point equally well."""
    confidence: UInt8[np.ndarray, "s s"] | None = None
    """How far each pixel is believed, 255 fully; None fully everywhere."""


@dataclass(frozen=True, eq=False)
class SurfacePoints:
    """k points that ride on the faces of a mesh."""

    face: Int[np.ndarray, " k"]
    barycentric: Float[np.ndarray, "k 3"]

    def at(self, values: Float[np.ndarray, "n c"], faces: Int[np.ndarray, "f 3"]) -> Float[np.ndarray, "k c"]:
        """Vertex values interpolated at the points."""
        return np.einsum("kj,kjc->kc", self.barycentric, values[faces[self.face]])


def vertices_as_points(faces: Int[np.ndarray, "f 3"], count: int) -> SurfacePoints:
    """Every vertex as a corner of one of its faces (each must have one)."""
    face = np.zeros(count, np.int64)
    corner = np.zeros(count, np.int64)
    face[faces.ravel()] = np.repeat(np.arange(len(faces)), 3)
    corner[faces.ravel()] = np.tile(np.arange(3), len(faces))
    # both came from the same last occurrence of each vertex
    return SurfacePoints(face, np.eye(3, dtype=np.float32)[corner])


def gather(
    pictures: Sequence[Picture],
    points: SurfacePoints,
    positions: Float[np.ndarray, "t n 3"],
    normals: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    advance: Callable[[], None] | None = None,
) -> tuple[Float[np.ndarray, "k 3"], Float[np.ndarray, " k"]]:
    """Mean sRGB colour in [0, 1] of each point over the pictures that see it, and the sum of their weights.

    A picture's weight at a point is trust * confidence * cos^SHARPNESS(angle between normal and line of sight), 0 where
    something hides the point, where it looks away and along the picture's silhouette. Points nobody sees have weight 0
    and no colour. `advance` is called once per picture.
    """
    color, weight = np.zeros((len(points.face), 3)), np.zeros(len(points.face))
    for picture in pictures:
        moved, turned = positions[picture.frame], normals[picture.frame]
        depth = rasterise(*project(moved, picture.c2w, picture.fov_focal * DEPTH_SIZE, DEPTH_SIZE), faces, DEPTH_SIZE)
        _accumulate(
            points.face.astype(np.int64),
            points.barycentric.astype(np.float32),
            faces.astype(np.int64),
            moved.astype(np.float32),
            turned.astype(np.float32),
            depth.depth,
            _premultiplied(picture),
            picture.c2w.astype(np.float64),
            float(picture.fov_focal),
            color,
            weight,
        )
        if advance is not None:
            advance()
    return color / np.maximum(weight, 1e-12)[:, None], weight


def _premultiplied(picture: Picture) -> Float[np.ndarray, "s s 4"]:
    """Colour times weight and weight of each pixel (float32)."""
    inside = picture.rgba[..., 3] >= 128
    # pixels to the nearest one that is not object, beyond the picture included
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    weight = np.clip(depth - SILHOUETTE, 0, 1) * picture.trust
    if picture.confidence is not None:
        weight = weight * (picture.confidence / 255.0)
    rgb = picture.rgba[..., :3] / 255.0
    return np.concatenate([rgb * weight[..., None], weight[..., None]], axis=-1).astype(np.float32)


@numba.njit(cache=True, nogil=True)
def _accumulate(  # type: ignore[no-untyped-def]
    face, barycentric, faces, positions, normals, depth, pixels, c2w, focal, color, weight
):
    size, fine = pixels.shape[0], depth.shape[0]
    for k in range(face.shape[0]):
        corner = faces[face[k]]
        point, normal = np.zeros(3), np.zeros(3)
        for j in range(3):
            for i in range(3):
                point[i] += barycentric[k, j] * positions[corner[j], i]
                normal[i] += barycentric[k, j] * normals[corner[j], i]
        sight = c2w[:3, 3] - point
        length = np.sqrt((normal * normal).sum() * (sight * sight).sum())
        facing = (normal * sight).sum() / max(length, 1e-12)
        if facing < LEAST_FACING:
            continue
        z = (c2w[:3, 2] * sight).sum()
        if z <= 0.0:
            continue
        u = 0.5 - focal * (c2w[:3, 0] * sight).sum() / z
        v = 0.5 + focal * (c2w[:3, 1] * sight).sum() / z
        column, row = int(np.floor(u * fine)), int(np.floor(v * fine))
        if column < 0 or row < 0 or column >= fine or row >= fine:
            continue
        slope = z / (focal * fine) * np.sqrt(1.0 - min(facing * facing, 1.0)) / facing
        if z > depth[row, column] + DEPTH_TOLERANCE + slope:
            continue
        x, y = u * size - 0.5, v * size - 0.5
        left, top = int(np.floor(x)), int(np.floor(y))
        if left < 0 or top < 0 or left + 1 >= size or top + 1 >= size:
            continue
        x, y = x - left, y - top
        share = facing**SHARPNESS
        for i in range(4):
            value = (1.0 - y) * ((1.0 - x) * pixels[top, left, i] + x * pixels[top, left + 1, i]) + y * (
                (1.0 - x) * pixels[top + 1, left, i] + x * pixels[top + 1, left + 1, i]
            )
            if i < 3:
                color[k, i] += share * value
            else:
                weight[k] += share * value


def filled(
    color: Float[np.ndarray, "n 3"], weight: Float[np.ndarray, " n"], faces: Int[np.ndarray, "f 3"]
) -> Float[np.ndarray, "n 3"]:
    """Vertex colours with those nobody saw replaced by the smooth continuation of their neighbours' (harmonic).

    A part of the mesh in which no vertex was seen at all takes the mean colour.
    """
    seen = weight > 0
    if not seen.any():
        return np.full_like(color, 0.5)
    mean = np.average(color[seen], axis=0, weights=weight[seen])
    graph: sparse.csr_matrix = vertex_graph(faces, len(color))
    return np.clip(smooth_fill(color, seen, graph, np.broadcast_to(mean, color.shape)), 0, 1)


OBSERVED, GENERATED, UNSEEN = 1.0, 0.5, 0.0
"""Values of the confidence attribute: seen by the input camera, only by generated views, by none."""


def confidence(observed: Float[np.ndarray, " n"], generated: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """`OBSERVED`, `GENERATED` or `UNSEEN` for each vertex (float32), from the weights `gather` found with the input
    video's frames alone and with the generated views alone."""
    return np.where(observed > 0, OBSERVED, np.where(generated > 0, GENERATED, UNSEEN)).astype(np.float32)
