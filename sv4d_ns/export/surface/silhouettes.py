"""What the input video's silhouettes say about the canonical shape.

The input camera saw the object in every frame, so its silhouettes are the truth there. Rays of the canonical frame that
the video shows full and the density leaves empty are filled (a thin tail whose density is fog), on the nodes of the
opacity grid, before a surface is cut out of it. Own design.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import spsolve
from skimage.graph import pixel_graph

from sv4d_ns.export.colour.baking import Picture
from sv4d_ns.export.surface.extraction import OpacityGrid
from sv4d_ns.geometry.rays import project_array

FOG = 0.02
"""Opacity from which a node of an empty ray says where along the ray the object is."""
SLOPE = 1.0
"""Steepest way, depth over width, from the object to what is filled: fog far before or behind it is a stray."""
STIFFNESS = 1.0
"""What a neighbouring pixel's depth counts against opaque matter at the pixel itself, for nodes of one pixel."""
TIE = 1e-4
"""Pull to the depth of the nearest full ray, for regions that nothing is known of."""


@dataclass(frozen=True, eq=False)
class Silhouette:
    """One frame's silhouette as signed distances."""

    picture: Picture
    distance: Float[np.ndarray, "s s"]
    """Shares of the picture's width from each pixel to the outline, positive outside. Zero everywhere where the film
    shows no object: that is no evidence of where it is not."""

    def at(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
        """Signed distance of world points in the picture; beyond its edge as at the edge."""
        return self._sampled([self.distance], points)[0]

    def outward(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """World directions in the picture plane in which the distance of world points grows fastest, unit length."""
        down, right = self._sampled(np.gradient(self.distance), points)
        way = right[:, None] * self.picture.c2w[:3, 0] - down[:, None] * self.picture.c2w[:3, 1]
        return way / np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-12)

    def _sampled(
        self, values: Sequence[Float[np.ndarray, "s s"]], points: Float[np.ndarray, "n 3"]
    ) -> list[Float[np.ndarray, " n"]]:
        size = len(self.distance)
        pixels, _ = project_array(points, self.picture.c2w, self.picture.fov_focal * size, size)
        return [ndimage.map_coordinates(value, pixels[:, ::-1].T - 0.5, order=1, mode="nearest") for value in values]

    def width_at(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
        """World units that the picture is wide at the depth of points."""
        return (self.picture.c2w[:3, 3] - points) @ self.picture.c2w[:3, 2] / self.picture.fov_focal


def silhouettes(film: Sequence[Picture]) -> list[Silhouette]:
    """The silhouettes of one picture per frame, in the order of the frames."""
    result = []
    for picture in sorted(film, key=lambda one: one.frame):
        inside = picture.rgba[..., 3] >= 128
        # without an outline, a distance transform gives arbitrary numbers
        distance = np.full(inside.shape, -1.0 if inside.all() else 0.0)
        if inside.any() and not inside.all():
            distance = (ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)) / len(inside)
        result.append(Silhouette(picture, distance))
    return result


def completed(
    grid: OpacityGrid, solid: Float[np.ndarray, "r r r"], level: float, film: Picture
) -> Float[np.ndarray, "r r r"]:
    """`solid` with matter on rays of the canonical frame that the film shows full and that miss its largest piece.

    It is put where along the rays the density is highest, no farther from the depth of the nearest full ray than a way
    of `SLOPE` leads, evened from ray to ray; and as thick as the silhouette is wide there.

    Args:
        solid: smoothed opacity on the nodes of `grid`.
        film: the input camera's picture at the canonical frame.
    """
    size = len(film.rgba)
    pixels, depth = project_array(_nodes(grid), film.c2w, film.fov_focal * size, size)
    column, row = (np.floor(pixels).astype(np.int64).clip(0, size - 1)).T
    ray = row * size + column
    values = solid.ravel()
    inside = film.rgba[..., 3] >= 128
    # a node covers what its cell does
    reach = max(1, round(grid.spacing.max() * film.fov_focal * size / np.median(depth)))
    pieces, _ = ndimage.label(solid > level)
    body = pieces.ravel() == np.bincount(pieces.ravel())[1:].argmax() + 1
    count = np.bincount(ray[body], minlength=size * size).reshape(size, size)
    full = ndimage.binary_dilation(count > 0, iterations=reach)
    empty = inside & ~full
    if not empty.any() or not (inside & full).any():
        return solid
    empty = ndimage.binary_dilation(empty, iterations=2 * reach) & inside
    middle = np.bincount(ray[body], depth[body], size * size).reshape(size, size) / np.maximum(count, 1)
    far, nearest = ndimage.distance_transform_edt(count == 0, return_indices=True)
    start = middle[tuple(nearest)]
    per_pixel = start / (film.fov_focal * size)
    fog, opacity = _fog(values, depth, ray, size, reach)
    own = fog.clip(start - SLOPE * far * per_pixel, start + SLOPE * far * per_pixel)
    stiffness = STIFFNESS * (2 * reach + 1) ** 2
    along = _relaxed(own, opacity, ndimage.binary_dilation(empty) & inside, stiffness, start)
    half = np.maximum(ndimage.distance_transform_edt(inside) * per_pixel, 0.75 * grid.spacing.max())
    filled = empty.ravel()[ray] & (np.abs(depth - along.ravel()[ray]) < half.ravel()[ray])
    return np.where(filled.reshape(solid.shape), np.maximum(solid, 0.5 + 0.5 * level), solid)


def _fog(
    values: np.ndarray, depth: np.ndarray, ray: np.ndarray, size: int, reach: int
) -> tuple[Float[np.ndarray, "s s"], Float[np.ndarray, "s s"]]:
    """Depth and opacity of each pixel's most opaque node, 0 where all are below `FOG`. A node counts for the
    pixels around its own, too."""
    some = np.flatnonzero(values > FOG)
    order = some[np.argsort(values[some])]
    along, greatest = np.zeros(size * size), np.zeros(size * size)
    along[ray[order]], greatest[ray[order]] = depth[order], values[order]  # the last one of each pixel is the greatest
    best = greatest.reshape(size, size)
    highest = ndimage.maximum_filter(best, 2 * reach + 1)
    place = ndimage.distance_transform_edt((best < highest) | (best == 0), return_distances=False, return_indices=True)
    return along.reshape(size, size)[tuple(place)], highest


def _relaxed(
    own: Float[np.ndarray, "s s"],
    trust: Float[np.ndarray, "s s"],
    region: Bool[np.ndarray, "s s"],
    stiffness: float,
    start: Float[np.ndarray, "s s"],
) -> Float[np.ndarray, "s s"]:
    """Depths of a region that vary little from pixel to pixel and are `own` as far as that is trusted, weakly `start`;
    `start` outside.

    The same idea as in the bundled model's completion (diffusion/bundled/completing.py): fog lies at other depths from
    ray to ray, and what is filled there would not hang together.
    """
    graph, pixels = pixel_graph(region, connectivity=2)
    trusted, tie = trust.ravel()[pixels], TIE * start.ravel()[pixels]
    system = sparse.diags_array(trusted + TIE) + stiffness * csgraph.laplacian((graph > 0).astype(np.float64))
    result = start.ravel().copy()
    result[pixels] = spsolve(system.tocsc(), trusted * own.ravel()[pixels] + tie)
    return result.reshape(region.shape)


def _nodes(grid: OpacityGrid) -> Float[np.ndarray, "m 3"]:
    axes = [
        np.linspace(low, high, count) for low, high, count in zip(grid.low, grid.high, grid.values.shape, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
