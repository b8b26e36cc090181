"""Skin mended where motion throws it out of the film's silhouettes, or where nothing is known of its place.

A fitted deformation may send matter to where the object is not. Such vertices are taken back frame by frame: the skin
around them carries them along as rigidly as it can (Sorkine & Alexa 2007, as-rigid-as-possible surface modelling),
starting from the neighbouring frame. Triangles that are drawn out stay: a motion found on a grid stretches what it
moves, and holding them together holds limbs back (benchmarks/results/export_cuts.md).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu

from sv4d_ns.export.surface.extraction import vertex_graph
from sv4d_ns.export.surface.silhouettes import Silhouette
from sv4d_ns.geometry.rotations import nearest_rotation

OUTSIDE = 0.03
"""Shares of the picture's width outside the film's silhouette from which a vertex is where the object is not."""
RINGS = 2
"""Rings of neighbours of a bad vertex that are solved again with it."""
ROUNDS = 3
"""Alternations of rotations and positions."""
TIE = 1e-6
"""Pull to the start, for parts of which nothing is known."""


def strays(
    positions: Float[np.ndarray, "t n 3"], faces: Int[np.ndarray, "f 3"], shapes: Sequence[Silhouette]
) -> Bool[np.ndarray, " n"]:
    """Vertices of pieces, the largest aside, most of which stand where the object is not in some frame: nothing that
    hangs on them could take them back."""
    count = positions.shape[1]
    pieces, piece = csgraph.connected_components(vertex_graph(faces, count), directed=False)
    size = np.bincount(piece, minlength=pieces)
    astray = np.zeros(pieces, dtype=bool)
    if pieces > 1:
        for x, silhouette in zip(positions, shapes, strict=True):
            outside = np.bincount(piece, silhouette.at(x) > OUTSIDE, minlength=pieces)
            astray |= outside > size / 2
        astray[size.argmax()] = False
    return astray[piece]


class RigidSkin:
    """The as-rigid-as-possible energy of one mesh, uniform weights."""

    def __init__(self, faces: Int[np.ndarray, "f 3"], count: int):
        self.graph = vertex_graph(faces, count)
        edges = self.graph.tocoo()
        self.first, self.second, self.count = edges.row, edges.col, count
        self.laplacian = (sparse.diags(np.asarray(self.graph.sum(axis=1)).ravel()) - self.graph).tocsr()

    def grown(self, chosen: Bool[np.ndarray, " n"], rings: int) -> Bool[np.ndarray, " n"]:
        """The vertices and so many rings around them."""
        for _ in range(rings):
            chosen = chosen | (self.graph @ chosen.astype(np.float64) > 0)
        return chosen

    def rotations(
        self, rest: Float[np.ndarray, "n 3"], x: Float[np.ndarray, "n 3"], which: Int[np.ndarray, " k"]
    ) -> Float[np.ndarray, "k 3 3"]:
        """The turn of some vertices' surroundings from `rest` to `x` (Kabsch)."""
        rows = self.graph[which]
        one, own = np.repeat(np.arange(len(which)), np.diff(rows.indptr)), np.repeat(which, np.diff(rows.indptr))
        before, after = rest[own] - rest[rows.indices], x[own] - x[rows.indices]
        products = np.einsum("ei,ej->eij", after, before).reshape(-1, 9)
        gather = sparse.csr_matrix((np.ones(len(one)), (one, np.arange(len(one)))), (len(which), len(one)))
        return nearest_rotation((gather @ products).reshape(-1, 3, 3))

    def filled(
        self, rest: Float[np.ndarray, "n 3"], x: Float[np.ndarray, "n 3"], known: Bool[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n 3"]:
        """`x` with the vertices that are not known carried by the known ones; `rest` is the shape they keep."""
        free = np.flatnonzero(~known)
        if not len(free):
            return x
        result = x.astype(np.float64)
        rows = self.laplacian[free]
        system = rows[:, free] + TIE * sparse.identity(len(free))
        solver = splu(system.tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
        fixed = rows[:, known] @ result[known]
        turns = self._nearest_known(rest, result, known)
        of_free = ~known[self.first]
        first, second = self.first[of_free], self.second[of_free]
        apart = rest[first] - rest[second]
        for round_ in range(ROUNDS):
            if round_:
                turns[free] = self.rotations(rest, result, free)
            mean = 0.5 * (turns[first] + turns[second])
            pull = np.einsum("eij,ej->ei", mean, apart)
            right = np.stack([np.bincount(first, pull[:, i], minlength=self.count)[free] for i in range(3)], axis=-1)
            result[free] = solver.solve(right - fixed + TIE * x[free])
        return result

    def _nearest_known(
        self, rest: Float[np.ndarray, "n 3"], x: Float[np.ndarray, "n 3"], known: Bool[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n 3 3"]:
        """At the vertices that are not known and those beside them, the turn of the known vertex fewest edges away
        that has known ones only around it; no turn elsewhere."""
        result = np.broadcast_to(np.eye(3), (self.count, 3, 3)).copy()
        beside = self.grown(~known, 1)
        near = np.flatnonzero(self.grown(beside, 1))  # the first ring of such vertices is all that can be nearest
        inner = np.flatnonzero(~beside[near])
        if not len(inner):
            return result
        _, _, source = csgraph.dijkstra(
            self.graph[near][:, near], directed=False, indices=inner, unweighted=True, min_only=True,
            return_predecessors=True,
        )  # fmt: skip
        reached = source >= 0
        used, which = np.unique(source[reached], return_inverse=True)
        result[near[reached]] = self.rotations(rest, x, near[used])[which]
        return result


def mended(
    positions: Float[np.ndarray, "t n 3"],
    guessed: Bool[np.ndarray, "t n"],
    rest: Float[np.ndarray, "n 3"],
    faces: Int[np.ndarray, "f 3"],
    silhouettes: Sequence[Silhouette],
    first: int,
) -> tuple[Float[np.ndarray, "t n 3"], Bool[np.ndarray, "t n"]]:
    """Positions within the silhouettes, and which vertices were solved again at each frame.

    Args:
        guessed: vertices of whose place nothing is known (a frame of nothing else is taken as it is).
        rest: the canonical shape.
        first: the canonical frame; the others follow outwards in time, each keeping its mended neighbour's shape.
    """
    skin = RigidSkin(faces, len(rest))
    result = positions.astype(np.float64)
    changed = np.zeros(positions.shape[:2], dtype=bool)
    frames, piece = len(positions), csgraph.connected_components(skin.graph, directed=False)[1]
    sizes = np.bincount(piece)
    order = [
        (first, None),
        *((i, i - 1) for i in range(first + 1, frames)),
        *((i, i + 1) for i in range(first - 1, -1, -1)),
    ]
    for frame, neighbour in order:
        bad = silhouettes[frame].at(positions[frame]) > OUTSIDE
        if not guessed[frame].all():
            bad |= guessed[frame]
        if not bad.any() or bad.all():
            continue
        # a small piece that is mostly bad has nothing to hold it: it stays where it was in the neighbouring frame
        lost = ((np.bincount(piece, bad) > sizes / 2) & (sizes < sizes.max()))[piece]
        changed[frame] = skin.grown(bad, RINGS) | lost
        shape = rest if frame == first else result[neighbour]
        start = np.where(lost[:, None], shape, positions[frame])
        result[frame] = skin.filled(shape, start, ~changed[frame])
    return result, changed
