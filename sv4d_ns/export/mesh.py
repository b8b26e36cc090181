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
from jaxtyping import Float, Int
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import spsolve
from skimage.measure import marching_cubes
from torch import Tensor

from sv4d_ns.errors import InputError

SURFACE_STEP = 1 / 32
"""Length over which opacity is judged, as a part of the box's side (about the thickness of a limb's skin at the
resolution of the supervising views). Own design decision."""
SURFACE_ALPHA = 0.5
"""The surface is where a step of that length is half opaque: the median depth of a volume rendering. Own decision."""
GRID_BLUR = 0.6
"""Gaussian blur of the opacity grid in voxels: takes the staircase off a fitted density and keeps thin limbs."""
MINOR_PART = 0.02
"""Connected parts with less than this share of the largest part's area are floaters and are dropped."""
SOLVED = 1e-3
"""A vertex counts as solved when its residual is below this share of the box's diagonal (2 mm on a 2 m diagonal)."""
CONVERGED = 1e-4
"""Iteration stops at this share of the box's diagonal."""
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
    guessed: Float[np.ndarray, "t n"]
    """True where no solution was found and the displacement is the smooth average of the solved neighbours."""

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


def _opacity(density: np.ndarray, step: float) -> np.ndarray:
    return 1 - np.exp(-np.maximum(density, 0) * step)


def _box(field: AnimatedField) -> tuple[np.ndarray, np.ndarray]:
    low, high = field.aabb.detach().cpu().numpy().astype(np.float64)
    return low, high


# ------------------------------------------------------------------------------------------------ canonical mesh


def opacity_grid(
    field: AnimatedField, resolution: int, advance: Callable[[], None] | None = None
) -> Float[np.ndarray, "r r r"]:
    """Opacity over `SURFACE_STEP` at the nodes of a `resolution`^3 grid that spans the box, canonical space.

    `advance` is called once per plane.
    """
    low, high = _box(field)
    axes = [np.linspace(low[i], high[i], resolution, dtype=np.float32) for i in range(3)]
    step = SURFACE_STEP * float((high - low).max())
    planes = []
    for x in axes[0]:
        points = np.stack(np.meshgrid(x, axes[1], axes[2], indexing="ij"), axis=-1).reshape(-1, 3)
        density = _evaluate(field.canonical_density, _device_of(field), points)
        planes.append(_opacity(density, step).reshape(resolution, resolution))
        if advance is not None:
            advance()
    return np.stack(planes)


def canonical_mesh(
    field: AnimatedField,
    resolution: int = 128,
    max_faces: int | None = None,
    advance: Callable[[], None] | None = None,
) -> CanonicalMesh:
    """Marching cubes on the canonical opacity, without inner shells and floaters, within a face budget.

    Raises:
        InputError: nothing in the box is opaque enough, or the budget is below 100 faces.
    """
    if resolution < 16:
        raise InputError(f"--resolution {resolution} is too coarse for any shape: give 16 or more.")
    if max_faces is not None and max_faces < 100:
        raise InputError(f"--max-faces {max_faces} is too small for any shape: give 100 or more, or leave it out.")
    solid = ndimage.gaussian_filter(opacity_grid(field, resolution, advance), GRID_BLUR, mode="constant")
    if not (solid > SURFACE_ALPHA).any():
        raise InputError(
            f"the field is empty: its highest opacity is {solid.max():.3f} and the surface is cut at {SURFACE_ALPHA}; "
            "train longer, or check the input video's foreground."
        )
    vertices, faces = _marching_cubes(_without_cavities(solid), *_box(field))
    vertices, faces, dropped = _without_floaters(vertices, faces)
    if max_faces is not None and len(faces) > max_faces:
        vertices, faces = _decimated(vertices, faces, max_faces)
    return CanonicalMesh(vertices.astype(np.float32), _wound_outward(vertices, faces).astype(np.int32), dropped)


def _without_cavities(solid: Float[np.ndarray, "r r r"]) -> Float[np.ndarray, "r r r"]:
    """Fill hollows that no path from outside reaches: supervision never sees them, and they would cost faces."""
    inside = ndimage.binary_fill_holes(solid > SURFACE_ALPHA)
    return np.where(inside, np.maximum(solid, SURFACE_ALPHA + 1e-3), solid)


def _marching_cubes(solid: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Surface in world coordinates; an empty border closes shapes that touch the box."""
    spacing = (high - low) / (np.array(solid.shape) - 1)
    padded = np.pad(solid, 1)
    vertices, faces, _, _ = marching_cubes(padded, level=SURFACE_ALPHA, spacing=tuple(spacing))
    return np.clip(vertices + low - spacing, low, high), faces


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

    x = solver.broyden(start, time)
    from_neighbours = lambda: _neighbours_say(solver, x, start, error(x) <= SOLVED, graph)  # noqa: E731
    for retry in (lambda: x, from_neighbours):
        left = np.flatnonzero(error(x) > SOLVED)
        if not len(left):
            return x, error(x), np.zeros(len(x), dtype=bool)
        again = x.copy()
        again[left] = solver.newton(retry(), time, left)
        x = np.where((error(again) < error(x))[:, None], again, x)
    known = error(x) <= SOLVED
    x = _neighbours_say(solver, x, start, known, graph)
    return x, error(x), ~known


def _neighbours_say(
    solver: _Inverse, x: np.ndarray, start: np.ndarray, known: np.ndarray, graph: sparse.csr_matrix
) -> np.ndarray:
    """x with every unknown vertex moved to where its known neighbours' displacements would carry it."""
    return solver.targets + _filled_smoothly(x - solver.targets, known, graph, start - solver.targets)


# ------------------------------------------------------------------------------------------------------- colours


def surface_colors(
    field: AnimatedField, mesh: CanonicalMesh, depth: float = 0.03, samples: int = 12
) -> Int[np.ndarray, "n 3"]:
    """uint8 sRGB per vertex: what a ray entering along the inward normal sees, composited over `depth` world units.

    The colour at the vertex itself is the outermost and least supervised one; the views constrained the composite.
    """
    normals = vertex_normals(mesh.vertices, mesh.faces)
    offsets = np.linspace(-depth / 4, depth, samples)
    step = float(offsets[1] - offsets[0])
    device = _device_of(field)
    total, transmitted = np.zeros((len(mesh.vertices), 3)), np.ones((len(mesh.vertices), 1))
    for index, offset in enumerate(offsets):
        points = np.clip(mesh.vertices - offset * normals, *_box(field))
        alpha = _opacity(_evaluate(field.canonical_density, device, points), step)[:, None]
        alpha = np.ones_like(alpha) if index == samples - 1 else alpha  # what is left belongs to the deepest sample
        total += transmitted * alpha * _evaluate(field.canonical_color, device, points)
        transmitted = transmitted * (1 - alpha)
    return np.round(np.clip(total, 0, 1) * 255).astype(np.uint8)


def animate(mesh: CanonicalMesh, tracks: Tracks, colors: Int[np.ndarray, "n 3"], fps: float) -> AnimatedMesh:
    """Put the pieces together; normals are computed anew on every frame."""
    normals = np.stack([vertex_normals(frame, mesh.faces) for frame in tracks.positions])
    return AnimatedMesh(tracks.positions, mesh.faces, colors, normals, fps)
