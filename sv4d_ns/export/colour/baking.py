"""Colours for a moving surface from pictures of it, and which cameras saw it.

A picture is anything with a camera and a moment: a frame of the input video, a generated view, a rendering of the
field. Each surface point takes the colours of the pictures that see it, the best-seen ones most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import ndimage, sparse

from sv4d_ns.export.colour.raster import depth_map
from sv4d_ns.export.surface.extraction import smooth_fill, vertex_graph
from sv4d_ns.geometry.rays import project_array
from sv4d_ns.utils.compiled import njit

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
RIM = 1e-3
"""What such pixels count all the same: a limb thinner than they are wide is seen by nothing else."""


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
    silhouette: float = SILHOUETTE
    """Pixels along its silhouette that are not trusted."""


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


class DepthMaps:
    """Depth maps of one moving mesh, each drawn once however often it is asked for."""

    def __init__(self, positions: Float[np.ndarray, "t n 3"], faces: Int[np.ndarray, "f 3"]):
        self._positions, self._faces = positions, faces
        self._drawn: dict[tuple[int, float, bytes], Float[np.ndarray, "d d"]] = {}

    def at(self, picture: Picture) -> Float[np.ndarray, "d d"]:
        """Depth along the optical axis at a picture's camera and moment, `DEPTH_SIZE` pixels along the side."""
        key = (picture.frame, picture.fov_focal, picture.c2w.tobytes())
        if key not in self._drawn:
            focal = picture.fov_focal * DEPTH_SIZE
            seen = project_array(self._positions[picture.frame], picture.c2w, focal, DEPTH_SIZE)
            self._drawn[key] = depth_map(*seen, self._faces, DEPTH_SIZE)
        return self._drawn[key]


def gather(
    pictures: Sequence[Picture],
    points: SurfacePoints,
    positions: Float[np.ndarray, "t n 3"],
    normals: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    advance: Callable[[], None] | None = None,
    depths: DepthMaps | None = None,
) -> tuple[Float[np.ndarray, "k 3"], Float[np.ndarray, " k"]]:
    """Mean sRGB colour in [0, 1] of each point over the pictures that see it, and the sum of their weights.

    A picture's weight at a point is trust * confidence * cos^SHARPNESS(angle between normal and line of sight), 0 where
    something hides the point or it looks away, and next to nothing along the picture's silhouette. Points nobody sees
    have weight 0 and no colour. `advance` is called once per picture; `depths` keeps the mesh's depth maps for other
    calls.
    """
    color, weight = np.zeros((len(points.face), 3)), np.zeros(len(points.face))
    for picture in pictures:
        moved, turned = positions[picture.frame], normals[picture.frame]
        depth = (depths or DepthMaps(positions, faces)).at(picture)
        _accumulate(
            points.face.astype(np.int64),
            points.barycentric.astype(np.float32),
            faces.astype(np.int64),
            moved.astype(np.float32),
            turned.astype(np.float32),
            depth,
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
    weight = inside * np.clip(depth - picture.silhouette, RIM, 1) * picture.trust
    if picture.confidence is not None:
        weight = weight * (picture.confidence / 255.0)
    rgb = picture.rgba[..., :3] / 255.0
    return np.concatenate([rgb * weight[..., None], weight[..., None]], axis=-1).astype(np.float32)


@njit(cache=True, nogil=True)
def _accumulate(  # type: ignore[no-untyped-def]
    face, barycentric, faces, positions, normals, depth, pixels, c2w, focal, color, weight
):
    size, fine = pixels.shape[0], depth.shape[0]
    # scalars throughout: a small array in this loop costs more than all its arithmetic
    right_x, right_y, right_z = c2w[0, 0], c2w[1, 0], c2w[2, 0]
    up_x, up_y, up_z = c2w[0, 1], c2w[1, 1], c2w[2, 1]
    back_x, back_y, back_z = c2w[0, 2], c2w[1, 2], c2w[2, 2]
    for k in range(face.shape[0]):
        a, b, c = faces[face[k], 0], faces[face[k], 1], faces[face[k], 2]
        wa, wb, wc = barycentric[k, 0], barycentric[k, 1], barycentric[k, 2]
        # from the point to the camera
        x = c2w[0, 3] - (wa * positions[a, 0] + wb * positions[b, 0] + wc * positions[c, 0])
        y = c2w[1, 3] - (wa * positions[a, 1] + wb * positions[b, 1] + wc * positions[c, 1])
        z = c2w[2, 3] - (wa * positions[a, 2] + wb * positions[b, 2] + wc * positions[c, 2])
        nx = wa * normals[a, 0] + wb * normals[b, 0] + wc * normals[c, 0]
        ny = wa * normals[a, 1] + wb * normals[b, 1] + wc * normals[c, 1]
        nz = wa * normals[a, 2] + wb * normals[b, 2] + wc * normals[c, 2]
        lengths = (x * x + y * y + z * z) * (nx * nx + ny * ny + nz * nz)
        facing = (x * nx + y * ny + z * nz) / max(np.sqrt(lengths), 1e-12)
        if facing < LEAST_FACING:
            continue
        away = back_x * x + back_y * y + back_z * z
        if away <= 0.0:
            continue
        u = 0.5 - focal * (right_x * x + right_y * y + right_z * z) / away
        v = 0.5 + focal * (up_x * x + up_y * y + up_z * z) / away
        column, row = int(np.floor(u * fine)), int(np.floor(v * fine))
        if column < 0 or row < 0 or column >= fine or row >= fine:
            continue
        slope = away / (focal * fine) * np.sqrt(1.0 - min(facing * facing, 1.0)) / facing
        if away > depth[row, column] + DEPTH_TOLERANCE + slope:
            continue
        px, py = u * size - 0.5, v * size - 0.5
        left, top = int(np.floor(px)), int(np.floor(py))
        if left < 0 or top < 0 or left + 1 >= size or top + 1 >= size:
            continue
        px, py = px - left, py - top
        share = facing**SHARPNESS
        for i in range(4):
            upper = (1.0 - px) * pixels[top, left, i] + px * pixels[top, left + 1, i]
            lower = (1.0 - px) * pixels[top + 1, left, i] + px * pixels[top + 1, left + 1, i]
            value = share * ((1.0 - py) * upper + py * lower)
            if i < 3:
                color[k, i] += value
            else:
                weight[k] += value


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
