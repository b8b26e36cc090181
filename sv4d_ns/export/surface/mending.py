"""Skin mended where the field's motion does not say where it is, or says it wrong.

A fitted deformation leads from what is seen to the canonical shape, and nothing makes it one to one: two arms may come
from one, and the other one's matter has no place then. But the field's own surface at that moment has both. Vertices
off that surface and those without a solution are carried by the skin around them as rigidly as it can (Sorkine & Alexa
2007, as-rigid-as-possible surface modelling), starting from the neighbouring frame, their limbs turned to bare parts of
the surface (limbs.py), and drawn to it by closest points (Amberg et al. 2007); where they crumple on that way, once
more from the form of the canonical shape (folds.py). Triangles that are drawn out stay: a motion found on a grid
stretches what it moves, and holding them together holds limbs back
(benchmarks/results/export_cuts.md).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

from sv4d_ns.export.surface.extraction import grown, outwards, vertex_graph, vertex_normals
from sv4d_ns.export.surface.folds import Folds
from sv4d_ns.export.surface.limbs import turned
from sv4d_ns.export.surface.registration import OFF, FrameSurface, factorised, mean_places, nearest_alike
from sv4d_ns.export.surface.silhouettes import Silhouette
from sv4d_ns.geometry.rotations import nearest_rotation

OUTSIDE = 0.03
"""Shares of the picture's width outside the film's silhouette from which a piece is where the object is not."""
REACH = 0.1
"""How far such skin is drawn, as a share of the box's diagonal."""
STIFFNESS = (10.0, 10.0, 3.0, 3.0, 1.0, 1.0, 1.0)
"""Weights of the skin's shape against one vertex's pull, from stiff to soft. With 0.3 in the end, or fewer stiff ones
before, the legs of a wolf (true views, galloping) merge: 0.84 to 0.86 of its elevated silhouettes instead of 0.87."""
TURNED_STIFFNESS = (10.0, 3.0, 1.0, 1.0)
"""The same for skin whose limbs were turned, which are nearer; more stages change less than chance does."""
UNFOLDED_STIFFNESS = (10.0, 3.0, 3.0)
"""The same for skin that was folded: never so soft that it crumples again."""
FARTHER = 1.02
"""Times the distance between skin and surface that unfolding may leave."""
RINGS = 2
"""Rings of neighbours of a bad vertex that are solved again with it."""
ROUNDS = 3
"""Alternations of rotations and positions."""
TURNS = 3
"""Times that lost limbs are turned."""
NEARER = 0.99
"""Share of the distance between skin and surface that turning leaves at most. At 1.0 the same limbs gain, but a wolf's
legs, which the field does not tell apart, lose 0.004 of IoU."""
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
        self.faces = faces
        edges = self.graph.tocoo()
        self.first, self.second, self.count = edges.row, edges.col, count
        self.laplacian = csgraph.laplacian(self.graph).tocsr()

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
        solver = factorised(rows[:, free] + TIE * sparse.identity(len(free)))
        fixed = rows[:, known] @ result[known]
        turns = self._nearest_known(rest, result, known)
        for round_ in range(ROUNDS):
            if round_:
                turns[free] = self.rotations(rest, result, free)
            result[free] = solver.solve(self._shape(rest, turns, ~known) - fixed + TIE * x[free])
        return result

    def _shape(
        self, rest: Float[np.ndarray, "n 3"], turns: Float[np.ndarray, "n 3 3"], free: Bool[np.ndarray, " n"]
    ) -> Float[np.ndarray, "k 3"]:
        """What the Laplacian of the free vertices' positions is to be for them to keep the shape `rest`, turned."""
        of_free = free[self.first]
        first, second = self.first[of_free], self.second[of_free]
        apart = np.einsum("eij,ej->ei", 0.5 * (turns[first] + turns[second]), rest[first] - rest[second])
        return np.stack([np.bincount(first, apart[:, i], minlength=self.count)[free] for i in range(3)], axis=-1)

    def drawn(
        self,
        rest: Float[np.ndarray, "n 3"],
        x: Float[np.ndarray, "n 3"],
        free: Bool[np.ndarray, " n"],
        surface: FrameSurface,
        bare: Int[np.ndarray, " b"],
        diagonal: float,
        stages: Sequence[float],
    ) -> Float[np.ndarray, "n 3"]:
        """`x` with the free vertices drawn to a surface, keeping the shape `rest` as well as they can.

        A vertex is drawn along the normal of the nearest place that faces the same way; a place without any skin near
        it draws the nearest free vertex that does.
        """
        which, near = np.flatnonzero(free), np.flatnonzero(grown(self.graph, free, 1))
        rows = self.laplacian[which]
        turns = np.broadcast_to(np.eye(3), (self.count, 3, 3)).copy()
        for stiffness in stages:
            pulled, goal = self._pulls(x, free, surface, bare, diagonal)
            turns[near] = self.rotations(rest, x, near)
            solver = factorised(stiffness * rows[:, which] + sparse.diags(pulled + TIE))
            keep = self._shape(rest, turns, free) - rows[:, ~free] @ x[~free]
            moved = solver.solve(stiffness * keep + pulled[:, None] * goal + TIE * x[which])
            x = x.copy()
            x[which] = moved
        return x

    def _pulls(
        self,
        x: Float[np.ndarray, "n 3"],
        free: Bool[np.ndarray, " n"],
        surface: FrameSurface,
        bare: Int[np.ndarray, " b"],
        diagonal: float,
    ) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "k 3"]]:
        """Of the free vertices: whether the surface draws them, 1 or 0, and where to. `bare` are the places of the
        surface that no other vertices are near."""
        own, normals = x[free], vertex_normals(x, self.faces[free[self.faces].any(axis=1)])[free]
        pulled, way = surface.along_normals(own, normals, REACH * diagonal)
        goal = own + way
        tree = cKDTree(own)
        bare = bare[tree.query(surface.vertices[bare])[0] > OFF * diagonal]
        found, skin = nearest_alike(tree, normals, surface.vertices[bare], surface.normals[bare], REACH * diagonal)
        drawn, goal = mean_places(skin[found], surface.vertices[bare[found]], goal)
        return (pulled | drawn).astype(np.float64), goal

    def _nearest_known(
        self, rest: Float[np.ndarray, "n 3"], x: Float[np.ndarray, "n 3"], known: Bool[np.ndarray, " n"]
    ) -> Float[np.ndarray, "n 3 3"]:
        """At the vertices that are not known and those beside them, the turn of the known vertex fewest edges away
        that has known ones only around it; no turn elsewhere."""
        result = np.broadcast_to(np.eye(3), (self.count, 3, 3)).copy()
        beside = grown(self.graph, ~known, 1)
        # the first ring of such vertices is all that can be nearest
        near = np.flatnonzero(grown(self.graph, beside, 1))
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
    surfaces: Sequence[FrameSurface],
    first: int,
    diagonal: float,
) -> tuple[Float[np.ndarray, "t n 3"], Bool[np.ndarray, "t n"]]:
    """Positions on the field's own surfaces, and which vertices were solved again at each frame.

    Args:
        guessed: vertices of whose place nothing is known (a frame of nothing else is taken as it is).
        rest: the canonical shape.
        surfaces: of every frame.
        first: the canonical frame; the others follow outwards in time, each keeping its mended neighbour's shape.
        diagonal: of the field's box, world units.
    """
    skin, folds = RigidSkin(faces, len(rest)), Folds.of(rest, faces)
    result = positions.astype(np.float64)
    changed = np.zeros(positions.shape[:2], dtype=bool)
    _, piece = csgraph.connected_components(skin.graph, directed=False)
    sizes = np.bincount(piece)
    for frame, neighbour in [(first, None), *outwards(first, len(positions))]:
        surface = surfaces[frame]
        bad = surface.distance(positions[frame]) > OFF * diagonal
        if not guessed[frame].all():
            bad |= guessed[frame]
        if not bad.any() or bad.all():
            continue
        # a small piece that is mostly bad has nothing to hold it: it starts from where the neighbouring frame has it
        lost = ((np.bincount(piece, bad) > sizes / 2) & (sizes < sizes.max()))[piece]
        changed[frame] = grown(skin.graph, bad, RINGS) | lost
        shape = rest.astype(np.float64) if neighbour is None else result[neighbour]
        start = np.where(lost[:, None], shape, positions[frame])
        carried = skin.filled(shape, start, ~changed[frame])
        result[frame] = _onto(surface, skin, shape, carried, changed[frame], diagonal)
        result[frame] = _unfolded(surface, skin, folds, rest, result[frame], diagonal)
    return result, changed


def _unfolded(
    surface: FrameSurface,
    skin: RigidSkin,
    folds: Folds,
    rest: Float[np.ndarray, "n 3"],
    x: Float[np.ndarray, "n 3"],
    diagonal: float,
) -> Float[np.ndarray, "n 3"]:
    """`x` with crumpled skin as the skin around it carries the canonical shape, drawn to the surface again; as it is
    where that would take it away from there."""
    bad = folds.at(x)
    if not bad.any():
        return x
    bad = grown(skin.graph, bad, RINGS)
    carried = skin.filled(rest.astype(np.float64), x, ~bad)
    bare = np.flatnonzero(surface.uncovered(x[~bad]) > OFF * diagonal)
    smooth = skin.drawn(carried, carried, bad, surface, bare, diagonal, UNFOLDED_STIFFNESS)
    return smooth if surface.apart(smooth, bad) < FARTHER * surface.apart(x, bad) else x


def _onto(
    surface: FrameSurface,
    skin: RigidSkin,
    shape: Float[np.ndarray, "n 3"],
    carried: Float[np.ndarray, "n 3"],
    free: Bool[np.ndarray, " n"],
    diagonal: float,
) -> Float[np.ndarray, "n 3"]:
    """`carried` with the free vertices on a surface: drawn to it from where they are, or from where their limbs are
    turned to first, as long as that brings the skin and the surface nearer to each other."""
    # what is not free stays, and so does what it covers
    bare = np.flatnonzero(surface.uncovered(carried[~free]) > OFF * diagonal)
    start, best = carried, skin.drawn(shape, carried, free, surface, bare, diagonal, STIFFNESS)
    for _ in range(TURNS):
        start, moved = turned(skin.graph, start, free, surface, bare, diagonal)
        if not moved.any():
            break
        other = skin.drawn(shape, start, free, surface, bare, diagonal, TURNED_STIFFNESS)
        if surface.apart(other, free) > NEARER * surface.apart(best, free):
            break
        start = best = other
    return best
