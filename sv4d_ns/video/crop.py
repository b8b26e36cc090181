"""The square crop around the object, and the way back to the source video."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sv4d_ns.utils.errors import InputError
from sv4d_ns.video.reader import Region

FRAME_RATIO = 0.9
"""Share of the crop that the longer side of the object fills: the default of the released SV4D 2.0 script."""

FRAMED_OFF_CENTRE = 0.085
"""Largest way of the object's box over all frames from the middle of a film that frames it, as a share of the side."""
FRAMED_LEAST, FRAMED_MOST = 0.55, 0.97
"""Least and largest share of such a film's side that the furthest edge of the box reaches, counted from the middle.
Within these bounds lay all but one of 150 random inputs of held-out assets, as the bundled model is trained on them."""

VISIBLE_ALPHA = 26
"""Alpha (of 255) from which a pixel counts for the bounding box; a tenth, so that matting noise does not."""


class CropRule(str, Enum):
    """Which square of the video the model is shown.

    AUTO: the whole picture where it is square and frames the object already (`is_framed`), else FIXED.
    FIXED: centred on the object's box over all frames, whose longer side fills the frame ratio (`fixed_framing`).
    RELEASED: the square of the released script, around the middle of the picture (`released_framing`): an object off
        centre stays off centre and becomes smaller, and in video that is not square it may be cut.
    STABILISED: one square a frame, which follows an object that travels through the picture (`stabilised_framing`).
    """

    AUTO = "auto"
    FIXED = "fixed"
    STABILISED = "stabilised"
    RELEASED = "released"


@dataclass(frozen=True)
class Framing:
    """One square of the source video, the same for all frames, drawn `size` pixels wide.

    Coordinates are continuous: pixel i covers [i, i + 1) and has its centre at i + 0.5, in source and crop alike.
    The square may reach beyond the source; there the crop is transparent.
    """

    center_x: float
    """Centre of the square, source pixels from the left."""
    center_y: float
    """Centre of the square, source pixels from the top."""
    side: float
    """Side of the square, source pixels."""
    source_width: int
    source_height: int
    size: int
    """Side of the crop in its own pixels."""

    @property
    def scale(self) -> float:
        """Crop pixels for each source pixel."""
        return self.size / self.side

    @property
    def _corner(self) -> Float[np.ndarray, " 2"]:
        return np.array([self.center_x - self.side / 2, self.center_y - self.side / 2])

    def to_crop(self, xy: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        """Source pixel coordinates to crop pixel coordinates; `to_source` is the exact inverse."""
        return (np.asarray(xy, float) - self._corner) * self.scale

    def to_source(self, xy: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        """Crop pixel coordinates to source pixel coordinates."""
        return np.asarray(xy, float) / self.scale + self._corner

    def apply(self, frames: UInt8[np.ndarray, "t h w 4"]) -> UInt8[np.ndarray, "t size size 4"]:
        """Cut the square out of straight-alpha frames and resample it.

        Lanczos on premultiplied colours (a pixel without coverage has no colour to bleed), widened when scaling down
        so that it averages. Where the crop is fully transparent its colour is white.
        """
        return np.stack(list(self._crops(frames)))

    def in_source(self, region: Region) -> "Framing":
        """The same square in the pixels of the source, for a framing found on a clip that shows a region of it."""
        return replace(
            self,
            center_x=region.left + self.center_x / region.scale,
            center_y=region.top + self.center_y / region.scale,
            side=self.side / region.scale,
            source_width=region.source_width,
            source_height=region.source_height,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable description; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Framing":
        """Read back `to_dict`; raises `InputError` for missing, unknown or unusable entries."""
        try:
            framing = cls(**values)
            usable = bool(np.isfinite(list(values.values())).all()) and framing.side > 0 and framing.size > 0
        except (TypeError, ValueError) as error:
            raise InputError(f"The framing cannot be read ({error}): write it with Framing.to_dict.") from error
        if not usable:
            raise InputError("The framing holds numbers no crop can have: write it with Framing.to_dict.")
        return framing

    def _crops(self, frames: UInt8[np.ndarray, "t h w 4"]) -> Iterator[UInt8[np.ndarray, "size size 4"]]:
        if frames.shape[1:3] != (self.source_height, self.source_width):
            raise ValueError(
                f"the frames are {frames.shape[2]}x{frames.shape[1]}, the framing is of "
                f"{self.source_width}x{self.source_height}"
            )
        left, top = self._corner
        # Only source pixels the filter can reach, plus an empty rim, so that the box lies inside for Pillow
        reach = int(np.ceil(3 * max(1.0, 1 / self.scale))) + 1
        x0, y0 = int(np.floor(left)) - reach, int(np.floor(top)) - reach
        span = int(np.ceil(self.side)) + 2 * reach + 1
        rows = slice(*np.clip((y0, y0 + span), 0, self.source_height))
        columns = slice(*np.clip((x0, x0 + span), 0, self.source_width))
        box = (left - x0, top - y0, left - x0 + self.side, top - y0 + self.side)
        for frame in frames:
            part = frame[rows, columns].astype(np.float32)
            part[..., :3] *= part[..., 3:] / 255
            canvas = np.zeros((span, span, 4), np.float32)
            canvas[rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0] = part
            yield _straight(_resize(canvas, self.size, box))


def is_framed(alpha: UInt8[np.ndarray, "t h w"]) -> bool:
    """Whether a square film shows its object large and in the middle, as renders of objects do.

    Such a camera was pointed at the object's middle in space, and where its box lies in the picture (the nearer half of
    a turned body is larger) tells which way it faces. A crop around the box would wipe that out.
    """
    height, width = alpha.shape[1:]
    if height != width:
        return False
    left, top, right, bottom = union_box(alpha >= VISIBLE_ALPHA)
    off = max(abs(left + right - width), abs(top + bottom - height)) / 2
    furthest = max(width - 2 * left, 2 * right - width, height - 2 * top, 2 * bottom - height)
    return off <= FRAMED_OFF_CENTRE * width and FRAMED_LEAST * width <= furthest <= FRAMED_MOST * width


def whole_framing(alpha: UInt8[np.ndarray, "t h w"], size: int) -> Framing:
    """The whole of a square film.

    Raises:
        InputError: nothing is visible.
    """
    union_box(alpha >= VISIBLE_ALPHA)
    height, width = alpha.shape[1:]
    return Framing(width / 2, height / 2, float(width), width, height, size)


def fixed_framing(alpha: UInt8[np.ndarray, "t h w"], size: int, frame_ratio: float = FRAME_RATIO) -> Framing:
    """One square for the clip: centred on the box around the object in all frames, whose longer side fills the ratio.

    The released script centres on the picture instead, so objects off centre or in non-square video become smaller
    than asked for (`released_preprocess` does that).

    Args:
        alpha: coverage by the object, 0 to 255.
        size: side of the crops in pixels.
        frame_ratio: share of the crop the object fills, in (0, 1].

    Raises:
        InputError: nothing is visible, or the ratio is out of range.
    """
    check_ratio(frame_ratio)
    left, top, right, bottom = union_box(alpha >= VISIBLE_ALPHA)
    height, width = alpha.shape[1:]
    side = max(right - left, bottom - top) / frame_ratio
    return Framing((left + right) / 2, (top + bottom) / 2, side, width, height, size)


@dataclass(frozen=True)
class _ReleasedSquare:
    """The released script's crop in a picture: what it keeps, and the square that becomes the frame, source pixels."""

    rows: slice
    columns: slice
    top: int
    left: int
    side: int


def _released_square(visible: Bool[np.ndarray, "t h w"], frame_ratio: float | None) -> _ReleasedSquare:
    if frame_ratio is not None:
        check_ratio(frame_ratio)
    left, top, right, bottom = union_box(visible)
    half_height, half_width = visible.shape[1] // 2, visible.shape[2] // 2
    # the script takes half the height for x and half the width for y
    half = max(half_height - left, right - half_height, half_width - top, bottom - half_width)
    side = visible.shape[1] if frame_ratio is None else int(2 * half / frame_ratio)
    rows = slice(max(half_height - half, 0), min(half_height + half, visible.shape[1]))
    columns = slice(max(half_width - half, 0), min(half_width + half, visible.shape[2]))
    if columns.stop - columns.start > side:
        raise InputError("The released crop without a frame ratio cannot hold this video: give a ratio.")
    return _ReleasedSquare(rows, columns, half_height - side // 2, half_width - side // 2, side)


def released_framing(
    frames: UInt8[np.ndarray, "t h w 4"], size: int, frame_ratio: float = FRAME_RATIO
) -> tuple[Framing, UInt8[np.ndarray, "t h w 4"]]:
    """The released script's square, and the frames without what the script cuts off.

    The geometry is that of `released_preprocess`; `Framing.apply` keeps the alpha channel and does not truncate levels.

    Args:
        frames: straight alpha; the object is where alpha is above 0.
        size: side of the crops in pixels.
        frame_ratio: share of the canvas the script's square fills, in (0, 1].

    Raises:
        InputError: nothing is visible, or the ratio is out of range.
    """
    square = _released_square(frames[..., 3] > 0, frame_ratio)
    height, width = frames.shape[1:3]
    kept = np.zeros_like(frames)
    kept[:, square.rows, square.columns] = frames[:, square.rows, square.columns]
    half = square.side / 2
    return Framing(square.left + half, square.top + half, float(square.side), width, height, size), kept


def released_preprocess(
    frames: UInt8[np.ndarray, "t h w c"], width: int, height: int, frame_ratio: float | None = FRAME_RATIO
) -> UInt8[np.ndarray, "t height width 3"]:
    """The crop of the released script (`preprocess_video` in generative-models' sv4d_helpers.py), to the last bit.

    One square around the middle of the picture that holds the object in every frame, centred in an empty canvas,
    resized, on white. Kept with its peculiarities, because the released weights are used that way: the object is not
    centred; the script takes half the height for x and half the width for y, so in video that is not square the
    square is too large or cuts the object; levels are truncated, not rounded.

    Args:
        frames: RGBA (the object is where alpha is above 0) or RGB on white (where the mean level is at most 250).
        width, height: of the result, pixels.
        frame_ratio: share of the canvas the square fills; None makes the canvas as high as the picture.

    Raises:
        InputError: nothing is visible, or the ratio is out of range.
    """
    if frames.shape[-1] == 3:
        visible = frames.mean(axis=-1) <= 250
        frames = np.concatenate([frames, np.full_like(frames[..., :1], 255)], axis=-1)
    else:
        visible = frames[..., 3] > 0
    square = _released_square(visible, frame_ratio)
    cropped = frames[:, square.rows, square.columns]
    y, x = square.rows.start - square.top, square.columns.start - square.left
    canvas = np.zeros((len(frames), square.side, square.side, 4), np.uint8)
    canvas[:, y : y + cropped.shape[1], x : x + cropped.shape[2]] = cropped
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS) for frame in canvas]
    levels = np.stack([np.asarray(frame) for frame in resized]) / 255  # double precision decides the truncation
    return ((levels[..., :3] * levels[..., 3:] + (1 - levels[..., 3:])) * 255).astype(np.uint8)


def check_ratio(frame_ratio: float) -> None:
    """Raises `InputError` for a share of the frame no object can fill."""
    if not 0 < frame_ratio <= 1:
        raise InputError(f"The object cannot fill {frame_ratio:g} of the frame: give a share above 0 and at most 1.")


def union_box(visible: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (exclusive) of everything visible in any frame; raises `InputError` if nothing is."""
    union: np.ndarray = np.any(visible, axis=0)
    if not union.any():
        raise InputError("No frame shows a visible object: there is nothing to frame.")
    rows, columns = np.flatnonzero(union.any(axis=1)), np.flatnonzero(union.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _resize(
    canvas: Float[np.ndarray, "h w c"], size: int, box: tuple[float, float, float, float]
) -> Float[np.ndarray, "size size c"]:
    layers = [
        Image.fromarray(layer).resize((size, size), Image.Resampling.LANCZOS, box=box)
        for layer in np.moveaxis(canvas, -1, 0)
    ]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def _straight(premultiplied: Float[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 4"]:
    alpha = premultiplied[..., 3:]
    # not yet clipped: where the filter overshoots, colour and alpha overshoot alike and their ratio is the colour
    colour = 255 * premultiplied[..., :3] / np.maximum(alpha, 1e-3)
    rgba = np.concatenate([colour, alpha], axis=-1).round().clip(0, 255).astype(np.uint8)
    rgba[rgba[..., 3] == 0, :3] = 255
    return rgba
