"""Where the camera stands, how far apart the frames are, and what moves: pure numpy, no package of its own.

Blender's interpreter imports this file by itself, so that both renderers decide by the same code.

Sources: SV4D (arXiv 2407.17470), section on ObjaverseDy: the largest side of the bounding box is 1, the distance grows
until the object fits in all frames, the frame step grows until neighbouring key frames differ enough. The paper gives
no numbers; those below are our own.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

BASE_DISTANCE = 1.6
"""Distance from which the search starts, in units of the object's largest side."""
DISTANCE_GROWTH = 1.03
LARGEST_DISTANCE = 12.0
FIT_MARGIN = 0.95
"""Share of the half picture inside which every point must fall."""


def bounding_box(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre and largest side of the box around points [..., 3] of all frames.

    Raises:
        ValueError: when the points are not finite or all the same.
    """
    flat = points.reshape(-1, 3)
    if not len(flat) or not np.isfinite(flat).all():
        raise ValueError("it has no geometry, or coordinates that are not finite")
    low, high = flat.min(axis=0), flat.max(axis=0)
    largest = float((high - low).max())
    if largest <= 0:
        raise ValueError("its geometry has no extent")
    return (low + high) / 2, largest


def fitting_distance(points: np.ndarray, unit_cameras: np.ndarray, fov_deg: float) -> float:
    """The smallest tried distance at which every point is in every picture.

    Args:
        points: normalised points of all frames, [n, 3]; the object's box is centred and its largest side is 1.
        unit_cameras: OpenGL camera-to-world matrices [v, 4, 4] of cameras at distance 1 that look at the origin.
        fov_deg: field of view over the square picture.
    """
    tangent = np.tan(np.deg2rad(fov_deg) / 2) * FIT_MARGIN
    seen = np.einsum("vji,nj->vni", unit_cameras[:, :3, :3], points)
    across, toward = np.abs(seen[..., :2]).max(axis=-1), seen[..., 2]
    distance = BASE_DISTANCE
    while (across > tangent * (distance - toward)).any() and distance < LARGEST_DISTANCE:
        distance *= DISTANCE_GROWTH
    return distance


def key_frame_step(
    pictures: Callable[[float], np.ndarray], first: float, last: float, frames: int, smallest: float, enough: float
) -> tuple[float, float]:
    """(frame step, motion): the smallest step whose neighbouring key frames differ enough, or the largest possible.

    Args:
        pictures: low-resolution RGBA pictures of the object at a moment, any shape, values in [0, 1].
        first, last: the animation's range.
        frames: T, how many key frames are needed.
        smallest: step that the search starts from.
        enough: mean absolute difference of neighbouring key frames over the object's pixels that counts as motion.

    Returns:
        The step, and the largest difference between neighbouring key frames at that step.
    """
    largest = (last - first) / max(frames - 1, 1)
    step = min(smallest, largest)
    cache: dict[float, np.ndarray] = {}

    def picture(moment: float) -> np.ndarray:
        key = round(moment, 6)
        if key not in cache:
            cache[key] = pictures(moment)
        return cache[key]

    while True:
        shown = [picture(first + step * index) for index in range(frames)]
        differences = neighbour_differences(shown)
        if differences.mean() >= enough or step >= largest - 1e-9:
            return step, float(differences.max())
        step = min(step * 2, largest)


def neighbour_differences(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Mean absolute difference of each pair of neighbouring RGBA pictures, over pixels where either shows the object.

    Colours count multiplied by alpha; pictures are [..., h, w, 4] in [0, 1].
    """
    values = []
    for first, second in pairwise(pictures):
        a, b = (np.concatenate([p[..., :3] * p[..., 3:], p[..., 3:]], axis=-1) for p in (first, second))
        pixels = np.maximum(a[..., 3], b[..., 3]).sum()
        values.append(np.abs(a - b).mean(axis=-1).sum() / max(pixels, 1.0))
    return np.array(values) if values else np.zeros(1)


def rigid_share(points: np.ndarray) -> float:
    """How much of a motion is one rigid motion of the whole object (a turntable, a rotating camera): 1 all, 0 none.

    1 - RMS residual after the best rotation and translation onto frame 0 (Kabsch 1976) / RMS displacement.

    Args:
        points: the same points at all frames, [t, n, 3].
    """
    start = points[0] - points[0].mean(axis=0)
    moved, left = 0.0, 0.0
    for frame in points[1:]:
        moved += float(((frame - points[0]) ** 2).sum())
        centred = frame - frame.mean(axis=0)
        u, _, vt = np.linalg.svd(start.T @ centred)
        sign = np.sign(np.linalg.det(u @ vt)) or 1.0
        rotation = u @ np.diag([1.0, 1.0, sign]) @ vt
        left += float(((centred - start @ rotation) ** 2).sum())
    return 0.0 if moved <= 1e-12 else 1.0 - (left / moved) ** 0.5


def drift(points: np.ndarray) -> float:
    """Largest distance of the points' centre from where it is at frame 0, in the points' units; points [t, n, 3]."""
    centres = points.mean(axis=1)
    return float(np.linalg.norm(centres - centres[0], axis=-1).max())


def size_change(points: np.ndarray) -> float:
    """Smallest over largest diagonal of the box during the motion; small where geometry vanishes. points [t, n, 3]."""
    diagonal = np.linalg.norm(points.max(axis=1) - points.min(axis=1), axis=-1)
    return float(diagonal.min() / max(diagonal.max(), 1e-12))
