"""The mesh fitted to the field's own surface, where no deformation says how it moves: at frames whose inverse fails,
and in fields that have none.

Non-rigid closest points (as Amberg et al. 2007, with a membrane energy on the increments instead of affine maps).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu
from scipy.spatial import cKDTree

from sv4d_ns.export.surface.extraction import CanonicalMesh, Tracks, vertex_graph, vertex_normals

RESIDUAL_BOUND = 5e-3
"""Mean residual of a frame, as a share of the box's diagonal, from which its solution is not used."""
STIFFNESS = (100.0, 30.0, 10.0, 3.0, 1.0)
"""Weights of the membrane energy against one vertex's pull, from stiff to soft."""
ITERATIONS = 4
"""Closest-point searches at each stiffness."""
STRAY = 1e-2
"""Distance of a vertex from the field's own surface at its frame, as a share of the box's diagonal, from which it
counts as standing where the field shows nothing."""
INSET = 4e-3
"""Depth below that surface, as a share of the diagonal, at which such vertices are put out of sight."""
MINIATURE = 0.01
"""Scale of their canonical shape there."""


def refitted(
    tracks: Tracks,
    mesh: CanonicalMesh,
    surface_at: Callable[[int], tuple[Float[np.ndarray, "m 3"], Int[np.ndarray, "g 3"]]],
    diagonal: float,
) -> tuple[Tracks, list[str]]:
    """Tracks whose frames above `RESIDUAL_BOUND` are fitted to their own surface, and a line for each such frame.

    Frames next to solved ones come first and the others start from them.

    Args:
        surface_at: vertices and faces of the field's own surface at a frame.
        diagonal: of the field's box, world units.
    """
    mean = tracks.residuals.mean(axis=1)
    failed = set(np.flatnonzero(mean > RESIDUAL_BOUND).tolist())
    positions, guessed, lines = tracks.positions.copy(), tracks.guessed.copy(), []
    done = [frame for frame in range(len(mean)) if frame not in failed]
    while failed:
        frame = min(failed, key=lambda f: min((abs(f - d) for d in done), default=0))
        start = positions[min(done, key=lambda d: abs(frame - d))] if done else mesh.vertices
        vertices, faces = surface_at(frame)
        positions[frame], distance = fit_to_surface(start, mesh.faces, vertices, faces)
        guessed[frame] = True
        failed.remove(frame)
        done.append(frame)
        lines.append(
            f"frame {frame}: the inverse deformation leaves {mean[frame]:.2%} of the box's diagonal, more than "
            f"{RESIDUAL_BOUND:.2%}, so the mesh was fitted to the field's own surface there (mean distance "
            f"{distance / diagonal:.2%}); where the shape really comes apart, use --mode sequence"
        )
    return Tracks(positions, tracks.residuals, guessed), lines


def without_strays(
    tracks: Tracks,
    mesh: CanonicalMesh,
    surface_at: Callable[[int], tuple[Float[np.ndarray, "m 3"], Int[np.ndarray, "g 3"]]],
    diagonal: float,
    advance: Callable[[], None] | None = None,
) -> tuple[Tracks, float]:
    """Tracks that show nothing where the field shows nothing, and the share of positions that were changed.

    The deformation says where canonical matter would be at a time; whether the field has it there is another question:
    the renderer skips what lies outside that moment's silhouettes, and training never corrected it there. Such vertices
    are drawn to the field's surface, a little below it, so that a part that is gone at a frame is out of sight.
    `advance` is called once per frame.
    """
    positions, guessed = tracks.positions.copy(), tracks.guessed.copy()
    graph = vertex_graph(mesh.faces, len(mesh.vertices))
    changed = 0.0
    for frame, x in enumerate(tracks.positions):
        vertices, faces = surface_at(frame)
        tree, normals = cKDTree(vertices), vertex_normals(vertices, faces)
        distance, _ = tree.query(x)
        stray = distance > STRAY * diagonal
        if stray.any():
            hidden = vertices - INSET * diagonal * normals
            places = _gathering_places(x, mesh.vertices, stray, graph)
            # in miniature, not in one point: programs weld vertices that coincide
            shape = MINIATURE * (mesh.vertices[stray] - mesh.vertices[stray].mean(axis=0))
            positions[frame, stray] = hidden[tree.query(places)[1]] + shape
            guessed[frame] |= stray
            changed += stray.mean() / len(positions)
        if advance is not None:
            advance()
    return Tracks(positions, tracks.residuals, guessed), changed


def _gathering_places(
    x: Float[np.ndarray, "n 3"],
    rest: Float[np.ndarray, "n 3"],
    stray: Bool[np.ndarray, " n"],
    graph: sparse.csr_matrix,
) -> Float[np.ndarray, "k 3"]:
    """Where each stray vertex is to disappear: at the nearest vertex its island hangs on, or, where the whole part has
    strayed, at the middle of its island. Each to the surface by itself would draw sheets between limbs."""
    which = np.flatnonzero(stray)
    _, island = csgraph.connected_components(graph[stray][:, stray], directed=False)
    places = np.empty((len(which), 3))
    for number in range(island.max() + 1):
        members = which[island == number]
        around = np.unique(graph[members].indices)
        anchors = around[~stray[around]]
        if len(anchors):
            places[island == number] = x[anchors[cKDTree(rest[anchors]).query(rest[members])[1]]]
        else:
            places[island == number] = x[members].mean(axis=0)
    return places


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
