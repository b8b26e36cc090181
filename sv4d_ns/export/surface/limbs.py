"""Limbs turned to where the field's own surface has them.

A limb that moves far between two frames is lost by a fitted motion, and closest points fold it on their way to its new
place. But it hangs on the same root, and the surface has it somewhere: a part that no skin covers begins there. The
lost limb is turned about its root onto that part as a rigid whole (iterated closest points, Besl & McKay 1992).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from sv4d_ns.export.surface.registration import FrameSurface
from sv4d_ns.geometry.rotations import nearest_rotation

LEAST = 20
"""Vertices of a limb, or of a bare part of the surface, that are worth a turn or a cover."""
ROOT_REACH = 0.05
"""Distance from a limb's root within which a bare part begins, as a share of the box's diagonal."""
ALIKE_SIZE = 0.4
"""Least ratio of the sizes of a limb and a bare part."""
GAIN = 0.85
"""Share of its distance from the bare part that a turn leaves at most."""
TURNS = 8
"""Searches for closest points."""


@dataclass(frozen=True, eq=False)
class Turn:
    """A limb turned to a bare part of a surface."""

    limb: int
    part: int
    vertices: Int[np.ndarray, " k"]
    to: Float[np.ndarray, "k 3"]
    gain: float
    """By how much its vertices come nearer, all together (world units)."""


def turned(
    graph: sparse.csr_matrix,
    x: Float[np.ndarray, "n 3"],
    lost: Bool[np.ndarray, " n"],
    surface: FrameSurface,
    bare: Int[np.ndarray, " b"],
    diagonal: float,
) -> tuple[Float[np.ndarray, "n 3"], Bool[np.ndarray, " n"]]:
    """`x` with lost limbs turned to bare parts of the surface, each limb to one part and the greatest gain first; and
    which vertices were turned.

    Args:
        graph: of the mesh (`vertex_graph`).
        lost: vertices that are not where the surface has them.
        bare: places of the surface that no other vertices are near.
        diagonal: of the field's box, world units.
    """
    result, moved = x.copy(), np.zeros(len(x), dtype=bool)
    parts = [surface.vertices[bare[part]] for part in connected_parts(surface.graph, bare)]
    turns = sorted(_turns(graph, x, lost, parts, diagonal), key=lambda turn: -turn.gain)
    limbs_done, parts_done = set(), set()
    for turn in turns:
        if turn.limb not in limbs_done and turn.part not in parts_done:
            limbs_done.add(turn.limb)
            parts_done.add(turn.part)
            result[turn.vertices], moved[turn.vertices] = turn.to, True
    return result, moved


def _turns(
    graph: sparse.csr_matrix,
    x: Float[np.ndarray, "n 3"],
    lost: Bool[np.ndarray, " n"],
    parts: Sequence[Float[np.ndarray, "p 3"]],
    diagonal: float,
) -> Iterator[Turn]:
    """All turns of a lost limb to a bare part that begins at its root that bring it nearer."""
    which = np.flatnonzero(lost)
    for limb, members in enumerate(connected_parts(graph, which)):
        vertices = which[members]
        around = np.unique(graph[vertices].indices)
        ring = x[around[~lost[around]]]
        if not len(ring):
            continue
        root, near_root = ring.mean(axis=0), cKDTree(ring)
        for part, places in enumerate(parts):
            if near_root.query(places)[0].min() > ROOT_REACH * diagonal:
                continue
            ratio = _size(places) / max(_size(x[vertices]), 1e-12)
            if not ALIKE_SIZE < ratio < 1 / ALIKE_SIZE:
                continue
            to = _turned_to(x[vertices], root, places)
            before, after = _apart(x[vertices], places), _apart(to, places)
            if after < GAIN * before:
                yield Turn(limb, part, vertices, to, len(vertices) * (before - after))


def connected_parts(graph: sparse.csr_matrix, which: Int[np.ndarray, " k"]) -> list[Int[np.ndarray, " c"]]:
    """The pieces of some vertices of a graph that have `LEAST` or more of them, as places in `which`."""
    _, piece = csgraph.connected_components(graph[which][:, which], directed=False)
    return [np.flatnonzero(piece == number) for number in np.flatnonzero(np.bincount(piece) >= LEAST)]


def _size(x: Float[np.ndarray, "k 3"]) -> float:
    return float(np.sqrt(x.var(axis=0).sum()))


def _apart(a: Float[np.ndarray, "k 3"], b: Float[np.ndarray, "m 3"]) -> float:
    """The greater of the mean distances from one set of points to the other."""
    return max(float(cKDTree(a).query(b)[0].mean()), float(cKDTree(b).query(a)[0].mean()))


def _turned_to(
    x: Float[np.ndarray, "k 3"], root: Float[np.ndarray, " 3"], places: Float[np.ndarray, "m 3"]
) -> Float[np.ndarray, "k 3"]:
    """Points turned about a root: the way to their middle to that of the places', then by closest points."""
    arm, goal, tree = x - root, places - root, cKDTree(places - root)
    way, there = arm.mean(axis=0), goal.mean(axis=0)
    # what hangs on both its ends has its root in its middle, and no way from there
    if min(np.linalg.norm(way) / _size(arm), np.linalg.norm(there) / _size(goal)) > 1e-6:
        # the turn of one direction into another leaves the twist open; the points settle it
        arm = Rotation.align_vectors(there[None], way[None])[0].apply(arm)
    for _ in range(TURNS):
        to_skin, to_place = cKDTree(arm).query(goal)[1], tree.query(arm)[1]
        before, after = np.concatenate([arm[to_skin], arm]), np.concatenate([goal, goal[to_place]])
        arm = arm @ nearest_rotation(after.T @ before).T
    return root + arm
