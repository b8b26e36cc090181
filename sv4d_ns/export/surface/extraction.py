"""One mesh of fixed topology, moved through time by the inverse of the field's deformation.

The field maps what is seen at time t to one canonical shape: canonical = x + deformation(x, t) (D-NeRF's direction).
The mesh is cut out of the canonical density once; every vertex v is then followed by solving
x + deformation(x, t) = v for x at each frame. Everything here is in world units (z up, the object inside the
field's box) and knows nothing of nerfstudio or of file formats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import fast_simplification
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import spsolve
from skimage.measure import marching_cubes
from torch import Tensor

from sv4d_ns.export.limits import check_face_budget, check_resolution
from sv4d_ns.utils.errors import InputError

OPACITY_STEP = 1 / 32
"""Length over which opacity is judged, as a part of the box's side. Own design decision."""
LEVELS = tuple(np.linspace(0.15, 0.9, 16))
"""Opacities over that length at which the surface may be cut; the lowest is well above an untrained field's fog."""
GRID_BLUR = 0.6
"""Gaussian blur of the opacity grid in voxels: takes the staircase off a fitted density and keeps thin limbs."""
MINOR_PART = 0.02
"""Connected parts with less than this share of the largest part's area are floaters and are dropped."""
SOLVED = 1e-3
"""A vertex counts as solved when its residual is below this share of the box's diagonal (2 mm on a 2 m diagonal)."""
TEAR = 0.02
"""Edges longer than this share of the box's diagonal (and four times their rest length) count as torn."""
CONVERGED = 1e-4
"""Iteration stops at this share of the box's diagonal."""
CHUNK = 1 << 17
"""Points per field evaluation."""


class EmptyField(InputError):
    """A field that shows nothing of which a surface could be cut."""


class AnimatedField(Protocol):
    """What a field must offer to be exported; `sv4d_ns.field.deformable.DeformableField` does.

    Points are world coordinates, times lie in [0, 1], densities are per world unit.
    """

    aabb: Float[Tensor, "2 3"]

    def canonical_density(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]: ...
    def density(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, " n"]: ...
    def deformation(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3"]: ...


class _Frozen:
    """A field at one time, read like a canonical one."""

    def __init__(self, field: AnimatedField, time: float):
        self.field, self.time, self.aabb = field, time, field.aabb

    def canonical_density(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        return self.field.density(x, x.new_full((len(x), 1), self.time))


def frozen(field: AnimatedField, time: float) -> Any:
    """The field as it is at a time in [0, 1], for `opacity_grid`."""
    return _Frozen(field, time)


@dataclass(frozen=True)
class OpacityGrid:
    """The canonical object on the nodes of a grid that spans the field's box."""

    values: Float[np.ndarray, "r r r"]
    """Opacity in [0, 1) over the length `step`, indexed (x, y, z)."""
    low: Float[np.ndarray, " 3"]
    high: Float[np.ndarray, " 3"]
    step: float
    """World units."""

    @property
    def spacing(self) -> Float[np.ndarray, " 3"]:
        """World units between nodes."""
        return (self.high - self.low) / (np.array(self.values.shape) - 1)

    @property
    def extinction(self) -> Float[np.ndarray, "r r r"]:
        """Density per world unit (float32)."""
        return (-np.log1p(-np.minimum(self.values, 1 - 1e-6)) / self.step).astype(np.float32)


@dataclass(frozen=True)
class CanonicalMesh:
    """The field's surface at rest: vertices in world units, faces counter-clockwise seen from outside."""

    vertices: Float[np.ndarray, "n 3"]
    faces: Int[np.ndarray, "f 3"]
    dropped_parts: int
    """How many floaters were removed."""


@dataclass(frozen=True)
class Tracks:
    """Where each canonical vertex is at each time, and how well the equation is met there."""

    positions: Float[np.ndarray, "t n 3"]
    residuals: Float[np.ndarray, "t n"]
    """|x + deformation(x, t) - v| as a share of the box's diagonal, after any fallback."""
    guessed: Bool[np.ndarray, "t n"]
    """True where no solution was found, or one that tears the skin, and the displacement is the smooth average of the
    solved neighbours."""

    def summary(self) -> str:
        """One line: mean, 95th percentile and maximum of the residual in percent of the box's diagonal, and the
        guesses."""
        percent = 100 * self.residuals
        return (
            f"residual of the inverse deformation: mean {percent.mean():.3f} %, "
            f"p95 {np.percentile(percent, 95):.3f} %, max {percent.max():.3f} % of the box's diagonal; "
            f"{self.guessed.mean():.2%} of the vertex positions follow their neighbours"
        )


# ---------------------------------------------------------------------------------------------- field evaluation


def _device_of(field: AnimatedField) -> torch.device:
    return field.aabb.device


def _evaluate(
    function: Callable[..., Tensor], device: torch.device, points: np.ndarray, time: float | None = None
) -> np.ndarray:
    """function(points) or function(points, time) in chunks, from and to numpy float32."""
    results = []
    with torch.no_grad():
        for start in range(0, len(points), CHUNK):
            x = torch.from_numpy(np.ascontiguousarray(points[start : start + CHUNK], dtype=np.float32)).to(device)
            value = function(x) if time is None else function(x, torch.full_like(x[:, :1], time))
            results.append(value.float().cpu().numpy())
    return np.concatenate(results) if results else np.zeros(0, dtype=np.float32)


def _box(field: AnimatedField) -> tuple[np.ndarray, np.ndarray]:
    low, high = field.aabb.detach().cpu().numpy().astype(np.float64)
    return low, high


# ------------------------------------------------------------------------------------------------ canonical mesh


def opacity_grid(
    field: AnimatedField,
    resolution: int,
    possible: Callable[[Tensor], Tensor] | None = None,
    advance: Callable[[], None] | None = None,
) -> OpacityGrid:
    """Sample the canonical density on `resolution`^3 nodes.

    Args:
        possible: whether canonical points [n, 3] may hold the object (bool [n]). A renderer that skips empty space
            never shows what the field has elsewhere, so training never removed it. None: everywhere.
        advance: called once per plane of nodes.

    Raises:
        InputError: the resolution is too small.
    """
    check_resolution(resolution)
    low, high = _box(field)
    axes = [np.linspace(low[i], high[i], resolution, dtype=np.float32) for i in range(3)]
    step = OPACITY_STEP * float((high - low).max())
    planes = []
    for x in axes[0]:
        points = np.stack(np.meshgrid(x, axes[1], axes[2], indexing="ij"), axis=-1).reshape(-1, 3)
        look = np.ones(len(points), dtype=bool)
        if possible is not None:
            look = _evaluate(possible, _device_of(field), points) > 0.5
        density = np.zeros(len(points), dtype=np.float32)
        density[look] = _evaluate(field.canonical_density, _device_of(field), points[look])
        planes.append((1 - np.exp(-np.maximum(density, 0) * step)).reshape(resolution, resolution))
        if advance is not None:
            advance()
    return OpacityGrid(np.stack(planes), low, high, step)


def canonical_mesh(grid: OpacityGrid, max_faces: int | None = None, watertight: bool = False) -> CanonicalMesh:
    """Marching cubes on the canonical opacity (cut at `surface_level`), without inner shells and floaters, within a
    face budget.

    Args:
        watertight: every edge belongs to exactly two faces.

    Raises:
        InputError: nothing in the box is opaque enough, the budget is too small, or too small to be watertight.
    """
    check_face_budget(max_faces)
    solid, level = solid_and_level(grid)
    return surface_of(solid, level, grid, max_faces, watertight)


def solid_and_level(grid: OpacityGrid) -> tuple[Float[np.ndarray, "r r r"], float]:
    """The smoothed opacity and the level its surface is cut at (`surface_level`, which says what it raises)."""
    solid = ndimage.gaussian_filter(grid.values, GRID_BLUR, mode="constant")
    return solid, surface_level(grid, solid)


def surface_of(
    solid: Float[np.ndarray, "r r r"],
    level: float,
    grid: OpacityGrid,
    max_faces: int | None = None,
    watertight: bool = False,
) -> CanonicalMesh:
    """Marching cubes at a level of `solid` on the nodes of `grid`; see `canonical_mesh`."""
    check_face_budget(max_faces)
    vertices, faces = _marching_cubes(_without_cavities(solid, level), level, grid)
    vertices, faces, dropped = without_floaters(vertices, faces)
    if max_faces is not None and len(faces) > max_faces:
        simplify = _decimated_watertight if watertight else _decimated
        vertices, faces = simplify(vertices, faces, max_faces)
    elif watertight and not is_watertight(faces):
        vertices, faces = _decimated_watertight(vertices, faces, len(faces))
    return CanonicalMesh(vertices.astype(np.float32), wound_outward(vertices, faces).astype(np.int32), dropped)


def surface_level(grid: OpacityGrid, solid: Float[np.ndarray, "r r r"]) -> float:
    """The level of `solid` (the smoothed grid) whose silhouettes agree best with a rendering of the grid's volume.

    A fitted density has no one value at its surface: soft limbs need a low level, hard bodies any. The measure is the
    intersection over union of {pixels whose ray meets the level} and {pixels at least half opaque}, summed over
    orthographic pictures along the three axes. Own design decision, measured in docs/export.md.

    Raises:
        InputError: there is nothing to be seen, or only fog.
    """
    depths = [grid.extinction.sum(axis=axis) * grid.spacing[axis] for axis in range(3)]
    visible = np.stack([1 - np.exp(-depth) > 0.5 for depth in depths])
    highest = np.stack([solid.max(axis=axis) for axis in range(3)])
    scores = []
    for level in LEVELS:
        hit = highest > level
        scores.append((hit & visible).sum() / max((hit | visible).sum(), 1))
    level = LEVELS[int(np.argmax(scores))]
    if not (visible.any() and (highest > level).any()):
        raise EmptyField(
            f"the field is empty: its highest opacity is {highest.max():.3f}, and a surface needs {LEVELS[0]:g}; "
            "train longer, or check the input video's foreground."
        )
    return float(level)


def _without_cavities(solid: Float[np.ndarray, "r r r"], level: float) -> Float[np.ndarray, "r r r"]:
    """Fill hollows that no path from outside reaches: supervision never sees them, and they would cost faces."""
    inside = ndimage.binary_fill_holes(solid > level)
    return np.where(inside, np.maximum(solid, level + 1e-3), solid)


def _marching_cubes(solid: np.ndarray, level: float, grid: OpacityGrid) -> tuple[np.ndarray, np.ndarray]:
    """Surface in world coordinates; an empty border closes shapes that touch the box."""
    vertices, faces, _, _ = marching_cubes(np.pad(solid, 1), level=level, spacing=tuple(grid.spacing))
    return np.clip(vertices + grid.low - grid.spacing, grid.low, grid.high), faces


def vertex_graph(faces: np.ndarray, count: int) -> sparse.csr_matrix:
    """Symmetric 0/1 adjacency of the vertices."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    ones = np.ones(len(edges) * 2)
    graph = sparse.coo_matrix((ones, (np.r_[edges[:, 0], edges[:, 1]], np.r_[edges[:, 1], edges[:, 0]])), (count,) * 2)
    graph = graph.tocsr()
    graph.data[:] = 1
    return graph


def grown(graph: sparse.csr_matrix, chosen: Bool[np.ndarray, " n"], rings: int) -> Bool[np.ndarray, " n"]:
    """Vertices of a mesh's graph and so many rings of neighbours around them."""
    for _ in range(rings):
        chosen = chosen | (graph @ chosen.astype(np.float64) > 0)
    return chosen


def neighbour_mean(graph: sparse.csr_matrix) -> sparse.csr_matrix:
    """What, multiplied with the vertices' places, gives the mean of each one's neighbours (uniform Laplacian smoothing
    goes half-way there)."""
    return (sparse.diags(1 / np.maximum(np.asarray(graph.sum(axis=1)).ravel(), 1)) @ graph).tocsr()


def without_floaters(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    parts, label = csgraph.connected_components(vertex_graph(faces, len(vertices)), directed=False)
    corner = vertices[faces]
    areas = 0.5 * np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=-1)
    per_part = np.bincount(label[faces[:, 0]], weights=areas, minlength=parts)
    keep = per_part >= MINOR_PART * per_part.max()
    return *_compacted(vertices, faces[keep[label[faces[:, 0]]]]), int((~keep).sum())


def _compacted(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    used, renumbered = np.unique(faces, return_inverse=True)
    return vertices[used], renumbered.reshape(-1, 3)


def _decimated(
    vertices: np.ndarray, faces: np.ndarray, max_faces: int, aggressiveness: float = 7.0
) -> tuple[np.ndarray, np.ndarray]:
    """Quadric edge collapse down to the budget."""
    fewer_vertices, fewer_faces = fast_simplification.simplify(
        vertices.astype(np.float32), faces.astype(np.int32), target_count=max_faces, agg=aggressiveness
    )
    corner = fewer_vertices[fewer_faces]
    area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=-1)
    return _compacted(fewer_vertices, fewer_faces[area > 0])


def is_watertight(faces: Int[np.ndarray, "f 3"]) -> bool:
    """Whether every edge belongs to exactly two faces that run along it in opposite directions."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    base = int(faces.max()) + 1
    forward, backward = np.sort(edges[:, 0] * base + edges[:, 1]), np.sort(edges[:, 1] * base + edges[:, 0])
    return bool((np.diff(forward) > 0).all() and np.array_equal(forward, backward))


def _decimated_watertight(vertices: np.ndarray, faces: np.ndarray, max_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """Simplified and closed. Edge collapses can pinch a thin limb into faces that share an edge by threes; those
    faces are cut out and the holes closed, from ever gentler collapses until it works."""
    for aggressiveness in (7.0, 5.0, 3.0, 2.0):
        fewer, corners = _decimated(vertices, faces, max_faces, aggressiveness)
        for _ in range(4):
            corners = _without_pinches(corners)
            fewer, corners = _compacted(*_with_holes_closed(fewer, corners))
            if is_watertight(corners) and len(corners) <= max_faces:
                return fewer, corners
    raise InputError(
        f"--watertight is not possible within --max-faces {max_faces}: limbs thinner than a face pinch shut; "
        "give a larger budget, or leave out --watertight."
    )


def _without_pinches(faces: np.ndarray) -> np.ndarray:
    """Faces without repeated corners, twins, and those at edges that more than two faces share."""
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    _, first, count = np.unique(np.sort(faces, axis=1), axis=0, return_index=True, return_counts=True)
    faces = faces[np.sort(first[count == 1])]
    edges = np.sort(np.stack([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]], axis=1), axis=-1)
    _, which, shared = np.unique(edges.reshape(-1, 2), axis=0, return_inverse=True, return_counts=True)
    return faces[(shared[which.reshape(-1, 3)] <= 2).all(axis=1)]


def _with_holes_closed(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every boundary loop closed, wound like the faces around it: three edges by a face, more by a fan around a new
    vertex in their middle (a fan between old vertices could use an edge that exists already)."""
    new, caps, count = [], [], len(vertices)
    for loop in _boundary_loops(faces):
        if len(loop) == 3:
            caps.append(loop)
            continue
        new.append(vertices[loop].mean(axis=0))
        caps += [[count, a, b] for a, b in pairwise([*loop, loop[0]])]
        count += 1
    if not caps:
        return vertices, faces
    return np.concatenate([vertices, *(row[None] for row in new)]), np.concatenate([faces, np.array(caps, faces.dtype)])


def _boundary_loops(faces: np.ndarray) -> list[list[int]]:
    """Simple loops of vertices around holes, in the order a face that fills the hole has them."""
    present = {(int(a), int(b)) for a, b in np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])}
    after: dict[int, list[int]] = {}
    for a, b in sorted(present):
        if (b, a) not in present:
            after.setdefault(b, []).append(a)
    loops = []
    for start in list(after):
        path = [start]
        while after.get(path[-1]):
            following = after[path[-1]].pop()
            if following in path:  # holes that touch in a vertex are holes of their own
                at = path.index(following)
                loops.append(path[at:])
                path = path[: at + 1]
            else:
                path.append(following)
    return loops


def wound_outward(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    corner = vertices[faces]
    volume = np.einsum("fi,fi->", corner[:, 0], np.cross(corner[:, 1], corner[:, 2]))
    return faces if volume > 0 else faces[:, ::-1]


def vertex_normals(positions: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"]) -> Float[np.ndarray, "n 3"]:
    """Area-weighted unit normals, float32; a vertex whose faces cancel gets +z."""
    corner = positions[faces].astype(np.float64)
    weighted = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    total = np.stack(
        [np.bincount(faces.ravel(), np.repeat(weighted[:, i], 3), minlength=len(positions)) for i in range(3)], axis=-1
    )
    length = np.linalg.norm(total, axis=-1, keepdims=True)
    up = np.array([0.0, 0.0, 1.0])
    return np.where(length > 1e-20, total / np.maximum(length, 1e-20), up).astype(np.float32)


# ------------------------------------------------------------------------------------- inverse of the deformation


class _Inverse:
    """Solves x + deformation(x, t) = v for all vertices at one time; remembers the Jacobians for the next frame."""

    def __init__(self, field: AnimatedField, targets: Float[np.ndarray, "n 3"]):
        self.field = field
        self.targets = targets.astype(np.float64)
        self.low, self.high = _box(field)
        self.diagonal = float(np.linalg.norm(self.high - self.low))
        self.inverse_jacobian = np.tile(np.eye(3), (len(targets), 1, 1))

    def residual(self, x: np.ndarray, time: float, which: np.ndarray) -> np.ndarray:
        """x + deformation(x, t) - v of the vertices `which`."""
        return x + _evaluate(self.field.deformation, _device_of(self.field), x, time) - self.targets[which]

    def _stepped(self, x: np.ndarray, step: np.ndarray) -> np.ndarray:
        """x + step, no further than a twentieth of the diagonal (the field is only locally linear), in the box."""
        length = np.linalg.norm(step, axis=-1, keepdims=True)
        return np.clip(x + step * np.minimum(1, 0.05 * self.diagonal / np.maximum(length, 1e-12)), self.low, self.high)

    def broyden(self, start: np.ndarray, time: float, iterations: int = 24) -> np.ndarray:
        """Broyden's rank-one quasi-Newton method (the first step from an identity Jacobian is the fixed point's).

        One field evaluation per iteration, only for vertices not yet converged; the best point seen is returned.
        """
        best, which = start.copy(), np.arange(len(start))
        x, f = start.copy(), self.residual(start, time, which)
        least = np.linalg.norm(f, axis=-1)
        for _ in range(iterations):
            open_ = np.linalg.norm(f, axis=-1) > CONVERGED * self.diagonal
            which, x, f = which[open_], x[open_], f[open_]
            if not len(which):
                break
            jacobian = self.inverse_jacobian[which]
            new = self._stepped(x, -np.einsum("nij,nj->ni", jacobian, f))
            f_new = self.residual(new, time, which)
            self.inverse_jacobian[which] = _broyden_update(jacobian, new - x, f_new - f)
            norm = np.linalg.norm(f_new, axis=-1)
            better = norm < least[which]
            best[which[better]], least[which[better]] = new[better], norm[better]
            x, f = new, f_new
        return best

    def newton(
        self, start: np.ndarray, time: float, which: np.ndarray, iterations: int = 12
    ) -> tuple[np.ndarray, np.ndarray]:
        """Newton with a finite-difference Jacobian and a backtracking step, for the vertices `which` only; the points
        and their residuals as a share of the diagonal."""
        x, f = start[which], self.residual(start[which], time, which)
        for _ in range(iterations):
            # a little of the identity keeps folded places solvable; it vanishes with the residual's size
            damping = 1e-6 * np.eye(3)
            jacobian = self._jacobian(x, time, which)
            transposed = jacobian.swapaxes(1, 2)
            step = -np.linalg.solve(transposed @ jacobian + damping, transposed @ f[..., None])[..., 0]
            x, f = self._first_better(x, f, step, time, which)
            if (np.linalg.norm(f, axis=-1) < CONVERGED * self.diagonal).all():
                break
        return x, np.linalg.norm(f, axis=-1) / self.diagonal

    # The vertices that Newton is left with are few, so that a call of the field costs more than its points do: all
    # points that can be known beforehand are asked for at once.

    def _jacobian(self, x: np.ndarray, time: float, which: np.ndarray) -> np.ndarray:
        """Central differences of the residual [n, 3, 3]."""
        reach = 2e-3 * self.diagonal
        axes = reach * np.concatenate([np.eye(3), -np.eye(3)])
        around = self.residual((x + axes[:, None]).reshape(-1, 3), time, np.tile(which, 6)).reshape(2, 3, -1, 3)
        return np.moveaxis((around[0] - around[1]) / reach / 2, 0, -1)

    def _first_better(
        self, x: np.ndarray, f: np.ndarray, step: np.ndarray, time: float, which: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """x and its residual after the longest of four parts of the step that lowers the residual, if one does."""
        tried = np.stack([self._stepped(x, scale * step) for scale in (1.0, 0.5, 0.25, 0.1)])
        f_tried = self.residual(tried.reshape(-1, 3), time, np.tile(which, len(tried))).reshape(tried.shape)
        better = np.linalg.norm(f_tried, axis=-1) < np.linalg.norm(f, axis=-1)
        first, everyone = better.argmax(axis=0), np.arange(len(x))
        any_better = better.any(axis=0)[:, None]
        return np.where(any_better, tried[first, everyone], x), np.where(any_better, f_tried[first, everyone], f)


def _broyden_update(inverse: np.ndarray, dx: np.ndarray, df: np.ndarray) -> np.ndarray:
    """The 'good' rank-one update of an inverse Jacobian (Sherman-Morrison form), skipped where it is ill-posed."""
    moved = np.einsum("nij,nj->ni", inverse, df)
    row = np.einsum("ni,nij->nj", dx, inverse)
    scale = np.einsum("ni,ni->n", dx, moved)
    safe = np.abs(scale) > 1e-3 * np.einsum("ni,ni->n", dx, dx) + 1e-16
    updated = inverse + np.einsum("ni,nj->nij", dx - moved, row) / np.where(safe, scale, 1)[:, None, None]
    bounded = np.abs(updated).max(axis=(1, 2)) < 10
    return np.where((safe & bounded)[:, None, None], updated, inverse)


def outwards(first: int, frames: int) -> list[tuple[int, int]]:
    """(frame, the frame beside it that comes before it in this order), from a frame on in both directions of time."""
    return [(i, i - 1) for i in range(first + 1, frames)] + [(i, i + 1) for i in range(first - 1, -1, -1)]


def smooth_fill(displacement: np.ndarray, known: np.ndarray, graph: sparse.csr_matrix, prior: np.ndarray) -> np.ndarray:
    """Replace unknown displacements by the harmonic average of their neighbours (weakly tied to `prior`)."""
    unknown = ~known
    if not unknown.any():
        return displacement
    rows = csgraph.laplacian(graph).tocsr()[unknown]
    tie = 1e-4  # decides only parts of the mesh in which nothing at all was solved
    matrix = (rows[:, unknown] + tie * sparse.identity(int(unknown.sum()))).tocsc()
    right = -rows[:, known] @ displacement[known] + tie * prior[unknown]
    filled = displacement.copy()
    filled[unknown] = spsolve(matrix, right).reshape(-1, 3)
    return filled


def follow_vertices(
    field: AnimatedField,
    mesh: CanonicalMesh,
    times: Float[np.ndarray, " t"],
    advance: Callable[[], None] | None = None,
) -> Tracks:
    """Solve the inverse deformation for every vertex at every time; `advance` is called once per frame.

    The frame that is deformed least starts from the canonical shape, each other one from its solved neighbour in time.
    What quasi-Newton leaves open is tried again with Newton, from its own best point and from the average of its
    neighbours; what stays open keeps that average (`guessed`).
    """
    solver = _Inverse(field, mesh.vertices)
    some = np.arange(0, len(solver.targets), max(1, len(solver.targets) // 2000))
    rest = solver.targets[some]
    offsets = [float(np.linalg.norm(solver.residual(rest, float(t), some), axis=-1).mean()) for t in times]
    graph = vertex_graph(mesh.faces, len(mesh.vertices))
    return _solved(solver, solver.targets, int(np.argmin(offsets)), graph, times, advance)


def follow_points(
    field: AnimatedField, start: Float[np.ndarray, "k 3"], first: int, times: Float[np.ndarray, " t"]
) -> Tracks:
    """The same for loose points whose places at the time `first` are known: what two canonical places share (two arms
    that come from one) is told apart by where it starts. What stays open stays where it was at the neighbouring time.
    """
    places = start.astype(np.float64)
    here = places + _evaluate(field.deformation, _device_of(field), places, float(times[first]))
    loose = sparse.csr_matrix((len(places), len(places)))
    return _solved(_Inverse(field, here), places, first, loose, times)


def _solved(
    solver: _Inverse,
    start: Float[np.ndarray, "n 3"],
    first: int,
    graph: sparse.csr_matrix,
    times: Float[np.ndarray, " t"],
    advance: Callable[[], None] | None = None,
) -> Tracks:
    """Solutions at all times, looked for from `start` at the time `first` and from there on outwards."""
    positions = np.zeros((len(times), *start.shape))
    residuals, guessed = np.zeros(positions.shape[:2]), np.zeros(positions.shape[:2], dtype=bool)
    for frame, beside in [(first, None), *outwards(first, len(times))]:
        begin = start if beside is None else positions[beside]
        positions[frame], residuals[frame], guessed[frame] = _solve_frame(solver, begin, float(times[frame]), graph)
        if advance is not None:
            advance()
    return Tracks(positions.astype(np.float32), residuals.astype(np.float32), guessed)


def _solve_frame(
    solver: _Inverse, start: np.ndarray, time: float, graph: sparse.csr_matrix
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions [n, 3], residuals [n] as a share of the diagonal, and which were guessed [n], at one time."""
    everyone = np.arange(len(start))

    def error(x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(solver.residual(x, time, everyone), axis=-1) / solver.diagonal

    def retried(x: np.ndarray, wrong: np.ndarray, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left = np.flatnonzero(wrong > SOLVED)
        if not len(left):
            return x, wrong
        again, wrong_again = solver.newton(begin, time, left)
        better = wrong_again < wrong[left]
        x, wrong = x.copy(), wrong.copy()
        x[left[better]], wrong[left[better]] = again[better], wrong_again[better]
        return x, wrong

    x = solver.broyden(start, time)
    x, wrong = retried(x, error(x), x)
    if (wrong > SOLVED).any():
        x, wrong = retried(x, wrong, _neighbour_vote(solver, x, start, wrong <= SOLVED, graph))
    known = (wrong <= SOLVED) & ~find_tears(solver.targets, x, graph, TEAR * solver.diagonal)
    if known.all():
        return x, wrong, ~known
    x = _neighbour_vote(solver, x, start, known, graph)
    return x, error(x), ~known


def find_tears(
    rest: Float[np.ndarray, "n 3"], x: Float[np.ndarray, "n 3"], graph: sparse.csr_matrix, reach: float
) -> Bool[np.ndarray, " n"]:
    """Vertices on islands that hang on the largest piece of their part by overstretched edges only.

    A fitted deformation is not one-to-one: a foot can have a second, exact solution elsewhere, and the skin between
    would be drawn out to a sheet. An edge is overstretched when it is `reach` long and four times its rest length.
    """
    edges = sparse.triu(graph).tocoo()
    length = np.linalg.norm(x[edges.row] - x[edges.col], axis=-1)
    whole = length <= np.maximum(reach, 4 * np.linalg.norm(rest[edges.row] - rest[edges.col], axis=-1))
    intact = sparse.coo_matrix((edges.data[whole], (edges.row[whole], edges.col[whole])), graph.shape)
    _, part = csgraph.connected_components(graph, directed=False)
    _, island = csgraph.connected_components(intact, directed=False)
    sizes = np.bincount(island)
    largest_of_part = np.zeros(part.max() + 1, dtype=np.int64)
    np.maximum.at(largest_of_part, part, sizes[island])
    return sizes[island] < largest_of_part[part]


def _neighbour_vote(
    solver: _Inverse, x: np.ndarray, start: np.ndarray, known: np.ndarray, graph: sparse.csr_matrix
) -> np.ndarray:
    """x with every unknown vertex moved to where its known neighbours' displacements would carry it."""
    return solver.targets + smooth_fill(x - solver.targets, known, graph, start - solver.targets)
