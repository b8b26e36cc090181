"""The mesh fitted to the field's own surface, where no deformation says how it moves: at frames whose inverse fails.

Non-rigid closest points (as Amberg et al. 2007, with a membrane energy on the increments instead of affine maps).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import SuperLU, splu
from scipy.spatial import cKDTree

from sv4d_ns.export.surface.extraction import CanonicalMesh, Tracks, vertex_graph, vertex_normals
from sv4d_ns.utils.split import results_of

UNSOLVED_BOUND = 0.25
"""Share of a frame's vertices without a solution from which none of it is used. Below it their skin carries them: a
surface fitted by closest points alone folds (13 % of the faces of a wolf whose motion left 9 % open, against 1 %)."""
STIFFNESS = (100.0, 30.0, 10.0, 3.0, 1.0)
"""Weights of the membrane energy against one vertex's pull, from stiff to soft."""
ITERATIONS = 4
"""Closest-point searches at each stiffness."""
ALIKE = 0.5
"""Cosine between the normals of two surfaces, or two outlines, from which their points may be the same place."""
CANDIDATES = 8
"""Nearest points among which one with an agreeing normal is looked for."""
OFF = 0.015
"""Distance from the field's own surface, as a share of the box's diagonal, from which a vertex is wrong there, and from
which a place of that surface lacks skin."""
SETTLED_STIFFNESS = 0.1
"""Weight of the membrane when a followed mesh settles on the field's surface."""
SETTLED_REACH = 0.015
"""How far it settles at most, as a share of the box's diagonal."""


@dataclass(frozen=True, eq=False)
class FrameSurface:
    """The field's own surface at a frame, to be fitted to. One without vertices draws nothing."""

    vertices: Float[np.ndarray, "m 3"]
    normals: Float[np.ndarray, "m 3"]
    tree: cKDTree
    graph: sparse.csr_matrix
    """Which vertices have an edge between them (`vertex_graph`)."""

    @staticmethod
    def of(vertices: Float[np.ndarray, "m 3"], faces: Int[np.ndarray, "g 3"]) -> "FrameSurface":
        """Of a mesh."""
        places = vertices.astype(np.float64)
        graph = vertex_graph(faces, len(places))
        return FrameSurface(places, vertex_normals(places, faces), cKDTree(places), graph)

    def distance(self, x: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
        """Of points to its nearest vertex, world units."""
        return np.asarray(self.tree.query(x)[0])

    def uncovered(self, skin: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " m"]:
        """Of its vertices to the nearest vertex of a skin, world units."""
        return np.asarray(cKDTree(skin).query(self.vertices)[0])

    def apart(self, skin: Float[np.ndarray, "n 3"], moved: Bool[np.ndarray, " n"]) -> float:
        """Mean distance of its vertices from the nearest skin and of the moved skin from it, world units."""
        return float(np.concatenate([self.distance(skin[moved]), self.uncovered(skin)]).mean())

    def alike(
        self, x: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"], reach: float = np.inf
    ) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Of each point the nearest vertex that faces the same way, and whether there is one within reach."""
        return nearest_alike(self.tree, self.normals, x, normals, reach)

    def along_normals(
        self, x: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"], reach: float
    ) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, "n 3"]]:
        """Of each point whether a vertex that faces the same way is within reach, and the way along the nearest one's
        normal to the plane it lies in."""
        found, nearest = self.alike(x, normals, reach)
        normal = self.normals[nearest]
        return found, ((self.vertices[nearest] - x) * normal).sum(axis=-1, keepdims=True) * normal


def nearest_alike(
    tree: cKDTree, tree_normals: np.ndarray, x: np.ndarray, normals: np.ndarray, reach: float
) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The nearest of a tree's points whose normal agrees, and whether one of `CANDIDATES` does within reach."""
    count = min(CANDIDATES, tree.n)
    distance, nearest = tree.query(x, k=count, distance_upper_bound=reach)
    distance, nearest = distance.reshape(len(x), count), nearest.reshape(len(x), count)
    found = np.isfinite(distance)
    nearest = np.where(found, nearest, 0)
    found &= np.einsum("nkc,nc->nk", tree_normals[nearest], normals) > ALIKE
    first = np.where(found, distance, np.inf).argmin(axis=1)
    return found.any(axis=1), nearest[np.arange(len(x)), first]


def mean_places(
    which: Int[np.ndarray, " k"], places: Float[np.ndarray, "k 3"], otherwise: Float[np.ndarray, "n 3"]
) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, "n 3"]]:
    """For each vertex whether any places draw it, and their mean, or where it goes otherwise.

    Args:
        which: the vertex that each place draws.
    """
    count = np.bincount(which, minlength=len(otherwise))
    total = np.stack([np.bincount(which, places[:, i], minlength=len(otherwise)) for i in range(3)], axis=-1)
    drawn = count > 0
    return drawn, np.where(drawn[:, None], total / np.maximum(count, 1)[:, None], otherwise)


def refitted(
    tracks: Tracks, mesh: CanonicalMesh, surfaces: Sequence[FrameSurface], diagonal: float
) -> tuple[Tracks, list[str]]:
    """Tracks whose frames above `UNSOLVED_BOUND` are fitted to their own surface, and a line for each such frame.

    Frames next to solved ones come first and the others start from them.

    Args:
        surfaces: the field's own, of every frame.
        diagonal: of the field's box, world units.
    """
    unsolved = tracks.guessed.mean(axis=1)
    failed = {f for f in np.flatnonzero(unsolved > UNSOLVED_BOUND).tolist() if len(surfaces[f].vertices)}
    positions, guessed, lines = tracks.positions.copy(), tracks.guessed.copy(), []
    done = [frame for frame in range(len(unsolved)) if frame not in failed]
    while failed:
        frame = min(failed, key=lambda f: min((abs(f - d) for d in done), default=0))
        start = positions[min(done, key=lambda d: abs(frame - d))] if done else mesh.vertices
        positions[frame], distance = fit_to_surface(start, mesh.faces, surfaces[frame])
        guessed[frame] = True
        failed.remove(frame)
        done.append(frame)
        lines.append(
            f"frame {frame}: the inverse deformation has no solution for {unsolved[frame]:.0%} of the vertices, "
            f"so the mesh was fitted to the field's own surface there (mean distance "
            f"{distance / diagonal:.2%}); where the shape really comes apart, use --mode sequence"
        )
    return Tracks(positions, tracks.residuals, guessed), lines


def fit_to_surface(
    start: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"], surface: FrameSurface
) -> tuple[Float[np.ndarray, "n 3"], float]:
    """`start` moved smoothly onto another surface, and its mean distance to that surface's vertices (world units).

    A vertex is pulled by the nearest surface vertex whose normal agrees within 60 degrees of its own.
    """
    laplacian = skin_laplacian(faces, len(start))
    x = start.astype(np.float64)
    for stiffness in STIFFNESS:
        for _ in range(ITERATIONS):
            found, nearest = surface.alike(x, vertex_normals(x, faces))
            x = _pulled(x, found, surface.vertices[nearest] - x, stiffness * laplacian)
    return x.astype(np.float32), float(surface.distance(x).mean())


def settled(
    positions: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    surfaces: Sequence[FrameSurface],
    diagonal: float,
) -> Float[np.ndarray, "t n 3"]:
    """Positions drawn a little way, along the normals, onto the field's own surface of each frame: where a followed
    vertex stands, what the field adds to its canonical shape is not known."""
    laplacian = SETTLED_STIFFNESS * skin_laplacian(faces, positions.shape[1])
    result = positions.astype(np.float64)

    def settle(frame: int) -> None:
        x, surface = result[frame], surfaces[frame]
        if not len(surface.vertices):
            return
        found, pull = surface.along_normals(x, vertex_normals(x, faces), SETTLED_REACH * diagonal)
        result[frame] = _pulled(x, found, pull, laplacian)

    results_of([partial(settle, frame) for frame in range(len(result))])
    return result


def skin_laplacian(faces: Int[np.ndarray, "f 3"], count: int) -> sparse.csr_matrix:
    """Of the graph of a mesh's edges."""
    return csgraph.laplacian(vertex_graph(faces, count)).tocsr()


def _pulled(
    x: Float[np.ndarray, "n 3"],
    pulled: Bool[np.ndarray, " n"],
    pull: Float[np.ndarray, "n 3"],
    membrane: sparse.csr_matrix,
) -> Float[np.ndarray, "n 3"]:
    """`x` after some vertices were pulled and the others came along as a membrane."""
    system = sparse.diags(pulled + 1e-6) + membrane
    step: np.ndarray = factorised(system).solve(np.where(pulled[:, None], pull, 0.0))
    return x + step


def factorised(system: sparse.spmatrix) -> SuperLU:
    """The factors of a symmetric system, in an order that keeps those of a mesh's Laplacian sparse."""
    return splu(system.tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
