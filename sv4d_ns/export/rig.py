"""Smooth-skinning decomposition: a moving mesh as few rigid bones and at most four weights per vertex.

Le & Deng 2012, "Smooth Skinning Decomposition with Rigid Bones": weights and bone transforms are solved in turn, both
exactly given the other; bones are added where the error is largest until a bound is met or a budget spent.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

from sv4d_ns.geometry.rotations import nearest_rotation
from sv4d_ns.utils.compiled import njit

INFLUENCES = 4
"""Bones a vertex may follow; what game engines accept."""
CANDIDATES = 12
"""Bones considered for a vertex: those that carry it best alone."""
FIRST_BONES = 4
GROWTH = 1.35
"""Factor on the number of bones from round to round."""
ROUNDS = 4
"""Alternations of weights and transforms for each number of bones."""
LAST_ROUNDS = 8
"""Alternations once no bone is added any more."""
SEED_SHARE = 0.01
"""Share of the vertices, nearest to the worst one, that a new bone is first fitted to."""


@dataclass(frozen=True, eq=False)
class Skin:
    """Bones that carry the rest pose (frame 0) to every frame: x(t) = sum_j w_j (R_j(t) x(0) + d_j(t))."""

    rotations: Float[np.ndarray, "t b 3 3"]
    offsets: Float[np.ndarray, "t b 3"]
    joints: Int[np.ndarray, "n 4"]
    """Bones each vertex follows; unused places have weight 0 and bone 0."""
    weights: Float[np.ndarray, "n 4"]
    """Non-negative, each row sums to 1."""
    rmse: float
    """Root mean square distance of the skinned vertices to the true ones over all frames, world units."""

    @property
    def num_bones(self) -> int:
        """B."""
        return self.rotations.shape[1]

    def posed(self, rest: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "t n 3"]:
        """The vertices at every frame as an engine computes them."""
        return np.stack(list(self.frames(rest)))

    def largest_error(self, positions: Float[np.ndarray, "t n 3"]) -> float:
        """Largest distance of the skinned vertices to their places at all frames, world units."""
        made = self.frames(positions[0])
        return float(max(np.linalg.norm(x - place, axis=-1).max() for x, place in zip(made, positions, strict=True)))

    def frames(self, rest: Float[np.ndarray, "n 3"]) -> Iterator[Float[np.ndarray, "n 3"]]:
        """`posed`, one frame after the other."""
        for rotation, offset in zip(self.rotations, self.offsets, strict=True):
            carried = np.einsum("nkij,nj->nki", rotation[self.joints], rest) + offset[self.joints]
            yield np.einsum("nk,nki->ni", self.weights, carried)

    def moved(self, by: Float[np.ndarray, " 3"]) -> "Skin":
        """The same skin of a mesh that stands elsewhere."""
        return replace(self, offsets=self.offsets + by - self.rotations @ by)

    def taken(self, vertices: Int[np.ndarray, " m"]) -> "Skin":
        """The skin of a mesh whose vertices are copies of these."""
        return Skin(self.rotations, self.offsets, self.joints[vertices], self.weights[vertices], self.rmse)


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The bones of a skin as a tree of joints."""

    parents: Int[np.ndarray, " b"]
    """Of each bone; -1 for the root, and every other one comes after its parent in `order`."""
    places: Float[np.ndarray, "b 3"]
    """Where each joint is in the rest pose: the point about which the bone turns against its parent."""
    order: list[int]
    """All bones, parents first."""


STILLNESS = 0.01
"""Pull of a joint towards the middle of the skin it shares with its parent, for each frame: where the two hardly turn
against each other, any point would do."""


def skeleton(skin: Skin, rest: Float[np.ndarray, "n 3"]) -> Skeleton:
    """The tree of bones that share most skin (maximum spanning tree), rooted at the bone that carries most.

    A joint is the point that bone and parent carry to the same places over all frames, in the least-squares sense.
    """
    bones = skin.num_bones
    carried = np.zeros((len(rest), bones))
    for k in range(INFLUENCES):
        np.add.at(carried, (np.arange(len(rest)), skin.joints[:, k]), skin.weights[:, k])
    total = np.maximum(carried.sum(axis=0), 1e-9)
    centres = carried.T @ rest / total[:, None]
    apart = np.linalg.norm(centres[:, None] - centres, axis=-1)
    # bones that share no skin hang together by their distance, after all that do
    near = 1e-3 / (1 + apart / max(apart.max(), 1e-9))
    cost = 1 / (carried.T @ carried + near)
    np.fill_diagonal(cost, 0)
    root = int(total.argmax())
    order, parents = csgraph.breadth_first_order(csgraph.minimum_spanning_tree(cost), root, directed=False)
    parents = np.where(parents < 0, -1, parents)
    places = centres.copy()
    for bone in order[1:]:
        shared = carried[:, bone] * carried[:, parents[bone]]
        middle = shared @ rest / shared.sum() if shared.sum() > 1e-6 else centres[bone]
        places[bone] = _turning_point(skin, int(bone), int(parents[bone]), middle)
    return Skeleton(parents, places, [int(bone) for bone in order])


def _turning_point(skin: Skin, bone: int, parent: int, middle: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    """The point near `middle` that both bones carry to the same places."""
    turn = skin.rotations[:, bone] - skin.rotations[:, parent]
    shift = skin.offsets[:, bone] - skin.offsets[:, parent]
    tie = STILLNESS * len(turn)
    matrix = np.einsum("tji,tjk->ik", turn, turn) + tie * np.eye(3)
    return np.linalg.solve(matrix, tie * middle - np.einsum("tji,tj->i", turn, shift))


def decompose(
    positions: Float[np.ndarray, "t n 3"],
    bound: float,
    max_bones: int,
    advance: Callable[[int, float], None] | None = None,
) -> Skin:
    """Fit bones to a moving mesh.

    Args:
        bound: root mean square error, world units, at which no more bones are added.
        max_bones: at most so many.
        advance: called after each round with the number of bones and the error.
    """
    positions = positions.astype(np.float64)
    rest = positions[0]
    rotations, offsets = _rigid(rest, positions)
    rotations, offsets = rotations[:, None], offsets[:, None]
    joints = np.zeros((len(rest), INFLUENCES), np.int64)
    weights = np.zeros((len(rest), INFLUENCES))
    weights[:, 0] = 1
    tree = cKDTree(rest)
    while True:
        bones = rotations.shape[1]
        wanted = min(max_bones, max(FIRST_BONES, math.ceil(bones * GROWTH)))
        rotations, offsets = _with_bones_added(
            positions, rotations, offsets, _error(positions, rotations, offsets, joints, weights), tree, wanted - bones
        )
        for _ in range(ROUNDS):
            rmse = _improve(positions, rotations, offsets, joints, weights)
        if advance is not None:
            advance(rotations.shape[1], rmse)
        if rmse <= bound or rotations.shape[1] >= max_bones:
            break
    for _ in range(LAST_ROUNDS):
        rmse = _improve(positions, rotations, offsets, joints, weights)
    used = np.unique(joints[weights > 0])
    place = np.zeros(rotations.shape[1], np.int64)
    place[used] = np.arange(len(used))
    joints = np.where(weights > 0, place[joints], 0)
    return Skin(rotations[:, used], offsets[:, used], joints, weights, rmse)


def _improve(
    positions: np.ndarray, rotations: np.ndarray, offsets: np.ndarray, joints: np.ndarray, weights: np.ndarray
) -> float:
    """One alternation, in place; returns the root mean square error."""
    candidates = min(CANDIDATES, rotations.shape[1])
    _solve_weights(positions, rotations, offsets, joints, weights, candidates)
    _solve_bones(positions, rotations, offsets, joints, weights)
    return float(np.sqrt((_error(positions, rotations, offsets, joints, weights)).mean()))


def _error(
    positions: np.ndarray, rotations: np.ndarray, offsets: np.ndarray, joints: np.ndarray, weights: np.ndarray
) -> Float[np.ndarray, " n"]:
    """Mean squared distance of each vertex over the frames."""
    error = np.zeros(positions.shape[1])
    for truth, rotation, offset in zip(positions, rotations, offsets, strict=True):
        made = np.einsum("nk,nkij,nj->ni", weights, rotation[joints], positions[0], optimize=True)
        made += np.einsum("nk,nki->ni", weights, offset[joints])
        error += ((made - truth) ** 2).sum(axis=-1)
    return error / len(positions)


def _with_bones_added(
    positions: np.ndarray, rotations: np.ndarray, offsets: np.ndarray, error: np.ndarray, tree: cKDTree, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` more bones, each carrying the surroundings of the worst vertex that none of the others carries."""
    rest, left = positions[0], error.copy()
    near = max(12, int(SEED_SHARE * len(rest)))
    for _ in range(count):
        worst = int(left.argmax())
        _, around = tree.query(rest[worst], k=min(near, len(rest)))
        rotation, offset = _rigid(rest[around], positions[:, around])
        rotations = np.concatenate([rotations, rotation[:, None]], axis=1)
        offsets = np.concatenate([offsets, offset[:, None]], axis=1)
        carried = np.einsum("tij,nj->tni", rotation, rest) + offset[:, None]
        left = np.minimum(left, ((carried - positions) ** 2).sum(axis=-1).mean(axis=0))
        left[around] = 0
    return rotations, offsets


def _rigid(rest: np.ndarray, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotations [t 3 3] and offsets [t 3] that carry points best to where they are at each frame (Kabsch)."""
    centre, centres = rest.mean(axis=0), moved.mean(axis=1)
    rotation = nearest_rotation(np.einsum("tni,nj->tij", moved - centres[:, None], rest - centre))
    return rotation, centres - np.einsum("tij,j->ti", rotation, centre)


def _solve_bones(
    positions: np.ndarray, rotations: np.ndarray, offsets: np.ndarray, joints: np.ndarray, weights: np.ndarray
) -> None:
    """Each bone's best rigid transforms given the weights and the other bones (Le & Deng, section 3.3), in place."""
    rest = positions[0]
    made = np.zeros_like(positions)
    dense = np.zeros((len(rest), rotations.shape[1]))
    for k in range(INFLUENCES):
        dense[np.arange(len(rest)), joints[:, k]] += weights[:, k]
    members = [np.flatnonzero(dense[:, bone] > 1e-6) for bone in range(dense.shape[1])]

    def carried(bone: int, which: np.ndarray) -> np.ndarray:
        moved = np.einsum("tij,nj->tni", rotations[:, bone], rest[which]) + offsets[:, bone, None]
        return dense[which, bone][:, None] * moved

    for bone, which in enumerate(members):
        made[:, which] += carried(bone, which)
    for bone, which in enumerate(members):
        share = dense[which, bone]
        total = (share**2).sum()
        if total < 1e-3:  # a bone that carries nothing keeps its place
            continue
        own = carried(bone, which)
        target = positions[:, which] - made[:, which] + own
        centre = (share[:, None] ** 2 * rest[which]).sum(axis=0) / total
        centres = (share[:, None] * target).sum(axis=1) / total
        p = share[:, None] * (rest[which] - centre)
        q = target - share[:, None] * centres[:, None]
        rotation = nearest_rotation(np.einsum("tni,nj->tij", q, p))
        rotations[:, bone] = rotation
        offsets[:, bone] = centres - np.einsum("tij,j->ti", rotation, centre)
        made[:, which] += carried(bone, which) - own


@njit(cache=True, nogil=True)
def _solve_weights(positions, rotations, offsets, joints, weights, candidates):  # type: ignore[no-untyped-def]
    """Each vertex's best convex weights over the bones that carry it best alone, then over the four largest."""
    frames, count = positions.shape[0], positions.shape[1]
    bones = rotations.shape[1]
    carried = np.empty((bones, 3 * frames))
    target = np.empty(3 * frames)
    alone = np.empty(bones)
    for vertex in range(count):
        rest = positions[0, vertex]
        for t in range(frames):
            for i in range(3):
                target[3 * t + i] = positions[t, vertex, i]
        for bone in range(bones):
            total = 0.0
            for t in range(frames):
                for i in range(3):
                    value = offsets[t, bone, i]
                    for j in range(3):
                        value += rotations[t, bone, i, j] * rest[j]
                    carried[bone, 3 * t + i] = value
                    total += (value - target[3 * t + i]) ** 2
            alone[bone] = total
        chosen = np.argsort(alone)[:candidates]
        # what it follows now stays possible, so the error cannot grow
        for k in range(weights.shape[1]):
            if weights[vertex, k] > 0 and not (chosen == joints[vertex, k]).any():
                chosen = np.append(chosen, joints[vertex, k])
        share = _convex_weights(carried[chosen], target)
        if chosen.shape[0] > weights.shape[1]:
            largest = np.argsort(-share)[: weights.shape[1]]
            chosen = chosen[largest]
            share = _convex_weights(carried[chosen], target)
        for k in range(weights.shape[1]):
            if k < chosen.shape[0] and share[k] > 1e-3:
                joints[vertex, k], weights[vertex, k] = chosen[k], share[k]
            else:
                joints[vertex, k], weights[vertex, k] = 0, 0.0
        weights[vertex] /= weights[vertex].sum()


@njit(cache=True, nogil=True)
def _convex_weights(carried, target):  # type: ignore[no-untyped-def]
    """argmin |sum_j w_j carried_j - target|^2 over the simplex, by exact moves of weight between two bones."""
    count = carried.shape[0]
    gram, linear = carried @ carried.T, carried @ target
    w = np.zeros(count)
    w[np.argmin(np.diag(gram) - 2 * linear)] = 1.0
    gradient = gram @ w - linear
    for _ in range(100):
        gain, worst = 0, -1
        for j in range(count):
            if gradient[j] < gradient[gain]:
                gain = j
            if w[j] > 0.0 and (worst < 0 or gradient[j] > gradient[worst]):
                worst = j
        difference = gradient[worst] - gradient[gain]
        curvature = gram[gain, gain] + gram[worst, worst] - 2 * gram[gain, worst]
        if difference < 1e-9 or curvature < 1e-15:
            break
        step = min(difference / curvature, w[worst])
        w[gain] += step
        w[worst] -= step
        gradient += step * (gram[:, gain] - gram[:, worst])
    return w
