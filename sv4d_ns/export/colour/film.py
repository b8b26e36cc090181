"""Colours from the film: what the input camera saw of each place of the surface, over all frames.

The frames that show a place best decide; a frame that contradicts them (a reflection, a slip of the motion, a limb in
front) has no say, and differences of exposure between frames are taken out. Where the camera never looked, another
layer of colours goes on, brought to the film's level along the border and fading back to its own away from it, so that
no seam shows (a screened Poisson equation on the mesh, as Bhat et al. 2008 for pictures).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

from sv4d_ns.export.colour.baking import DepthMaps, Picture, SurfacePoints, gather
from sv4d_ns.export.surface.extraction import vertex_graph
from sv4d_ns.export.surface.registration import factorised
from sv4d_ns.utils.compiled import njit
from sv4d_ns.utils.images import luminance
from sv4d_ns.utils.split import results_of

CONTENDERS = 0.3
"""Share of the best picture's weight from which another picture of the same place counts."""
TOLERANCE = 0.1
"""Difference from the median colour, sRGB in [0, 1], that lets a picture's weight fall to 1/e."""
LEAST_SHARP = 0.25
"""What the most blurred frame counts against the sharpest."""
GAIN_RANGE = (0.75, 1.33)
"""Exposures of a frame against the others, per channel, that are believed."""
MEASURABLE = (0.08, 0.95)
"""sRGB values between which a ratio of colours measures exposure."""
SEEN = 0.02
"""Weight from which the film's colour of a vertex is compared with the other layer's."""
FADE = 0.1
"""Screening of the correction beside what the film shows: it has fallen to 1/e after about three vertices. What
differs there is mostly detail that ends (an eye), not light that goes on: carried on over ten vertices it costs the far
sides of runs on true views 0.1 to 1.2 dB."""
SYMMETRIC = 0.02
"""Mean distance of a shape to its mirror image, as a share of its box's diagonal, up to which it is symmetric."""
MIRROR_ANGLES = 36
"""Upright planes tried."""


def sharp_trust(film: Sequence[Picture]) -> list[Picture]:
    """The frames with their trust lowered by their blur: the mean slope of their luminance inside the object."""
    slopes = []
    for picture in film:
        inside = ndimage.binary_erosion(picture.rgba[..., 3] >= 128, iterations=2)
        slope = np.hypot(*np.gradient(luminance(picture.rgba[..., :3].astype(np.float32))))
        slopes.append(float(slope[inside].mean()) if inside.any() else 0.0)
    best = max(max(slopes, default=0.0), 1e-9)
    return [
        replace(picture, trust=picture.trust * max((slope / best) ** 2, LEAST_SHARP))
        for picture, slope in zip(film, slopes, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class FilmColors:
    """The film over one moving mesh, ready to be asked for the colour of any of its places."""

    film: Sequence[Picture]
    positions: Float[np.ndarray, "t n 3"]
    normals: Float[np.ndarray, "t n 3"]
    faces: Int[np.ndarray, "f 3"]
    gains: Float[np.ndarray, "p 3"]
    """What each picture's colours are multiplied by."""
    depths: DepthMaps
    at_corners: tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, " n"]]
    """`at` of the vertices."""

    def at(self, points: SurfacePoints) -> tuple[Float[np.ndarray, "k 3"], Float[np.ndarray, " k"]]:
        """sRGB colour in [0, 1] and weight of each point; 0 where the film never shows it.

        The weight is the best picture's trust times the fourth power of the cosine it sees the point under.
        """
        return self.agreed(self.looks(points))

    def looks(self, points: SurfacePoints) -> tuple[UInt8[np.ndarray, "p k 3"], Float[np.ndarray, "p k"]]:
        """What every frame by itself shows at the points (sRGB), and its weight there."""
        return _each(self.film, points, self.positions, self.normals, self.faces, self.depths)

    def agreed(
        self, looks: tuple[UInt8[np.ndarray, "p k 3"], Float[np.ndarray, "p k"]]
    ) -> tuple[Float[np.ndarray, "k 3"], Float[np.ndarray, " k"]]:
        """`at` of points whose `looks` are known."""
        return _agreed(*looks, self.gains.astype(np.float32))

    def moments(
        self,
        looks: tuple[UInt8[np.ndarray, "p k 3"], Float[np.ndarray, "p k"]],
        centres: Sequence[float],
        reach: float,
    ) -> Iterator[tuple[Float[np.ndarray, "k 3"], Float[np.ndarray, " k"]]]:
        """`agreed` as the frames around each of some moments (frame numbers) show it, in their own light: a frame's
        weight falls to 1/e at `reach` frames from the moment."""
        colors, weights = looks
        frames = np.array([picture.frame for picture in self.film])
        for centre in centres:
            near = np.exp(-(((frames - centre) / reach) ** 2)).astype(np.float32)
            yield _agreed(colors, weights * near[:, None], np.ones_like(self.gains, np.float32))


def film_colors(
    film: Sequence[Picture],
    positions: Float[np.ndarray, "t n 3"],
    normals: Float[np.ndarray, "t n 3"],
    faces: Int[np.ndarray, "f 3"],
    corners: SurfacePoints,
    depths: DepthMaps | None = None,
) -> FilmColors:
    """Measure the frames' exposures at the mesh's vertices (`corners`); `depths` are that mesh's."""
    film, depths = sharp_trust(film), depths or DepthMaps(positions, faces)
    colors, weights = _each(film, corners, positions, normals, faces, depths)
    gains = np.ones((len(film), 3), np.float32)
    for _ in range(2):
        agreed, weight = _agreed(colors, weights, gains)
        for number in range(len(film)):
            gains[number] = _gain(agreed, colors[number] / 255, (weights[number] > 0) & (weight > 0))
    return FilmColors(film, positions, normals, faces, gains, depths, _agreed(colors, weights, gains))


def _gain(agreed: np.ndarray, seen: np.ndarray, both: Bool[np.ndarray, " k"]) -> Float[np.ndarray, " 3"]:
    """Median ratio of the agreed colours to a picture's, per channel."""
    result = np.ones(3)
    low, high = MEASURABLE
    for channel in range(3):
        a, b = agreed[both, channel], seen[both, channel]
        usable = (a > low) & (a < high) & (b > low) & (b < high)
        if usable.sum() >= 50:
            result[channel] = np.clip(np.median(a[usable] / b[usable]), *GAIN_RANGE)
    return result


def _each(
    pictures: Sequence[Picture],
    points: SurfacePoints,
    positions: np.ndarray,
    normals: np.ndarray,
    faces: np.ndarray,
    depths: DepthMaps,
) -> tuple[UInt8[np.ndarray, "p k 3"], Float[np.ndarray, "p k"]]:
    """What every picture by itself shows at the points, and its weight there (float32)."""
    count = len(points.face)
    colors, weights = np.zeros((len(pictures), count, 3), np.uint8), np.zeros((len(pictures), count), np.float32)

    def look(number: int) -> None:
        color, weight = gather([pictures[number]], points, positions, normals, faces, None, depths)
        colors[number], weights[number] = np.round(color.clip(0, 1) * 255), weight

    results_of([partial(look, number) for number in range(len(pictures))])
    return colors, weights


@njit(cache=True, nogil=True)
def _agreed(colors, weights, gains):  # type: ignore[no-untyped-def]
    """The weighted mean of the contenders near their weighted median, and the best weight."""
    pictures, count = weights.shape
    result, best = np.zeros((count, 3)), np.zeros(count)
    value, share = np.empty((pictures, 3)), np.empty(pictures)
    middle, order = np.empty(3), np.empty(pictures, np.int64)
    for k in range(count):
        highest = 0.0
        for p in range(pictures):
            highest = max(highest, weights[p, k])
        if highest <= 0.0:
            continue
        used, total = 0, 0.0
        for p in range(pictures):
            if weights[p, k] < CONTENDERS * highest:
                continue
            share[used] = weights[p, k]
            total += weights[p, k]
            for i in range(3):
                value[used, i] = min(colors[p, k, i] / 255.0 * gains[p, i], 1.0)
            used += 1
        for i in range(3):
            for j in range(used):  # by insertion: compiling numpy's sort takes ten seconds
                place = j
                while place > 0 and value[order[place - 1], i] > value[j, i]:
                    order[place] = order[place - 1]
                    place -= 1
                order[place] = j
            passed = 0.0
            for j in range(used):
                passed += share[order[j]]
                middle[i] = value[order[j], i]
                if passed >= 0.5 * total:
                    break
        total = 0.0
        for j in range(used):
            far = 0.0
            for i in range(3):
                far += (value[j, i] - middle[i]) ** 2
            w = share[j] * np.exp(-far / TOLERANCE**2) + 1e-6 * share[j]
            total += w
            for i in range(3):
                result[k, i] += w * value[j, i]
        for i in range(3):
            result[k, i] /= total
        best[k] = highest
    return result, best


# ------------------------------------------------------------------------------------------------- the other layer


def levelled(
    film: Float[np.ndarray, "n 3"],
    weight: Float[np.ndarray, " n"],
    under: Float[np.ndarray, "n 3"],
    faces: Int[np.ndarray, "f 3"],
) -> Float[np.ndarray, "n 3"]:
    """What to add to the other layer at each vertex so that it meets the film's colours where they end.

    Args:
        weight: of the film at the vertices.
        under: the other layer's vertex colours.
    """
    known = weight > SEEN
    correction = np.where(known[:, None], film - under, 0.0)
    free = np.flatnonzero(~known)
    if not known.any() or not len(free):
        return correction
    laplacian = csgraph.laplacian(vertex_graph(faces, len(film))).tocsr()[free]
    system = laplacian[:, free] + FADE * sparse.identity(len(free))
    correction[free] = factorised(system).solve(-laplacian[:, known] @ correction[known])
    return correction


def mirrored(
    vertices: Float[np.ndarray, "n 3"],
    color: Float[np.ndarray, "n 3"],
    known: Bool[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, "n 3"], Bool[np.ndarray, " n"]]:
    """Colours with unknown vertices taking those of their mirror image, where the shape is its own mirror image.

    The plane is the best upright one through the shape's middle. Returns the colours and which are known now.
    """
    if known.all() or not known.any():
        return color, known
    middle = vertices.mean(axis=0)
    diagonal = float(np.linalg.norm(np.ptp(vertices, axis=0)))
    some = vertices[:: max(1, len(vertices) // 1500)]
    tree = cKDTree(vertices)
    angles = np.arange(MIRROR_ANGLES) * np.pi / MIRROR_ANGLES
    planes = [np.array([np.cos(angle), np.sin(angle), 0.0]) for angle in angles]
    apart = [tree.query(_reflected(some, middle, plane))[0].mean() / diagonal for plane in planes]
    if min(apart) > SYMMETRIC:
        return color, known
    unknown = np.flatnonzero(~known)
    distance, twin = tree.query(_reflected(vertices[unknown], middle, planes[int(np.argmin(apart))]))
    good = known[twin] & (distance < SYMMETRIC * diagonal)
    color, known = color.copy(), known.copy()
    color[unknown[good]] = color[twin[good]]
    known[unknown[good]] = True
    return color, known


def _reflected(points: np.ndarray, middle: np.ndarray, normal: np.ndarray) -> np.ndarray:
    return points - 2 * ((points - middle) @ normal)[:, None] * normal
