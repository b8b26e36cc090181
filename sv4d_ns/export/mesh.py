"""One mesh of fixed topology, moved through time by the inverse of the field's deformation.

The field maps what is seen at time t to one canonical shape: canonical = x + deformation(x, t) (D-NeRF's direction).
The mesh is cut out of the canonical density once; every vertex v is then followed by solving
x + deformation(x, t) = v for x at each frame. Everything here is in world units (z up, the object inside the
field's box) and knows nothing of nerfstudio or of file formats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import fast_simplification
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import spsolve
from skimage.measure import marching_cubes
from torch import Tensor

from sv4d_ns.errors import InputError

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
SKIN = 0.04
"""World units before and behind a vertex that count as the vertex when its colour is looked up."""
COLOR_SAMPLES = 8
"""Colours averaged along each ray."""
UNSEEN_WEIGHT = 0.02
"""Weight of the look along the inward normal: decides vertices that no camera sees, and nothing else."""
CHUNK = 1 << 17
"""Points per field evaluation."""


class AnimatedField(Protocol):
    """What a field must offer to be exported; `sv4d_ns.fields.deformable.DeformableField` does.

    Points are world coordinates, times lie in [0, 1], colours are sRGB in [0, 1], densities are per world unit.
    """

    aabb: Float[Tensor, "2 3"]

    def canonical_density(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]: ...
    def canonical_color(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]: ...
    def density(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, " n"]: ...
    def density_and_color(
        self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]: ...
    def deformation(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3"]: ...


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
        """One line: mean and 99th percentile of the residual in percent of the box's diagonal, and the guesses."""
        percent = 100 * self.residuals
        return (
            f"residual of the inverse deformation: mean {percent.mean():.3f} %, p99 {np.percentile(percent, 99):.3f} % "
            f"of the box's diagonal; {self.guessed.mean():.2%} of the vertex positions follow their neighbours"
        )


@dataclass(frozen=True)
class AnimatedMesh:
    """A coloured mesh of fixed topology over all frames, in world coordinates (z up)."""

    positions: Float[np.ndarray, "t n 3"]
    faces: Int[np.ndarray, "f 3"]
    colors: Int[np.ndarray, "n 3"]
    """uint8, sRGB."""
    normals: Float[np.ndarray, "t n 3"]
    """Unit length, outward."""
    fps: float


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
    return np.concatenate(results)


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
        InputError: the resolution is below 16.
    """
    if resolution < 16:
        raise InputError(f"--resolution {resolution} is too coarse for any shape: give 16 or more.")
    low, high = _box(field)
    axes = [np.linspace(low[i], high[i], resolution, dtype=np.float32) for i in range(3)]
    step = OPACITY_STEP * float((high - low).max())
    seen = field.canonical_density
    if possible is not None:
        seen = lambda x: field.canonical_density(x) * possible(x)  # noqa: E731
    planes = []
    for x in axes[0]:
        points = np.stack(np.meshgrid(x, axes[1], axes[2], indexing="ij"), axis=-1).reshape(-1, 3)
        density = _evaluate(seen, _device_of(field), points)
        planes.append((1 - np.exp(-np.maximum(density, 0) * step)).reshape(resolution, resolution))
        if advance is not None:
            advance()
    return OpacityGrid(np.stack(planes), low, high, step)


def canonical_mesh(grid: OpacityGrid, max_faces: int | None = None) -> CanonicalMesh:
    """Marching cubes on the canonical opacity (cut at `surface_level`), without inner shells and floaters, within a
    face budget.

    Raises:
        InputError: nothing in the box is opaque enough, or the budget is below 100 faces.
    """
    if max_faces is not None and max_faces < 100:
        raise InputError(f"--max-faces {max_faces} is too small for any shape: give 100 or more, or leave it out.")
    solid = ndimage.gaussian_filter(grid.values, GRID_BLUR, mode="constant")
    level = surface_level(grid, solid)
    vertices, faces = _marching_cubes(_without_cavities(solid, level), level, grid)
    vertices, faces, dropped = _without_floaters(vertices, faces)
    if max_faces is not None and len(faces) > max_faces:
        vertices, faces = _decimated(vertices, faces, max_faces)
    return CanonicalMesh(vertices.astype(np.float32), _wound_outward(vertices, faces).astype(np.int32), dropped)


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
        raise InputError(
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


def _vertex_graph(faces: np.ndarray, count: int) -> sparse.csr_matrix:
    """Symmetric 0/1 adjacency of the vertices."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    ones = np.ones(len(edges) * 2)
    graph = sparse.coo_matrix((ones, (np.r_[edges[:, 0], edges[:, 1]], np.r_[edges[:, 1], edges[:, 0]])), (count,) * 2)
    graph = graph.tocsr()
    graph.data[:] = 1
    return graph


def _without_floaters(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    parts, label = csgraph.connected_components(_vertex_graph(faces, len(vertices)), directed=False)
    corner = vertices[faces]
    areas = 0.5 * np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=-1)
    per_part = np.bincount(label[faces[:, 0]], weights=areas, minlength=parts)
    keep = per_part >= MINOR_PART * per_part.max()
    return *_compacted(vertices, faces[keep[label[faces[:, 0]]]]), int((~keep).sum())


def _compacted(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    used, renumbered = np.unique(faces, return_inverse=True)
    return vertices[used], renumbered.reshape(-1, 3)


def _decimated(vertices: np.ndarray, faces: np.ndarray, max_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """Quadric edge collapse down to the budget."""
    fewer_vertices, fewer_faces = fast_simplification.simplify(
        vertices.astype(np.float32), faces.astype(np.int32), target_count=max_faces
    )
    corner = fewer_vertices[fewer_faces]
    area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=-1)
    return _compacted(fewer_vertices, fewer_faces[area > 0])


def _wound_outward(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
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

    def newton(self, start: np.ndarray, time: float, which: np.ndarray, iterations: int = 12) -> np.ndarray:
        """Newton with a finite-difference Jacobian and a backtracking step, for the vertices `which` only."""
        x, f = start[which], self.residual(start[which], time, which)
        reach = 2e-3 * self.diagonal
        for _ in range(iterations):
            columns = []
            for axis in np.eye(3) * reach:
                columns.append(
                    (self.residual(x + axis, time, which) - self.residual(x - axis, time, which)) / reach / 2
                )
            jacobian = np.stack(columns, axis=-1)
            # a little of the identity keeps folded places solvable; it vanishes with the residual's size
            damping = 1e-6 * np.eye(3)
            transposed = jacobian.swapaxes(1, 2)
            step = -np.linalg.solve(transposed @ jacobian + damping, transposed @ f[..., None])[..., 0]
            for scale in (1.0, 0.5, 0.25, 0.1):
                new = self._stepped(x, scale * step)
                f_new = self.residual(new, time, which)
                better = np.linalg.norm(f_new, axis=-1) < np.linalg.norm(f, axis=-1)
                x, f = np.where(better[:, None], new, x), np.where(better[:, None], f_new, f)
                step = np.where(better[:, None], 0, step)
            if (np.linalg.norm(f, axis=-1) < CONVERGED * self.diagonal).all():
                break
        return x


def _broyden_update(inverse: np.ndarray, dx: np.ndarray, df: np.ndarray) -> np.ndarray:
    """The 'good' rank-one update of an inverse Jacobian (Sherman-Morrison form), skipped where it is ill-posed."""
    moved = np.einsum("nij,nj->ni", inverse, df)
    row = np.einsum("ni,nij->nj", dx, inverse)
    scale = np.einsum("ni,ni->n", dx, moved)
    safe = np.abs(scale) > 1e-3 * np.einsum("ni,ni->n", dx, dx) + 1e-16
    updated = inverse + np.einsum("ni,nj->nij", dx - moved, row) / np.where(safe, scale, 1)[:, None, None]
    bounded = np.abs(updated).max(axis=(1, 2)) < 10
    return np.where((safe & bounded)[:, None, None], updated, inverse)


def _frame_order(offsets: list[float]) -> list[tuple[int, int | None]]:
    """(frame, the solved frame to start from), from the frame that is deformed least outwards in both directions."""
    first = int(np.argmin(offsets))
    order: list[tuple[int, int | None]] = [(first, None)]
    order += [(i, i - 1) for i in range(first + 1, len(offsets))]
    order += [(i, i + 1) for i in range(first - 1, -1, -1)]
    return order


def _filled_smoothly(
    displacement: np.ndarray, known: np.ndarray, graph: sparse.csr_matrix, prior: np.ndarray
) -> np.ndarray:
    """Replace unknown displacements by the harmonic average of their neighbours (weakly tied to `prior`)."""
    unknown = ~known
    if not unknown.any():
        return displacement
    laplacian = sparse.diags(np.asarray(graph.sum(axis=1)).ravel()) - graph
    rows = laplacian.tocsr()[unknown]
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

    Each frame starts from its solved neighbour in time. What quasi-Newton leaves open is tried again with Newton,
    from its own best point and from the average of its neighbours; what stays open keeps that average (`guessed`).
    """
    targets, count = mesh.vertices.astype(np.float64), len(mesh.vertices)
    graph = _vertex_graph(mesh.faces, count)
    positions = np.zeros((len(times), count, 3))
    residuals, guessed = np.zeros((len(times), count)), np.zeros((len(times), count), dtype=bool)
    solver = _Inverse(field, targets)
    some = np.arange(0, count, max(1, count // 2000))
    offsets = [float(np.linalg.norm(solver.residual(targets[some], float(t), some), axis=-1).mean()) for t in times]
    for frame, previous in _frame_order(offsets):
        start = targets if previous is None else positions[previous]
        x, r, g = _solve_frame(solver, start, float(times[frame]), graph)
        positions[frame], residuals[frame], guessed[frame] = x, r, g
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

    def retried(x: np.ndarray, begin: np.ndarray) -> np.ndarray:
        left = np.flatnonzero(error(x) > SOLVED)
        if not len(left):
            return x
        again = x.copy()
        again[left] = solver.newton(begin, time, left)
        return np.where((error(again) < error(x))[:, None], again, x)

    x = solver.broyden(start, time)
    x = retried(x, x)
    x = retried(x, _neighbours_say(solver, x, start, error(x) <= SOLVED, graph))
    known = (error(x) <= SOLVED) & ~torn_off(solver.targets, x, graph, TEAR * solver.diagonal)
    x = _neighbours_say(solver, x, start, known, graph)
    return x, error(x), ~known


def torn_off(
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


def _neighbours_say(
    solver: _Inverse, x: np.ndarray, start: np.ndarray, known: np.ndarray, graph: sparse.csr_matrix
) -> np.ndarray:
    """x with every unknown vertex moved to where its known neighbours' displacements would carry it."""
    return solver.targets + _filled_smoothly(x - solver.targets, known, graph, start - solver.targets)


# ------------------------------------------------------------------------------------------------------- colours


def surface_colors(
    field: AnimatedField,
    mesh: CanonicalMesh,
    grid: OpacityGrid,
    eyes: Float[np.ndarray, "k 3"],
    importance: Float[np.ndarray, " k"],
) -> Int[np.ndarray, "n 3"]:
    """uint8 sRGB per vertex: what cameras at `eyes` see of it in renderings of the canonical object, averaged.

    The views constrained the colours of whole rays, not of points: the colour at the vertex itself belongs to the
    outermost, least supervised layer. A camera counts by its `importance`, by how directly it looks at the vertex and
    by how much of what it sees there is the vertex. Vertices that nobody sees get what a ray along the inward normal
    meets.
    """
    normals = vertex_normals(mesh.vertices, mesh.faces).astype(np.float64)
    vertices = mesh.vertices.astype(np.float64)
    color, _ = _seen_along(field, grid, vertices, -normals)
    total, weight = UNSEEN_WEIGHT * color, np.full((len(vertices), 1), UNSEEN_WEIGHT)
    for eye, factor in zip(eyes, importance, strict=True):
        directions = vertices - eye
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        facing = -np.einsum("ni,ni->n", directions, normals)
        front = np.flatnonzero(facing > 0.1)  # grazing rays mix the colours of a whole side
        color, visible = _seen_along(field, grid, vertices[front], directions[front])
        share = (factor * visible * facing[front] ** 2)[:, None]
        total[front] += share * color
        weight[front] += share
    return np.round(np.clip(total / weight, 0, 1) * 255).astype(np.uint8)


def _seen_along(
    field: AnimatedField, grid: OpacityGrid, vertices: Float[np.ndarray, "n 3"], directions: Float[np.ndarray, "n 3"]
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, " n"]]:
    """Colour of the ray through each vertex up to a little behind it, and the share of it that comes from around it.

    The weights of volume rendering come from the grid; the colour is the mean of the field's colours at their
    quantiles, which spends the field's evaluations where the ray is absorbed.
    """
    reach = float(np.linalg.norm(grid.high - grid.low))
    offsets = np.concatenate([np.arange(-reach, -SKIN, 2 * grid.spacing.max()), np.linspace(-SKIN, SKIN, 17)])
    points = vertices[:, None] + offsets[:, None] * directions[:, None]
    index = ((points - grid.low) / grid.spacing).reshape(-1, 3).T
    density = ndimage.map_coordinates(grid.extinction, index, order=1, mode="constant").reshape(points.shape[:2])
    depth = np.cumsum(density[:, :-1] * np.diff(offsets), axis=1)
    absorbed = 1 - np.exp(-depth)
    whole = np.maximum(absorbed[:, -1], 1e-6)
    before = absorbed[:, np.searchsorted(offsets, -SKIN) - 1]
    quantiles = (np.arange(COLOR_SAMPLES) + 0.5) / COLOR_SAMPLES
    # the interval in which each quantile of the absorbed light falls
    interval = (absorbed[:, None, :] < (quantiles[:, None] * whole[:, None, None])).sum(axis=-1)
    middle = 0.5 * (offsets[:-1] + offsets[1:])
    samples = vertices[:, None] + middle[np.minimum(interval, len(middle) - 1)][..., None] * directions[:, None]
    samples = np.clip(samples, grid.low, grid.high).reshape(-1, 3)
    colors = _evaluate(field.canonical_color, _device_of(field), samples).reshape(len(vertices), COLOR_SAMPLES, 3)
    return colors.mean(axis=1), (whole - before) / whole


def animate(mesh: CanonicalMesh, tracks: Tracks, colors: Int[np.ndarray, "n 3"], fps: float) -> AnimatedMesh:
    """Put the pieces together; normals are computed anew on every frame."""
    normals = np.stack([vertex_normals(frame, mesh.faces) for frame in tracks.positions])
    return AnimatedMesh(tracks.positions, mesh.faces, colors, normals, fps)
