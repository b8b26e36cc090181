"""The moving mesh drawn onto the film: at the input camera its outline is the video's, in every frame.

A volume's silhouette is a blend along each ray; a surface cut out of it has its outline somewhere in that blend, and
follows a deformation that is right to a pixel or two. The input video says where the outline is. Every frame is
registered to it in the picture plane: outline points are drawn to the video's outline along its normal, the rest of the
skin follows as a membrane (iterated closest points as in Besl & McKay 1992, non-rigid as in Amberg et al. 2007). Depths
along the camera's axis are left alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import splu
from scipy.spatial import cKDTree
from skimage.measure import find_contours

from sv4d_ns.export.colour.baking import Picture
from sv4d_ns.export.colour.raster import Coverage, rasterise
from sv4d_ns.export.surface.extraction import vertex_graph
from sv4d_ns.export.surface.registration import factorised, nearest_alike
from sv4d_ns.geometry.rays import project_array
from sv4d_ns.utils.images import luminance
from sv4d_ns.utils.split import results_of

RASTER = 512
"""Pixels along the side of the rasters the mesh's outline is read from."""
ROUNDS = ((3.0, 0.1), (1.0, 0.08), (0.3, 0.06), (0.1, 0.05), (0.1, 0.03), (0.1, 0.015))
"""(weight of the membrane, longest pull as a share of the picture's width), from stiff and far to soft and near. That
soft rounds reach far gives thin legs their length: 0.2 to 1.1 dB at the input camera on four runs."""
SLACK = 0.5 / RASTER
"""Pulls shorter than this share of the picture's width are the rasters' own noise. Before the last round they are left
out: what moves outward becomes the outline, so in many soft rounds noise would widen the skin."""
ANCHOR = 1e-4
"""Pull of every vertex towards where it is, so that parts without outline stay."""


@dataclass(frozen=True, eq=False)
class Outline:
    """k points along a silhouette."""

    points: Float[np.ndarray, "k 2"]
    """Shares of the picture's width, x right, y down."""
    normals: Float[np.ndarray, "k 2"]
    """Unit length, out of the object."""


@dataclass(frozen=True, eq=False)
class Pulls:
    """m places of a surface and where they are to go in the picture."""

    face: Int[np.ndarray, " m"]
    barycentric: Float[np.ndarray, "m 3"]
    shift: Float[np.ndarray, "m 2"]
    """Shares of the picture's width."""
    weight: Float[np.ndarray, " m"]


def film_outline(picture: Picture) -> Outline:
    """Where a picture's alpha passes one half, without what lies on its edge (the object goes on there)."""
    size = len(picture.rgba)
    alpha = np.pad(picture.rgba[..., 3] / 255.0, 1)
    found = find_contours(alpha, 0.5)
    if not found:
        return Outline(np.zeros((0, 2)), np.zeros((0, 2)))
    rows = np.concatenate(found)
    normals = _outward(alpha, rows, 1.0)
    points = rows[:, ::-1] - 0.5  # padded pixel i has its centre at i - 0.5 in the picture
    inside = ((points > 1) & (points < size - 1)).all(axis=1)
    return Outline(points[inside] / size, normals[inside])


def mesh_outline(coverage: Coverage) -> tuple[Outline, Int[np.ndarray, " k"], Float[np.ndarray, "k 3"]]:
    """The border of what a raster shows, and the face and barycentric coordinates behind each of its points."""
    covered = coverage.face >= 0
    size = len(covered)
    rim = covered & ~ndimage.binary_erosion(covered, border_value=1)
    rows = np.argwhere(rim)
    normals = _outward(covered.astype(np.float64), rows.astype(np.float64), 2.0)
    # the border runs half a pixel outside the centres of the last covered pixels
    points = rows[:, ::-1] + 0.5 + 0.5 * normals
    return Outline(points / size, normals), coverage.face[rim], coverage.barycentric[rim]


def _outward(alpha: np.ndarray, rows: np.ndarray, blur: float) -> Float[np.ndarray, "k 2"]:
    """Unit normals (x, y) at (row, column) places: down the slope of the blurred coverage."""
    if not len(rows):
        return np.zeros((0, 2))
    # only what the blur brings to these places: a picture is mostly empty
    margin = int(4 * blur) + 2
    low = np.maximum(rows.min(axis=0).astype(int) - margin, 0)
    high = np.minimum(rows.max(axis=0).astype(int) + margin + 2, alpha.shape)
    smooth = ndimage.gaussian_filter(alpha[low[0] : high[0], low[1] : high[1]], blur)
    places = (rows - low).T
    slope = [-ndimage.map_coordinates(part, places, order=1, mode="nearest") for part in np.gradient(smooth)]
    normals = np.stack(slope[::-1], axis=-1)
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)


def outline_pulls(coverage: Coverage, film: Outline, reach: float) -> Pulls:
    """What draws the mesh's outline onto the film's: each point of either to the nearest of the other that faces the
    same way, no farther than `reach` (a share of the picture's width), along the film's normal."""
    mesh, face, barycentric = mesh_outline(coverage)
    if not len(mesh.points) or not len(film.points):
        return Pulls(np.zeros(0, np.int64), np.zeros((0, 3)), np.zeros((0, 2)), np.zeros(0))
    of_mesh, of_film = _pairs(mesh, film, reach)
    back_film, back_mesh = _pairs(film, mesh, reach)
    which, onto = np.r_[of_mesh, back_mesh], np.r_[of_film, back_film]
    normal = film.normals[onto]
    along = ((film.points[onto] - mesh.points[which]) * normal).sum(axis=-1, keepdims=True)
    # either direction counts as one whole outline, however densely it is sampled
    weight = np.r_[np.full(len(of_mesh), 1.0), np.full(len(back_mesh), len(mesh.points) / len(film.points))]
    return Pulls(face[which], barycentric[which], along * normal, weight)


def _with_slack(pulls: Pulls) -> Pulls:
    length = np.linalg.norm(pulls.shift, axis=-1, keepdims=True)
    return replace(pulls, shift=pulls.shift * np.maximum(1 - SLACK / np.maximum(length, SLACK), 0))


def _pairs(ours: Outline, others: Outline, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of points of `ours` and of their nearest agreeing points of `others`."""
    found, nearest = nearest_alike(cKDTree(others.points), others.normals, ours.points, ours.normals, reach)
    which = np.flatnonzero(found)
    return which, nearest[which]


class Membrane:
    """A skin whose vertices are moved by pulls at some of its places, and hold together.

    A pull ties the corners of one face, which are neighbours: every system has the pattern of the mesh's Laplacian, so
    that the order it is factorised in and the places of its entries are found once.
    """

    def __init__(self, faces: Int[np.ndarray, "f 3"], count: int):
        system = (csgraph.laplacian(vertex_graph(faces, count)) + sparse.identity(count)).tocsc()
        order = np.argsort(factorised(system).perm_c)
        self.rank = np.empty(count, np.int64)
        self.rank[order] = np.arange(count)
        self.corners = self.rank[faces]
        self.laplacian = system[order][:, order].tocsc()
        self.laplacian.sort_indices()
        entry = self.laplacian.copy()
        entry.data = np.arange(entry.nnz, dtype=np.float64)
        pairs = [entry[self.corners[:, i], self.corners[:, j]] for i in range(3) for j in range(3)]
        self.entries = np.stack([np.asarray(pair).ravel() for pair in pairs], axis=-1).astype(np.int64)
        self.diagonal = entry.diagonal().astype(np.int64)
        self.laplacian.data[self.diagonal] -= 1

    def moved(
        self, x: Float[np.ndarray, "n 3"], c2w: Float[np.ndarray, "4 4"], focal: float, pulls: Pulls, stiffness: float
    ) -> Float[np.ndarray, "n 3"]:
        """Positions after one least-squares step: pulls against stretching, in the picture plane of a camera.

        Args:
            focal: in picture widths.
        """
        count, corners, share = len(x), self.corners[pulls.face], pulls.barycentric.astype(np.float64)
        depth = np.empty(count)
        depth[self.rank] = (c2w[:3, 3] - x) @ c2w[:3, 2]
        world = pulls.shift * (np.einsum("mj,mj->m", share, depth[corners]) / focal)[:, None]
        weighted = share * pulls.weight[:, None]
        system = self.laplacian.copy()
        system.data *= stiffness
        system.data[self.diagonal] += ANCHOR
        ties = (weighted[:, :, None] * share[:, None, :]).ravel()
        system.data += np.bincount(self.entries[pulls.face].ravel(), ties, minlength=system.nnz)
        pull = [np.bincount(corners.ravel(), (weighted * world[:, [i]]).ravel(), minlength=count) for i in range(2)]
        solver = splu(system, permc_spec="NATURAL", options={"SymmetricMode": True})
        step = solver.solve(np.stack(pull, axis=-1))[self.rank]
        return x + step[:, :1] * c2w[:3, 0] - step[:, 1:] * c2w[:3, 1]


def fitted_to_outlines(
    positions: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    film: Sequence[Picture],
    advance: Callable[[], None] | None = None,
) -> Float[np.ndarray, "t n 3"]:
    """Positions whose outline at the film's camera is the film's, frame by frame.

    Args:
        film: one picture per frame, all of one camera.
        advance: called once per frame.
    """

    def pulls(x: np.ndarray, picture: Picture, outline: Outline, reach: float, last: bool) -> Pulls:
        found = outline_pulls(drawn(x, faces, picture, RASTER), outline, reach)
        return found if last else _with_slack(found)

    return _fitted(positions, faces, film, ROUNDS, pulls, advance)


def _fitted(
    positions: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    film: Sequence[Picture],
    rounds: Sequence[tuple[float, float]],
    pulls_of: Callable[[np.ndarray, Picture, Outline, float, bool], Pulls],
    advance: Callable[[], None] | None,
) -> Float[np.ndarray, "t n 3"]:
    """Positions moved as a membrane, in rounds of (its weight, longest pull) for each frame.

    Args:
        pulls_of: from positions, a frame, its outline, the longest pull and whether this is the last round.
    """
    membrane = Membrane(faces, positions.shape[1])
    result = np.empty_like(positions)

    def fit(picture: Picture) -> None:
        x, outline = positions[picture.frame].astype(np.float64), film_outline(picture)
        for number, (stiffness, reach) in enumerate(rounds, start=1):
            pulls = pulls_of(x, picture, outline, reach, number == len(rounds))
            if len(pulls.face):
                x = membrane.moved(x, picture.c2w, picture.fov_focal, pulls, stiffness)
        result[picture.frame] = x
        if advance is not None:
            advance()

    results_of([partial(fit, picture) for picture in film])
    return result


def drawn(x: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"], picture: Picture, size: int) -> Coverage:
    """Where a mesh is seen at a picture's camera."""
    return rasterise(*project_array(x, picture.c2w, picture.fov_focal * size, size), faces, size)


# ------------------------------------------------------------------------------------------------------ inside them

TEXTURE_ROUNDS = ((2.0, 0.02), (0.3, 0.012))
"""(weight of the membrane, longest pull) of the rounds in which what is drawn on the surface is registered too."""
TEXTURE_WEIGHT = 0.3
"""What a pixel of optical flow counts against a point of the outline where the picture has structure."""
INSIDE = 3
"""Pixels from either outline nearer than which optical flow is not believed."""
STRUCTURE = 0.05
"""Slope of the luminance, in [0, 1] per pixel, from which a pixel's flow counts fully."""


def texture_pulls(
    coverage: Coverage, shades: Float[np.ndarray, " n"], faces: Int[np.ndarray, "f 3"], film: Picture, reach: float
) -> Pulls:
    """What draws the surface's own picture onto the film: the optical flow from the one to the other.

    Args:
        coverage: of the mesh at the film's camera and size.
        shades: luminance of the vertices in [0, 1].
    """
    from sv4d_ns.fitting.scene_flow import optical_flow

    covered, inside = coverage.face >= 0, film.rgba[..., 3] >= 128
    painted = np.zeros(covered.shape)
    painted[covered] = np.einsum("kj,kj->k", coverage.barycentric[covered], shades[faces[coverage.face[covered]]])
    shown = luminance(film.rgba[..., :3] / 255.0)
    flow = optical_flow(*(_on_black(value, alpha) for value, alpha in ((painted, covered), (shown, inside))))
    slope = np.hypot(*np.gradient(ndimage.gaussian_filter(shown, 1.0)))
    both = ndimage.binary_erosion(covered & inside, iterations=INSIDE) & (np.linalg.norm(flow, axis=-1) < reach)
    weight = TEXTURE_WEIGHT * np.clip(slope[both] / STRUCTURE, 0.02, 1)
    return Pulls(coverage.face[both], coverage.barycentric[both], flow[both].astype(np.float64), weight)


def _on_black(value: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """8-bit grey in which the darkest object stands out from the background."""
    return np.round(255 * np.where(alpha, 0.25 + 0.75 * np.clip(value, 0, 1), 0)).astype(np.uint8)


def fitted_to_film(
    positions: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    film: Sequence[Picture],
    colors: Float[np.ndarray, "n 3"],
    advance: Callable[[], None] | None = None,
) -> Float[np.ndarray, "t n 3"]:
    """Positions at which outline and colours of the surface lie where the film has them, frame by frame.

    Args:
        colors: sRGB in [0, 1] of the vertices, as all frames together show them.
        advance: called once per frame.
    """
    shades = luminance(colors)

    def pulls(x: np.ndarray, picture: Picture, outline: Outline, reach: float, last: bool) -> Pulls:
        around = outline_pulls(drawn(x, faces, picture, RASTER), outline, reach)
        inside = texture_pulls(drawn(x, faces, picture, len(picture.rgba)), shades, faces, picture, reach)
        return _joined(around, inside)

    return _fitted(positions, faces, film, TEXTURE_ROUNDS, pulls, advance)


def _joined(*parts: Pulls) -> Pulls:
    names = ("face", "barycentric", "shift", "weight")
    return Pulls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
