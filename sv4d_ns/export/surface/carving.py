"""What the input video's silhouettes say about the canonical shape.

The input camera saw the object in every frame, so its silhouettes are the truth there. Canonical matter that a frame
moves out of the silhouette is cut away (webs between legs); rays of the canonical frame
that the video shows full and the density leaves empty are filled (a thin tail whose density is fog). Both are done on
the nodes of the opacity grid, before a surface is cut out of it, so that every cut is closed and smooth by itself.
Own design.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from scipy.sparse import coo_matrix, csgraph
from scipy.spatial import cKDTree

from sv4d_ns.export.colour.baking import Picture
from sv4d_ns.export.surface.extraction import GRID_BLUR, OpacityGrid
from sv4d_ns.geometry.rays import project_array

PICTURE = 128
"""Pixels along the side of the pictures coverage is judged in: about one node of the grid each."""
OUTSIDE = 0.014
"""Shares of a picture's width a node must lie outside a silhouette to speak against it; the outline's own
registration (`outlines`) mends what is nearer."""
LEAST_FRAMES = 2
"""Frames that must speak against a node: one may be a slip of the motion."""
NEIGHBOURS = 4
"""Surface vertices a node's motion is averaged over."""
MENDED = 2
"""Pixels of a coverage picture that the registration of outlines is trusted to close."""
FOG = 0.02
"""Opacity from which a node of an empty ray says where along the ray the object is."""
SLOPE = 1.0
"""Steepest way, depth over width, from the object to what is filled: fog far before or behind it is a stray."""
FLOATER = 0.02
"""Part of all nodes below which a loose piece is a floater, unless the film needs it."""


@dataclass(frozen=True, eq=False)
class Silhouette:
    """One frame's silhouette as signed distances."""

    picture: Picture
    distance: Float[np.ndarray, "s s"]
    """Shares of the picture's width from each pixel to the outline, positive outside."""

    def at(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
        """Signed distance of world points in the picture; beyond its edge as at the edge."""
        size = len(self.distance)
        pixels, _ = project_array(points, self.picture.c2w, self.picture.fov_focal * size, size)
        return ndimage.map_coordinates(self.distance, pixels[:, ::-1].T - 0.5, order=1, mode="nearest")


def silhouettes(film: Sequence[Picture]) -> list[Silhouette]:
    """The silhouettes of one picture per frame, in the order of the frames."""
    result = []
    for picture in sorted(film, key=lambda one: one.frame):
        inside = picture.rgba[..., 3] >= 128
        outward, inward = (ndimage.distance_transform_edt(part) for part in (~inside, inside))
        result.append(Silhouette(picture, (outward - inward) / len(inside)))
    return result


# ----------------------------------------------------------------------------------------------- empty rays filled


def completed(
    grid: OpacityGrid, solid: Float[np.ndarray, "r r r"], level: float, film: Picture
) -> Float[np.ndarray, "r r r"]:
    """`solid` with matter on rays of the canonical frame that the film shows full and that miss its largest piece.

    It is put where along the ray the density is highest, no farther from the depth of the nearest full ray than a way
    of `SLOPE` leads, or at that depth where there is no density; and as thick as the silhouette is wide there.

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
    fog = _depths(values, depth, ray, size, reach)
    along = np.where(np.isfinite(fog), fog, start).clip(
        start - SLOPE * far * per_pixel, start + SLOPE * far * per_pixel
    )
    along = ndimage.uniform_filter(np.where(empty, along, start), 2 * reach + 1)
    half = np.maximum(ndimage.distance_transform_edt(inside) * per_pixel, 0.75 * grid.spacing.max())
    filled = empty.ravel()[ray] & (np.abs(depth - along.ravel()[ray]) < half.ravel()[ray])
    return np.where(filled.reshape(solid.shape), np.maximum(solid, 0.5 + 0.5 * level), solid)


def _depths(values: np.ndarray, depth: np.ndarray, ray: np.ndarray, size: int, reach: int) -> np.ndarray:
    """Depth of each pixel's most opaque node, infinite where all are below `FOG`; nodes count for pixels around."""
    some = np.flatnonzero(values > FOG)
    order = some[np.argsort(values[some])]
    along, greatest = np.full(size * size, np.inf), np.zeros(size * size)
    along[ray[order]], greatest[ray[order]] = depth[order], values[order]  # the last one of each pixel is the greatest
    best = greatest.reshape(size, size)
    highest = ndimage.maximum_filter(best, 2 * reach + 1)
    place = ndimage.distance_transform_edt((best < highest) | (best == 0), return_distances=False, return_indices=True)
    return np.where(highest > 0, along.reshape(size, size)[tuple(place)], np.inf)


# ------------------------------------------------------------------------------------------------- what the film cuts


def carved(
    grid: OpacityGrid,
    solid: Float[np.ndarray, "r r r"],
    level: float,
    vertices: Float[np.ndarray, "n 3"],
    positions: Float[np.ndarray, "t n 3"],
    known: Bool[np.ndarray, " t"],
    film: Sequence[Picture],
) -> tuple[np.ndarray, float]:
    """`solid` without the matter that the film contradicts, and the share of nodes cut.

    A node is doubted where it lies outside the silhouette in `LEAST_FRAMES` frames or more. A connected piece of
    doubted nodes stays all the same when more frames need it than speak against it: without it, pixels of their
    silhouettes would be empty.

    Args:
        vertices: of the surface cut out of `solid`.
        positions: of those vertices at every frame; nodes move like the vertices around them.
        known: whether a frame's positions are the field's motion: guesses speak against nothing.
    """
    present = solid > level
    nodes = _nodes(grid)[present.ravel()]
    if not len(nodes):
        return solid, 0.0
    moved = _carried(nodes, vertices, positions)
    shapes = silhouettes(film)
    outside = np.stack([shape.at(x) > OUTSIDE for shape, x in zip(shapes, moved, strict=True)])
    against = (outside & known[:, None]).sum(axis=0)
    doubted = against >= min(LEAST_FRAMES, len(shapes))
    needed = np.zeros(len(nodes), np.int64)
    for shape, x in zip(shapes, moved, strict=True):
        needed += _needed(shape, x, doubted)
    # whole pieces, or a rest near what stays would be cut between two parts that the film needs
    piece = _pieces(present, doubted)
    cut = doubted & (np.bincount(piece, needed)[piece] <= np.bincount(piece, against)[piece])
    cut |= _loose(present, cut, needed)
    opened = np.zeros(present.shape, dtype=bool)
    opened[present] = cut
    result = np.where(opened, 0.0, solid)
    # the wound is smoothed like the rest of the surface was, and nothing else a second time
    edge = ndimage.binary_dilation(opened, iterations=2)
    return np.where(edge, ndimage.gaussian_filter(result, GRID_BLUR, mode="constant"), result), float(cut.mean())


def _nodes(grid: OpacityGrid) -> Float[np.ndarray, "m 3"]:
    axes = [
        np.linspace(low, high, count) for low, high, count in zip(grid.low, grid.high, grid.values.shape, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def _carried(
    nodes: Float[np.ndarray, "m 3"], vertices: Float[np.ndarray, "n 3"], positions: Float[np.ndarray, "t n 3"]
) -> Float[np.ndarray, "t m 3"]:
    """Nodes moved like the surface around them."""
    distance, nearest = cKDTree(vertices).query(nodes, k=min(NEIGHBOURS, len(vertices)))
    distance, nearest = distance.reshape(len(nodes), -1), nearest.reshape(len(nodes), -1)
    weight = 1 / np.maximum(distance, 1e-6)
    weight /= weight.sum(axis=1, keepdims=True)
    return np.stack([nodes + np.einsum("mk,mkc->mc", weight, (x - vertices)[nearest]) for x in positions])


def _grid_edges(present: Bool[np.ndarray, "r r r"]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of neighbouring present nodes along each axis, as indices among the present ones."""
    number = np.full(present.shape, -1)
    number[present] = np.arange(present.sum())
    pairs = []
    for axis in range(3):
        first, second = np.moveaxis(number, axis, 0)[:-1].ravel(), np.moveaxis(number, axis, 0)[1:].ravel()
        both = (first >= 0) & (second >= 0)
        pairs.append((first[both], second[both]))
    return pairs


def _needed(shape: Silhouette, x: Float[np.ndarray, "m 3"], doubted: Bool[np.ndarray, " m"]) -> Bool[np.ndarray, " m"]:
    """Doubted nodes that stand for pixels of the silhouette which no other node is near."""
    picture = shape.picture
    pixels, _ = project_array(x, picture.c2w, picture.fov_focal * PICTURE, PICTURE)
    place = np.floor(pixels).astype(np.int64)
    seen = ((place >= 0) & (place < PICTURE)).all(axis=1)
    place = place.clip(0, PICTURE - 1)
    kept = np.zeros((PICTURE, PICTURE), dtype=bool)
    kept[place[seen & ~doubted, 1], place[seen & ~doubted, 0]] = True
    bare = ~ndimage.binary_dilation(kept, iterations=MENDED + 1)
    return doubted & seen & bare[place[:, 1], place[:, 0]] & (shape.at(x) < 0)


def _pieces(present: Bool[np.ndarray, "r r r"], chosen: Bool[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """A number for each connected piece of the chosen present nodes; the others are pieces of their own."""
    first, second = (np.concatenate(part) for part in zip(*_grid_edges(present), strict=True))
    both = chosen[first] & chosen[second]
    graph = coo_matrix((np.ones(both.sum()), (first[both], second[both])), (len(chosen),) * 2)
    return csgraph.connected_components(graph, directed=False)[1]


def _loose(
    present: Bool[np.ndarray, "r r r"], cut: Bool[np.ndarray, " m"], needed: Int[np.ndarray, " m"]
) -> Bool[np.ndarray, " m"]:
    """Nodes of small pieces that the cut leaves hanging in the air, unless the film needs them."""
    piece = _pieces(present, ~cut)
    size, wanted = np.bincount(piece), np.bincount(piece, weights=needed)
    return (size[piece] < FLOATER * len(cut)) & (wanted[piece] == 0)
