"""The mesh fitted to the field's own surface, where no deformation says how it moves: at frames whose inverse fails,
and in fields that have none.

Non-rigid closest points (as Amberg et al. 2007, with a membrane energy on the increments instead of affine maps).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse.linalg import splu
from scipy.spatial import cKDTree

from sv4d_ns.export.surface.extraction import CanonicalMesh, Tracks, vertex_graph, vertex_normals

UNSOLVED_BOUND = 0.25
"""Share of a frame's vertices without a solution from which none of it is used. Below it their skin carries them: a
surface fitted by closest points alone folds (13 % of the faces of a wolf whose motion left 9 % open, against 1 %)."""
STIFFNESS = (100.0, 30.0, 10.0, 3.0, 1.0)
"""Weights of the membrane energy against one vertex's pull, from stiff to soft."""
ITERATIONS = 4
"""Closest-point searches at each stiffness."""


def refitted(
    tracks: Tracks,
    mesh: CanonicalMesh,
    surface_at: Callable[[int], tuple[Float[np.ndarray, "m 3"], Int[np.ndarray, "g 3"]]],
    diagonal: float,
) -> tuple[Tracks, list[str]]:
    """Tracks whose frames above `UNSOLVED_BOUND` are fitted to their own surface, and a line for each such frame.

    Frames next to solved ones come first and the others start from them.

    Args:
        surface_at: vertices and faces of the field's own surface at a frame.
        diagonal: of the field's box, world units.
    """
    unsolved = tracks.guessed.mean(axis=1)
    failed = set(np.flatnonzero(unsolved > UNSOLVED_BOUND).tolist())
    positions, guessed, lines = tracks.positions.copy(), tracks.guessed.copy(), []
    done = [frame for frame in range(len(unsolved)) if frame not in failed]
    while failed:
        frame = min(failed, key=lambda f: min((abs(f - d) for d in done), default=0))
        start = positions[min(done, key=lambda d: abs(frame - d))] if done else mesh.vertices
        vertices, faces = surface_at(frame)
        positions[frame], distance = fit_to_surface(start, mesh.faces, vertices, faces)
        guessed[frame] = True
        failed.remove(frame)
        done.append(frame)
        lines.append(
            f"frame {frame}: the inverse deformation has no solution for {unsolved[frame]:.0%} of the vertices, "
            f"so the mesh was fitted to the field's own surface there (mean distance "
            f"{distance / diagonal:.2%}); where the shape really comes apart, use --mode sequence"
        )
    return Tracks(positions, tracks.residuals, guessed), lines


def registered(
    mesh: CanonicalMesh,
    first: int,
    num_frames: int,
    surface_at: Callable[[int], tuple[Float[np.ndarray, "m 3"], Int[np.ndarray, "g 3"]]],
    diagonal: float,
    advance: Callable[[], None] | None = None,
) -> Tracks:
    """Tracks for a field without a deformation: from the frame `mesh` was cut at outwards in time, each frame is fitted
    to its own surface from its neighbour.

    `residuals` are then distances to that surface and `guessed` is true but at the first frame: nothing says that a
    vertex stays on the same place of the object. `advance` is called once per frame.
    """
    positions = np.tile(mesh.vertices, (num_frames, 1, 1))
    residuals = np.zeros((num_frames, len(mesh.vertices)), np.float32)
    guessed = np.ones((num_frames, len(mesh.vertices)), dtype=bool)
    guessed[first] = False
    order = [(frame, frame - 1) for frame in range(first + 1, num_frames)]
    order += [(frame, frame + 1) for frame in range(first - 1, -1, -1)]
    for frame, neighbour in order:
        positions[frame], distance = fit_to_surface(positions[neighbour], mesh.faces, *surface_at(frame))
        residuals[frame] = distance / diagonal
        if advance is not None:
            advance()
    return Tracks(positions, residuals, guessed)


def fit_to_surface(
    start: Float[np.ndarray, "n 3"],
    faces: Int[np.ndarray, "f 3"],
    surface: Float[np.ndarray, "m 3"],
    surface_faces: Int[np.ndarray, "g 3"],
) -> tuple[Float[np.ndarray, "n 3"], float]:
    """`start` moved smoothly onto another surface, and its mean distance to that surface's vertices (world units).

    A vertex is pulled by the nearest surface vertex whose normal agrees within 60 degrees of its own.
    """
    tree, targets = cKDTree(surface), vertex_normals(surface, surface_faces)
    graph = vertex_graph(faces, len(start))
    laplacian = sparse.diags(np.asarray(graph.sum(axis=1)).ravel()) - graph
    x = start.astype(np.float64)
    for stiffness in STIFFNESS:
        for _ in range(ITERATIONS):
            distance, nearest = tree.query(x, k=min(8, len(surface)))
            distance, nearest = distance.reshape(len(x), -1), nearest.reshape(len(x), -1)
            agree = np.einsum("nkc,nc->nk", targets[nearest], vertex_normals(x, faces)) > 0.5
            first = np.where(agree, distance, np.inf).argmin(axis=1)
            rows = np.arange(len(x))
            pulled = agree[rows, first].astype(np.float64)
            pull = pulled[:, None] * (surface[nearest[rows, first]] - x)
            x = x + splu((sparse.diags(pulled + 1e-6) + stiffness * laplacian).tocsc()).solve(pull)
    return x.astype(np.float32), float(tree.query(x)[0].mean())
