"""A crop that follows an object on its way through the picture, and the way back for each frame."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from sv4d_ns.utils.errors import InputError
from sv4d_ns.video.crop import FRAME_RATIO, VISIBLE_ALPHA, Framing, check_ratio, union_box
from sv4d_ns.video.reader import Region

SMOOTHING = 1.5
"""Standard deviation, in frames, of the smoothing of the square's way: the box around a walking object jumps with every
step, its way through the picture does not (own choice)."""

_PER_FRAME = ("center_x", "center_y", "side")


@dataclass(frozen=True)
class StabilisedFraming:
    """One square for each frame, all of one side: the object keeps its size, and its place up to its own motion.

    The travel that is taken out of the pictures this way is what `ns-export mesh --root-motion restore` gives back.
    """

    squares: tuple[Framing, ...]

    @property
    def size(self) -> int:
        """Side of the crops in their own pixels."""
        return self.squares[0].size

    def apply(self, frames: UInt8[np.ndarray, "t h w 4"]) -> UInt8[np.ndarray, "t size size 4"]:
        """Cut each frame's square out of it, as `Framing.apply` does."""
        return np.concatenate(
            [square.apply(frame[None]) for square, frame in zip(self.squares, frames, strict=True)], axis=0
        )

    def in_source(self, region: Region) -> "StabilisedFraming":
        """The same squares in the pixels of the source, for a clip that shows a region of it."""
        return StabilisedFraming(tuple(square.in_source(region) for square in self.squares))

    def to_dict(self) -> dict[str, Any]:
        """`Framing.to_dict` with a list, one entry for each frame, of what changes; `from_dict` is its inverse."""
        rows = [square.to_dict() for square in self.squares]
        return {**rows[0], **{name: [row[name] for row in rows] for name in _PER_FRAME}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StabilisedFraming":
        """Read back `to_dict`; raises `InputError` for missing, unknown or unusable entries."""
        try:
            columns = [values[name] for name in _PER_FRAME]
            rows = list(zip(*columns, strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"The framing cannot be read ({error}): write it with to_dict.") from error
        if not rows:
            raise InputError("The framing has no frame: write it with to_dict.")
        return cls(tuple(Framing.from_dict({**values, **dict(zip(_PER_FRAME, row, strict=True))}) for row in rows))


def stabilised_framing(
    alpha: UInt8[np.ndarray, "t h w"], size: int, frame_ratio: float = FRAME_RATIO
) -> StabilisedFraming:
    """Squares around the smoothed way of the object's box, as large as holds it in every frame.

    Args:
        alpha: coverage by the object, 0 to 255. Where it is not visible the square goes on evenly.
        size: side of the crops in pixels.
        frame_ratio: share of the crop the object fills where it is largest, in (0, 1].

    Raises:
        InputError: nothing is visible, or the ratio is out of range.
    """
    check_ratio(frame_ratio)
    visible = alpha >= VISIBLE_ALPHA
    union_box(visible)  # says so where nothing is visible
    seen = np.flatnonzero(visible.any(axis=(1, 2)))
    boxes = np.array([union_box(visible[index][None]) for index in seen], float)
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    way = np.stack([np.interp(np.arange(len(alpha)), seen, middles[:, axis]) for axis in (0, 1)], axis=-1)
    way = _smoothed(way)
    half = max(np.abs(boxes[:, :2] - way[seen]).max(), np.abs(boxes[:, 2:] - way[seen]).max())
    height, width = alpha.shape[1:]
    side = float(2 * half / frame_ratio)
    return StabilisedFraming(tuple(Framing(float(x), float(y), side, width, height, size) for x, y in way))


def _smoothed(way: Float[np.ndarray, "t 2"]) -> Float[np.ndarray, "t 2"]:
    """Gaussian smoothing of how the way departs from a straight one, which therefore stays as it is."""
    straight = np.linspace(way[0], way[-1], len(way))
    return straight + ndimage.gaussian_filter1d(way - straight, SMOOTHING, axis=0, mode="nearest")
