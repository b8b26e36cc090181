"""Skin drawn out over parts of the field's own surface that it leaves bare.

Where a motion slips far, a frame's surface may have a hand that no skin was led to: it lies folded elsewhere, or two
hands share one. The skin around such a part is drawn over it from its border on, as far in each round as places of the
part are near enough to tell where to, and stretches on the way: the shape is right then, and the film's picture of that
moment is on it. Closest points as in registration.py, with a membrane on the increments.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.spatial import cKDTree

from sv4d_ns.export.surface.extraction import vertex_normals
from sv4d_ns.export.surface.limbs import connected_parts
from sv4d_ns.export.surface.registration import (
    OFF,
    SETTLED_REACH,
    FrameSurface,
    factorised,
    mean_places,
    nearest_alike,
    skin_laplacian,
)
from sv4d_ns.utils.split import results_of

ROUNDS = 10
"""Steps over a bare part. Half as many leave a hand of a somersault half bare, twice as many change little."""
REACH = 0.06
"""How far a bare place draws skin in one of them, as a share of the box's diagonal."""
AROUND = 0.12
"""Distance from a bare part up to which skin comes along, as a share of the box's diagonal."""
OWN = 0.3
"""What the places that skin lies on already count against those that draw it."""
STIFFNESS = 1.0
"""Weight of the membrane against one vertex's pull."""
TIE = 1e-6
"""Pull of every vertex to where it is, for pieces that nothing draws."""


def covered(
    positions: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    surfaces: Sequence[FrameSurface],
    diagonal: float,
) -> Float[np.ndarray, "t n 3"]:
    """Positions whose skin reaches over parts of the field's own surfaces that were bare.

    Args:
        surfaces: the field's own, of every frame.
        diagonal: of the field's box, world units.
    """
    membrane = STIFFNESS * skin_laplacian(faces, positions.shape[1])
    result = positions.astype(np.float64)

    def cover(frame: int) -> None:
        for _ in range(ROUNDS):
            bare = _bare_parts(result[frame], surfaces[frame], diagonal)
            if not len(bare):
                return
            result[frame] = _drawn_over(result[frame], faces, membrane, surfaces[frame], bare, diagonal)

    results_of([partial(cover, frame) for frame in range(len(result))])
    return result


def _bare_parts(x: Float[np.ndarray, "n 3"], surface: FrameSurface, diagonal: float) -> Int[np.ndarray, " b"]:
    """The places of a surface that have no skin near them and hang together in parts of some size."""
    if not len(surface.vertices):
        return np.zeros(0, np.int64)
    bare = np.flatnonzero(surface.uncovered(x) > OFF * diagonal)
    parts = connected_parts(surface.graph, bare)
    return bare[np.concatenate(parts)] if parts else bare[:0]


def _drawn_over(
    x: Float[np.ndarray, "n 3"],
    faces: Int[np.ndarray, "f 3"],
    membrane: sparse.csr_matrix,
    surface: FrameSurface,
    bare: Int[np.ndarray, " b"],
    diagonal: float,
) -> Float[np.ndarray, "n 3"]:
    """`x` one step farther over bare places: each draws the nearest vertex that faces the same way, the skin around
    comes along and stays on the surface."""
    near, _ = cKDTree(surface.vertices[bare]).query(x, distance_upper_bound=AROUND * diagonal)
    free = np.flatnonzero(np.isfinite(near))
    if not len(free):
        return x
    own, normals = x[free], vertex_normals(x, faces)[free]
    found, skin = nearest_alike(cKDTree(own), normals, surface.vertices[bare], surface.normals[bare], REACH * diagonal)
    pulled, way = surface.along_normals(own, normals, SETTLED_REACH * diagonal)
    drawn, goal = mean_places(skin[found], surface.vertices[bare[found]], own + way)
    weight = np.where(drawn, 1.0, OWN * pulled)
    result = x.copy()
    # the skin around what is free stays
    result[free] += factorised(sparse.diags(weight + TIE) + membrane[free][:, free]).solve(
        weight[:, None] * (goal - own)
    )
    return result
