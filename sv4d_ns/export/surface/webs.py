"""Skin that moments draw out to sheets where there is nothing.

Limbs that touch in the canonical frame are one piece there; where the motion takes them apart, the skin between them
becomes a web. The input camera's silhouettes are the truth in every frame, and the field's own surface says what is
where that camera does not look: a frame does without the faces of its webs. Own design, measured in
benchmarks/results/export_cuts.md.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool, Float

from sv4d_ns.export.surface.extraction import CanonicalMesh
from sv4d_ns.export.surface.outlines import RASTER, drawn
from sv4d_ns.export.surface.registration import OFF, FrameSurface
from sv4d_ns.export.surface.silhouettes import Silhouette
from sv4d_ns.utils.split import results_of

DRAWN_OUT = 1.5
"""Edge over its canonical length from which a face may be part of a web; 2 shows the rims of webs."""
LONG = 0.006
"""World units that such an edge has at least: the shortest edges of marching cubes are noise."""
BESIDE = 0.008
"""Shares of the picture's width around the silhouette that are no background yet: a field's outlines fit no better."""


def hidden_webs(
    surface: CanonicalMesh,
    positions: Float[np.ndarray, "t n 3"],
    shapes: Sequence[Silhouette],
    own: Sequence[FrameSurface],
    diagonal: float,
) -> Bool[np.ndarray, "t f"]:
    """Faces that are drawn out in a frame and there reach over what the film shows as background, or, where the film
    does not show them, to where the field has no surface.

    Args:
        positions: of the surface's vertices, as they will be shown.
        shapes: the film's silhouettes, one per frame.
        own: the field's own surfaces, one per frame; one without vertices says nothing.
        diagonal: of the field's box, world units.
    """
    rest = _edges(surface.vertices[surface.faces])
    hidden = np.zeros((len(positions), len(surface.faces)), dtype=bool)

    def find(frame: int) -> None:
        shape, matter = shapes[frame], own[frame]
        corners = positions[frame][surface.faces]
        some = np.flatnonzero(_drawn_out(corners, rest))
        corners = corners[some]
        middles = [corners.mean(axis=1), *((corners + np.roll(corners, 1, axis=1)) / 2).swapaxes(0, 1)]
        over = np.max([shape.at(points) for points in middles], axis=0) > BESIDE
        if len(matter.vertices):
            seen = np.isin(some, drawn(positions[frame], surface.faces, shape.picture, RASTER).face)
            over |= ~seen & (np.max([matter.distance(points) for points in middles], axis=0) > OFF * diagonal)
        hidden[frame, some] = over

    results_of([partial(find, frame) for frame in range(len(positions))])
    return hidden


def drawn_in(
    surface: CanonicalMesh,
    positions: Float[np.ndarray, "t n 3"],
    shapes: Sequence[Silhouette],
    hidden: Bool[np.ndarray, "t f"],
) -> Float[np.ndarray, "t n 3"]:
    """Positions with the rims of hidden faces drawn in to the film's outline where they are outside, which shows as
    fringes otherwise."""
    result = positions.copy()
    for x, shape, gone in zip(result, shapes, hidden, strict=True):
        rim = np.intersect1d(surface.faces[gone], surface.faces[~gone])
        distance = shape.at(x[rim])
        rim, distance = rim[distance > 0], distance[distance > 0]
        x[rim] -= (distance * shape.width_at(x[rim]))[:, None] * shape.outward(x[rim])
    return result


def _drawn_out(corners: Float[np.ndarray, "f 3 3"], rest: Float[np.ndarray, "f 3"]) -> Bool[np.ndarray, " f"]:
    """Faces with an edge much longer than in the canonical shape."""
    length = _edges(corners)
    return np.asarray(((length > DRAWN_OUT * rest) & (length > LONG)).any(axis=1))


def _edges(corners: Float[np.ndarray, "f 3 3"]) -> Float[np.ndarray, "f 3"]:
    return np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1)
