"""What may spoil the result, told before the work begins: each finding with what to do about it.

The thresholds are our own design; they were set on the public benchmark clips (none of which is flagged) and on the
deliberately bad clips of the tests.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from sv4d_ns.video.foreground import MIN_OBJECT_SHARE, Foreground
from sv4d_ns.video.reader import Clip

SEVERAL_SHARE = 0.1
"""A second part of the object this large, of the largest part's area, counts as another object ..."""
SEVERAL_FRAMES = 0.5
"""... if it is there in so many of the frames."""
CAMERA_SHIFT = 0.02
"""Shift of the background between two frames, of the picture's longer side, that means a moving camera."""
BLUR_RATIO = 0.4
"""A frame whose edges are so much softer than the sharpest frame's is blurred by motion."""
STILL_CHANGE = 1.0
"""Mean change of the object's pixels (levels of 255) from its first frame below which nothing moves."""
LARGE_STEP = 0.35
"""Overlap (IoU) of the outlines of neighbouring frames below which the motion is too fast to follow."""
TRAVEL_SHARE = 0.45
"""An object smaller than this share of the square around its whole way travels through the picture."""
SMALL_OBJECT = 96
"""An object with fewer source pixels along its longer side gives a coarse result."""
WORK_SIZE = 256
"""Longer side of the reduced pictures in which motion is measured, pixels."""


@dataclass(frozen=True)
class Finding:
    """Something about the clip that may spoil the result."""

    name: str
    """One of the names of `CHECKS`."""
    sentence: str
    """What was seen, in which frames, and what to do."""


def examine(clip: Clip, foreground: Foreground) -> list[Finding]:
    """Everything the doctor finds, in the order of `CHECKS`."""
    case = _Case.of(clip, foreground)
    return [Finding(name, sentence) for name, check in CHECKS.items() for sentence in check(case)]


@dataclass(frozen=True)
class _Case:
    """Clip and cut-out, and both once more at the size in which motion is measured."""

    clip: Clip
    foreground: Foreground
    grey: Float[np.ndarray, "t h w"]
    """Mean level of the source pictures, reduced."""
    solid: Bool[np.ndarray, "t h w"]
    """Where the object is, reduced."""

    @classmethod
    def of(cls, clip: Clip, foreground: Foreground) -> "_Case":
        step = max(1, -(-max(clip.frames.shape[1:3]) // WORK_SIZE))
        grey = np.stack([_reduced(frame[..., :3].mean(axis=-1), step) for frame in clip.frames])
        solid = np.stack([_reduced(alpha.astype(np.float32), step) >= 128 for alpha in foreground.alpha])
        return cls(clip, foreground, grey, solid)


def _reduced(layer: Float[np.ndarray, "H W"], step: int) -> Float[np.ndarray, "h w"]:
    """Means over squares of `step` pixels; what is left over at the right and below is dropped."""
    height, width = (side // step * step for side in layer.shape)
    return layer[:height, :width].reshape(height // step, step, width // step, step).mean(axis=(1, 3))


def _border(case: _Case) -> Iterator[str]:
    solid = case.foreground.alpha >= 128
    sides = [solid[:, 0], solid[:, -1], solid[:, :, 0], solid[:, :, -1]]
    touching = np.any([side.any(axis=1) for side in sides], axis=0)
    if touching.any():
        yield (
            f"The object touches the border of the picture in {_count(touching)}: what is cut off there is missing "
            "from the result; film it with space around."
        )


def _absent(case: _Case) -> Iterator[str]:
    absent = (case.foreground.alpha >= 128).mean(axis=(1, 2)) < MIN_OBJECT_SHARE
    if absent.any():
        yield f"The object is not visible in {_count(absent)}: cut the video to where it is."


def _several(case: _Case) -> Iterator[str]:
    second = np.array([_second_share(mask) for mask in case.solid])
    many = second >= SEVERAL_SHARE
    if many.mean() >= SEVERAL_FRAMES:
        yield (
            f"There seem to be several objects in {_count(many)} (the second has {np.median(second[many]):.0%} of the "
            "largest one's area): they become one asset; crop the video to one of them if that is not meant."
        )


def _second_share(mask: Bool[np.ndarray, "h w"]) -> float:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if count < 2:
        return 0.0
    sizes = np.sort(np.bincount(labels.ravel())[1:])
    return float(sizes[-2] / sizes[-1])


def _camera(case: _Case) -> Iterator[str]:
    if case.foreground.method not in ("matting", "masks") or len(case.grey) < 2:
        return  # a plain or missing background shows no motion
    anywhere = ndimage.binary_dilation(case.solid.any(axis=0), iterations=3)
    if anywhere.mean() > 0.9:
        return
    shifts = np.array([_shift(case.grey[0], frame, ~anywhere) for frame in case.grey[1:]])
    largest = float(shifts.max()) / max(case.grey.shape[1:])
    if largest > CAMERA_SHIFT:
        yield (
            f"The camera moves (the background shifts by up to {largest:.0%} of the picture): the motion becomes part "
            "of the object's; film with the camera still, or ask for the stabilised crop "
            "(--pipeline.datamanager.crop stabilised)."
        )


def _shift(first: np.ndarray, other: np.ndarray, background: np.ndarray) -> float:
    """Pixels by which the background moved, from the phase correlation of the parts no object ever covers."""
    from skimage.registration import phase_cross_correlation

    if first[background].std() < 2:
        return 0.0  # nothing to hold on to
    found = phase_cross_correlation(first, other, reference_mask=background, moving_mask=background)
    return float(np.hypot(*found[0]))


def _blur(case: _Case) -> Iterator[str]:
    if len(case.clip.frames) < 2:
        return
    sharpness = np.array([_sharpness(frame[..., :3], frame[..., 3]) for frame in case.foreground.frames])
    blurred = (sharpness < BLUR_RATIO * sharpness.max()) & case.solid.any(axis=(1, 2))
    if blurred.any():
        yield (
            f"{_count(blurred)} are much softer than the sharpest one (motion blur or focus): they blur the texture; "
            "film with a shorter exposure, or leave them out."
        )


def _sharpness(colours: np.ndarray, alpha: np.ndarray) -> float:
    """The steepest tenth of the steps between neighbouring pixels inside the object, levels."""
    grey = colours.astype(np.float32).mean(axis=-1)
    inside = ndimage.binary_erosion(alpha >= 250, iterations=2)
    steps = np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1))[inside] / 8
    return float(np.percentile(steps, 90)) if steps.size >= 16 else 0.0


def _motion(case: _Case) -> Iterator[str]:
    if len(case.solid) < 2:
        return
    change = max(_change(case, index) for index in range(1, len(case.solid)))
    if change < STILL_CHANGE:
        yield "Almost nothing moves in the video: the result will stand still; choose a part in which the object moves."
    steps = np.array([_overlap(a, b) for a, b in zip(case.solid, case.solid[1:], strict=False)])
    fast = steps < LARGE_STEP
    if fast.any():
        yield (
            f"The object moves very far between {_count(fast, 'pairs of frames')}: its parts cannot be followed; take "
            "more frames of the same time (--pipeline.datamanager.max-frames or --pipeline.datamanager.fps), or film "
            "slower motion."
        )


def _change(case: _Case, index: int) -> float:
    """Mean difference of a frame from the first where the object is in either, levels."""
    either = case.solid[0] | case.solid[index]
    if not either.any():
        return 0.0
    colour = np.abs(case.grey[index] - case.grey[0])[either]
    outline = 255.0 * (case.solid[0] ^ case.solid[index])[either]
    return float(np.maximum(colour, outline).mean())


def _overlap(a: Bool[np.ndarray, "h w"], b: Bool[np.ndarray, "h w"]) -> float:
    """IoU of two outlines laid centre on centre: travelling through the picture is not what tears parts apart."""
    if not (a.any() and b.any()):
        return 1.0
    offset = np.round(np.subtract(ndimage.center_of_mass(a), ndimage.center_of_mass(b))).astype(int)
    moved = ndimage.shift(b.astype(np.uint8), offset, order=0) > 0
    return float((a & moved).sum() / (a | moved).sum())


def _resolution(case: _Case) -> Iterator[str]:
    union = np.any(case.foreground.alpha >= 128, axis=0)
    rows, columns = np.flatnonzero(union.any(axis=1)), np.flatnonzero(union.any(axis=0))
    side = max(np.ptp(rows), np.ptp(columns)) / case.clip.region.scale if len(rows) else 0
    if side < SMALL_OBJECT:
        yield (
            f"The object is only {side:.0f} pixels large: its details are missing from the result; film it closer or "
            "give the video in a higher resolution."
        )


def _travel(case: _Case) -> Iterator[str]:
    if not case.solid.any():
        return
    boxes = np.array([_extent(mask) for mask in case.solid if mask.any()])
    alone, together = np.ptp(boxes.reshape(-1, 2, 2), axis=1).max(), np.ptp(boxes.reshape(-1, 2), axis=0).max()
    if alone < TRAVEL_SHARE * together:
        yield (
            f"The object travels: it fills only {alone / together:.0%} of the square that holds its whole way, and is "
            "shown that small; ask for the crop that follows it (--pipeline.datamanager.crop stabilised)."
        )


def _extent(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1], rows[-1]


CHECKS: dict[str, Callable[[_Case], Iterator[str]]] = {
    "border": _border,
    "absent": _absent,
    "several objects": _several,
    "camera motion": _camera,
    "blur": _blur,
    "motion": _motion,
    "travel": _travel,
    "resolution": _resolution,
}
"""Name of a finding: how it is made; a check yields nothing where all is well."""


def _count(flags: np.ndarray, what: str = "frames") -> str:
    return f"{int(flags.sum())} of {len(flags)} {what} (first: {int(flags.argmax())})"
