"""Where a moving surface lies folded on itself, and the same surface smoothed there.

Closest points crumple skin on its way to its place: faces lie on their neighbours there, and draw as dark patches,
however near the surface they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int

from sv4d_ns.export.surface.extraction import neighbour_mean, vertex_graph, vertex_normals
from sv4d_ns.utils.split import results_of

FOLDED = -0.2
"""Cosine between the normals of two neighbouring faces below which one lies on the other."""
FLAT = 0.2
"""The same in the canonical shape from which that is a fold, and not the object's own edge."""
ROUNDS = 4
"""Of smoothing. Twice as many leave 0.8 to 0.95 of the folds that these do, and cost limbs that are torn 0.2 dB."""

SLIVER = 0.003
"""How far a vertex of a face that is turned over is moved at most, world units (half a pixel of a film of 256)."""


@dataclass(frozen=True, eq=False)
class Folds:
    """The pairs of neighbouring faces of a mesh that can be folded."""

    faces: Int[np.ndarray, "f 3"]
    pairs: Int[np.ndarray, "p 2"]

    @staticmethod
    def of(rest: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"]) -> "Folds":
        """Of a canonical shape: its own edges are none."""
        edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
        order = np.lexsort(edges.T)
        same = (edges[order[1:]] == edges[order[:-1]]).all(axis=1)
        pairs = np.stack([order[:-1][same] // 3, order[1:][same] // 3], axis=1)
        return Folds(faces, pairs[Folds(faces, pairs).facing(rest) > FLAT])

    def facing(self, x: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " p"]:
        """Cosines between the normals of the pairs; 0 where a face has no area."""
        corner = x[self.faces].astype(np.float64)
        normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
        normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-20)
        return np.einsum("pi,pi->p", normal[self.pairs[:, 0]], normal[self.pairs[:, 1]])

    def at(self, x: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
        """The vertices of faces that are folded."""
        result = np.zeros(len(x), dtype=bool)
        result[self.faces[self.pairs[self.facing(x) < FOLDED]]] = True
        return result


def unfolded(
    positions: Float[np.ndarray, "t n 3"], rest: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"]
) -> Float[np.ndarray, "t n 3"]:
    """Positions in which vertices at folds have gone half-way to the mean of their neighbours, as long as they are at
    one and `ROUNDS` times at most."""
    return _smoothed_at(Folds.of(rest, faces).at, positions, faces)


def unturned(positions: Float[np.ndarray, "t n 3"], faces: Int[np.ndarray, "f 3"]) -> Float[np.ndarray, "t n 3"]:
    """Positions smoothed in the same way, along the surface only, where a face looks away from the surface around it.

    Fitting to outlines and pictures turns slivers over. Blender takes a vertex's normal relative to its faces' own and
    draws them as black specks, in every frame but the first. Going further turns few more back, and takes limbs that
    are torn out of the film's outlines (a demon: 1 dB and 0.009 of IoU without a limit).
    """
    smooth = _smoothed_at(partial(_turned_over, faces=faces), positions, faces, along=True)
    way = smooth - positions
    return positions + way * np.minimum(1.0, SLIVER / np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-12))


def _turned_over(x: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"]) -> Bool[np.ndarray, " n"]:
    """The vertices of faces whose normal is more than 90 degrees from one of their vertices'."""
    corner = x[faces]
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    away = (np.einsum("fi,fki->fk", normal, vertex_normals(x, faces)[faces]) < 0).any(axis=1)
    result = np.zeros(len(x), dtype=bool)
    result[faces[away]] = True
    return result


def _smoothed_at(
    bad: Callable[[Float[np.ndarray, "n 3"]], Bool[np.ndarray, " n"]],
    positions: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    along: bool = False,
) -> Float[np.ndarray, "t n 3"]:
    """Positions whose bad vertices have gone half-way to the mean of their neighbours as long as they were bad and
    `ROUNDS` times at most; along the surface only, if that is asked for."""
    mean = neighbour_mean(vertex_graph(faces, positions.shape[1]))
    result = positions.astype(np.float64)

    def smooth(frame: int) -> None:
        x = result[frame]
        for _ in range(ROUNDS):
            chosen = bad(x)
            if not chosen.any():
                return
            way = 0.5 * (mean[chosen] @ x - x[chosen])
            if along:
                normal = vertex_normals(x, faces)[chosen]
                way -= (way * normal).sum(axis=-1, keepdims=True) * normal
            x[chosen] += way

    results_of([partial(smooth, frame) for frame in range(len(result))])
    return result
