"""Skin that moments draw out to sheets over the film's background, and the matter of the canonical shape it hangs on.

Limbs that touch in the canonical frame are one piece there; where the motion takes them apart, the skin between them
becomes a web. The input camera's silhouettes are the truth in every frame, so where drawn-out skin lies on the
film's background there is nothing, in any frame: what it was cut out of goes, and the mesh is made again. Where that
would take limbs with it, or a web is small, frames do without its faces (`hidden_webs`). Own design, measured in
benchmarks/results/export_cuts.md.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from scipy.spatial import cKDTree

from sv4d_ns.export.colour.baking import Picture
from sv4d_ns.export.surface.extraction import CanonicalMesh, OpacityGrid
from sv4d_ns.export.surface.outlines import RASTER, drawn
from sv4d_ns.export.surface.registration import OFF, FrameSurface
from sv4d_ns.export.surface.silhouettes import Silhouette, silhouettes
from sv4d_ns.utils.split import results_of

DRAWN_OUT = 2.0
"""Edge over its canonical length from which a face may be part of a web."""
LONG = 0.006
"""World units that such an edge has at least: the shortest edges of marching cubes are noise."""
BESIDE = 0.008
"""Shares of the picture's width around the silhouette that are no background yet: a field's outlines fit no better."""
HIDDEN_DRAWN_OUT = 1.5
"""Edge over its canonical length from which a face over the film's background is hidden: 2 shows the rims of webs."""


def webs(
    surface: CanonicalMesh, positions: Float[np.ndarray, "t n 3"], shapes: Sequence[Silhouette]
) -> Bool[np.ndarray, " f"]:
    """Faces that are drawn out in a frame and there lie where the film shows background.

    Args:
        positions: of the surface's vertices, on the field's own surfaces, not yet fitted to the film's outlines.
        shapes: the film's silhouettes, one per frame.
    """
    rest = _edges(surface.vertices[surface.faces])
    found = np.zeros(len(surface.faces), dtype=bool)
    for x, shape in zip(positions, shapes, strict=True):
        corners = x[surface.faces]
        found[_drawn_out(corners, rest, DRAWN_OUT) & (shape.at(corners.mean(axis=1)) > BESIDE)] = True
    return found


def hidden_webs(
    surface: CanonicalMesh,
    positions: Float[np.ndarray, "t n 3"],
    film: Sequence[Picture],
    own: Sequence[FrameSurface],
    diagonal: float,
) -> Bool[np.ndarray, "t f"]:
    """Faces that are drawn out in a frame and there reach over what the film shows as background, or, where the film
    does not show them, to where the field has no surface.

    Args:
        positions: of the surface's vertices, as they will be shown.
        film: one picture per frame, all of one camera.
        own: the field's own surfaces, one per frame; one without vertices says nothing.
        diagonal: of the field's box, world units.
    """
    rest, shapes = _edges(surface.vertices[surface.faces]), silhouettes(film)
    hidden = np.zeros((len(positions), len(surface.faces)), dtype=bool)

    def find(frame: int) -> None:
        shape, matter = shapes[frame], own[frame]
        corners = positions[frame][surface.faces]
        some = np.flatnonzero(_drawn_out(corners, rest, HIDDEN_DRAWN_OUT))
        corners = corners[some]
        middles = [corners.mean(axis=1), *((corners + np.roll(corners, 1, axis=1)) / 2).swapaxes(0, 1)]
        over = np.max([shape.at(points) for points in middles], axis=0) > BESIDE
        if len(matter.vertices):
            seen = np.isin(some, drawn(positions[frame], surface.faces, shape.picture, RASTER).face)
            over |= ~seen & (np.max([matter.distance(points) for points in middles], axis=0) > OFF * diagonal)
        hidden[frame, some] = over

    results_of([partial(find, frame) for frame in range(len(positions))])
    return hidden


def _drawn_out(
    corners: Float[np.ndarray, "f 3 3"], rest: Float[np.ndarray, "f 3"], times: float
) -> Bool[np.ndarray, " f"]:
    """Faces with an edge that many times as long as in the canonical shape."""
    length = _edges(corners)
    return np.asarray(((length > times * rest) & (length > LONG)).any(axis=1))


def _edges(corners: Float[np.ndarray, "f 3 3"]) -> Float[np.ndarray, "f 3"]:
    return np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1)


def without_webs(
    solid: Float[np.ndarray, "r r r"],
    level: float,
    grid: OpacityGrid,
    surface: CanonicalMesh,
    web: Bool[np.ndarray, " f"],
) -> Float[np.ndarray, "r r r"]:
    """`solid` without the nodes inside the surface to which a face of a web is nearest."""
    inside = np.argwhere(solid > level)
    nearest = cKDTree(surface.vertices[surface.faces].mean(axis=1)).query(grid.low + inside * grid.spacing)[1]
    result = solid.copy()
    result[tuple(inside[web[nearest]].T)] = 0.0
    return result


def agreement(
    positions: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    film: Sequence[Picture],
    web: Bool[np.ndarray, " f"] | None = None,
) -> float:
    """Intersection over union of the mesh's silhouettes and the film's, mean over the frames.

    Args:
        web: faces that are as if they were not there where they show over the film's background, which is the most that
            can be won by cutting them.
    """

    def met(picture: Picture) -> float:
        alpha = Image.fromarray(np.ascontiguousarray(picture.rgba[..., 3]))
        inside = np.asarray(alpha.resize((RASTER, RASTER), Image.Resampling.BILINEAR)) >= 128
        shown = drawn(positions[picture.frame], faces, picture, RASTER).face
        covered = shown >= 0
        if web is not None:
            covered &= inside | ~web[shown]
        return float((covered & inside).sum() / max((covered | inside).sum(), 1))

    return float(np.mean(results_of([partial(met, picture) for picture in film])))
