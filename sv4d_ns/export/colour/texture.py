"""A UV atlas for a mesh and the pictures baked into it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from sv4d_ns.export.colour.baking import SurfacePoints
from sv4d_ns.export.colour.raster import rasterise
from sv4d_ns.export.limits import check_texture_size
from sv4d_ns.export.surface.extraction import neighbour_mean, vertex_graph

PADDING = 4
"""Texels between charts: as far as bilinear filtering and two smaller mip levels reach over a seam."""
MARGIN = 2
"""Texels around all charts: half a texel of bilinear filtering, in pictures half as fine and their first mip level."""
SMOOTHING = 10
"""Rounds of smoothing of the copy that charts are found on."""
FILL = 0.6
"""Share of the square that charts are expected to fill."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """A mesh cut into charts that lie flat in the unit square without overlap."""

    vertex: Int[np.ndarray, " m"]
    """The vertex of the uncut mesh that each of the m cut vertices is a copy of."""
    faces: Int[np.ndarray, "f 3"]
    """The faces, in their order, over the cut vertices."""
    uv: Float[np.ndarray, "m 2"]
    """In [0, 1]; (0, 0) is the image's upper left corner, v runs down, as in glTF."""
    size: int
    """Texels along the side."""


def unwrap(vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"], size: int) -> Atlas:
    """Charts by xatlas, packed into `size` x `size` texels.

    The charts are found on a smoothed copy: a fitted surface is uneven at the scale of its faces, which would cut it
    into hundreds of charts (489 instead of 26, 43 % instead of 12 % more vertices on the benchmark's fox), and every
    doubled vertex costs in every frame.

    Raises:
        InputError: a size no texture can have.
    """
    import xatlas

    check_texture_size(size)
    smooth = smoothed(vertices, faces, SMOOTHING)
    corner = smooth[faces]
    area = 0.5 * np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=-1).sum()
    atlas = xatlas.Atlas()
    atlas.add_mesh(np.ascontiguousarray(smooth, np.float32), np.ascontiguousarray(faces, np.uint32))
    charts, packing = xatlas.ChartOptions(), xatlas.PackOptions()
    charts.max_cost, charts.normal_deviation_weight = 8.0, 1.0
    # judging the shape of every possible chart's border takes two thirds of the time and saves one chart in four
    charts.straightness_weight = charts.roundness_weight = 0.0
    # a fixed resolution would spill over into a second atlas: choose the scale, and fit the result into the square
    packing.texels_per_unit, packing.padding, packing.bilinear = size * np.sqrt(FILL / area), PADDING, True
    atlas.generate(charts, packing)
    vertex, corners, uv = atlas[0]
    texels = uv * [atlas.width, atlas.height] / max(atlas.width, atlas.height)
    # pictures of moments lie side by side in one image: no filter may reach from one into the next
    texels = (MARGIN + texels * (size - 2 * MARGIN)) / size
    return Atlas(vertex.astype(np.int64), corners.astype(np.int32).reshape(-1, 3), texels.astype(np.float32), size)


def smoothed(
    vertices: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"], rounds: int
) -> Float[np.ndarray, "n 3"]:
    """Each vertex half-way to the mean of its neighbours, so many times (uniform Laplacian smoothing)."""
    mean = neighbour_mean(vertex_graph(faces, len(vertices)))
    x = vertices.astype(np.float64)
    for _ in range(rounds):
        x = 0.5 * x + 0.5 * (mean @ x)
    return x


def texels(atlas: Atlas) -> tuple[Bool[np.ndarray, "size size"], SurfacePoints]:
    """Which texels lie on a face, and the surface points they stand for (row by row)."""
    flat = rasterise(atlas.uv * atlas.size, np.ones(len(atlas.uv)), atlas.faces, atlas.size)
    covered = flat.face >= 0
    return covered, SurfacePoints(flat.face[covered], flat.barycentric[covered])


def nearest_covered(covered: Bool[np.ndarray, "size size"]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the nearest texel on a chart: with its colour, no filter meets a background at a seam."""
    if covered.all() or not covered.any():
        return np.indices(covered.shape)[0], np.indices(covered.shape)[1]
    row, column = ndimage.distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return row, column


def bake(atlas: Atlas, colors: Callable[[SurfacePoints], Float[np.ndarray, "k 3"]]) -> UInt8[np.ndarray, "size size 3"]:
    """The sRGB base colour image of an atlas.

    Args:
        colors: sRGB in [0, 1] of points on the uncut mesh's faces.
    """
    return next(bake_many(atlas, lambda points: iter([colors(points)])))


def bake_many(
    atlas: Atlas, colors: Callable[[SurfacePoints], Iterator[Float[np.ndarray, "k 3"]]]
) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
    """The images of several sets of colours of the same points."""
    covered, points = texels(atlas)
    nearest = nearest_covered(covered)
    for values in colors(points):
        image = np.zeros((atlas.size, atlas.size, 3), np.uint8)
        image[covered] = np.round(np.clip(values, 0, 1) * 255)
        yield image[nearest]
