"""A background of one colour, which may change from frame to frame and a little across the picture; bars around it."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from scipy import ndimage

from sv4d_ns.video.reader import Clip, Region

# All numbers below are our own design decisions; levels are of 255. They were set on the four public benchmark clips
# (H.264, white background), where codec ringing reaches 11 levels three or more pixels away from the object.

MIN_CONTRAST = 12.0
"""A pixel differing from the background by more levels than this in some channel belongs to the object ..."""
NOISE_FACTOR = 5.0
"""... or by more than so many standard deviations of the background, where the footage is noisy."""
MAX_NOISE = 8.0
"""Standard deviation (levels) of the border pixels above which a background is not plain."""
MIN_PLAIN_SHARE = 0.75
"""Share of border pixels that must look like the background; the rest may be the object leaving the picture."""
MAX_SCATTERED = 0.05
"""Share of border pixels that may look otherwise in more than four patches, which are no object leaving the picture."""
STEADY = 2.0
"""Levels by which the colour may change over time, or across half the picture, and still counts as one."""
MAX_SLOPE = 24.0
"""Levels from the middle of the picture to its border; a background that fades more than that is not plain."""

BAR_BLACK = 40.0
BAR_TOLERANCE = 14.0
"""Levels a black bar may have, and by which its pixels may differ from each other."""
BAR_SHARE, INSIDE_SHARE = 0.85, 0.5
"""Share of the pixels of a line, in all frames, that have the bar's colour: at least, and at most just inside of it."""
BAR_EDGE = 4
"""Lines that the edge of a bar may take (codecs and scaling blur it)."""
BAR_PIXELS = 512
"""Pixels of a line that are looked at, evenly spaced: a picture of 4K has eight million, four times over."""


@dataclass(frozen=True)
class FrameBackground:
    """The background of one frame."""

    levels: Float[np.ndarray, "*n 3"]
    """One colour, or one for each pixel."""
    noise: float

    @property
    def contrast(self) -> float:
        """Levels of difference from which a pixel is not background."""
        return max(MIN_CONTRAST, NOISE_FACTOR * self.noise)

    @property
    def vividness(self) -> float:
        """Levels between the strongest and the weakest channel, of the mean colour."""
        return float(np.ptp(self.levels.reshape(-1, 3).mean(axis=0)))

    def part(self, window: tuple[slice, slice]) -> "FrameBackground":
        """The background of a part of the frame."""
        return self if self.levels.ndim == 1 else FrameBackground(self.levels[window], self.noise)

    def of(self, where: np.ndarray) -> Float[np.ndarray, "*n 3"]:
        """The background of the pixels of a mask."""
        return self.levels if self.levels.ndim == 1 else self.levels[where]

    def distance(self, colours: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
        """The largest difference from the background in any channel, levels."""
        return largest_difference(colours, self.levels)


@dataclass(frozen=True)
class Background:
    """The background of a clip, in each frame a plane of colours over the source picture."""

    planes: Float[np.ndarray, "t 3 3"]
    """For each frame the colour in the middle of the source picture, and its change to the right and lower border."""
    noise: float
    """Standard deviation of the border pixels around it, levels, robustly."""
    plain_share: float
    """Share of the border pixels that look like the background."""
    scattered: float = 0.0
    """Share of the border pixels that do not, and lie in many patches: a texture, not an object leaving the picture."""

    @property
    def is_plain(self) -> bool:
        """Whether the borders are alike enough to tell an object by its colour."""
        return self.noise <= MAX_NOISE and self.plain_share >= MIN_PLAIN_SHARE and self.scattered <= MAX_SCATTERED

    @property
    def described(self) -> str:
        """How the borders look, in a few words."""
        if self.noise > MAX_NOISE:
            return f"its borders vary by about {self.noise:.0f} levels of 255 around their colour"
        texture = ", the rest is strewn over them" if self.plain_share >= MIN_PLAIN_SHARE else ""
        return f"only {self.plain_share:.0%} of its borders have one colour{texture}"

    @property
    def colour(self) -> str:
        """The colour in words: one, or the darkest and brightest where it changes over time."""
        order = self.planes[:, 0].mean(axis=-1).argsort()
        darkest, brightest = ("({:.0f}, {:.0f}, {:.0f})".format(*self.planes[i, 0]) for i in (order[0], order[-1]))
        return darkest if darkest == brightest else f"{darkest} to {brightest}"

    def at(self, index: int, region: Region) -> FrameBackground:
        """The background of a frame of a clip that shows this region of the source."""
        plane = self.planes[index]
        if not plane[1:].any():
            return FrameBackground(plane[0], self.noise)
        x, y = _places(region)
        levels = plane[0] + x[None, :, None] * plane[1] + y[:, None, None] * plane[2]
        return FrameBackground(levels.astype(np.float32), self.noise)


def largest_difference(
    colours: Shaped[np.ndarray, "*n 3"], others: Float[np.ndarray, "*m 3"]
) -> Float[np.ndarray, "*n"]:
    """The largest difference of two colours in any channel (a reduction over three numbers is numpy's slowest)."""
    red, green, blue = (np.abs(colours[..., channel] - others[..., channel]) for channel in range(3))
    return np.maximum(np.maximum(red, green, out=red), blue, out=red)


def border_background(clip: Clip) -> Background:
    """What the borders of the pictures look like, each frame by itself."""
    frames, region = clip.frames, clip.region
    height, width = frames.shape[1:3]
    rim = max(2, round(0.02 * min(height, width)))
    border = np.ones((height, width), bool)
    border[rim:-rim, rim:-rim] = False
    rows, columns = np.nonzero(border)
    thin = slice(None, None, max(1, len(rows) // 20_000))
    rows, columns = rows[thin], columns[thin]
    x, y = _places(region)
    basis = np.stack([np.ones(len(rows)), x[columns], y[rows]], axis=-1)
    pixels = np.stack([frame[rows, columns, :3] for frame in frames]).astype(np.float64)
    middle = np.median(pixels, axis=1)
    if np.ptp(middle, axis=0).max() <= STEADY:
        middle[:] = np.median(pixels, axis=(0, 1))
    planes = np.stack([_plane(basis, frame, colour) for frame, colour in zip(pixels, middle, strict=True)])
    flat = np.abs(planes[:, 1:]).max() <= STEADY or np.abs(planes[:, 1:]).max() > MAX_SLOPE
    if flat:
        planes = np.zeros_like(planes)
        planes[:, 0] = middle
    elif np.ptp(planes, axis=0).max() <= STEADY:
        planes[:] = np.median(planes, axis=0)
    # frame by frame, since differences of all would take as much memory as the pixels once more
    distance = np.stack([largest_difference(p, basis @ plane) for p, plane in zip(pixels, planes, strict=True)])
    noise = 1.4826 * float(np.median(distance))
    plain = (distance <= max(MIN_CONTRAST, NOISE_FACTOR * noise)).mean()
    background = Background(planes, noise, float(plain))
    some = range(0, len(frames), max(1, len(frames) // 8))
    strewn = [_scattered(frames[index], background.at(index, region), border) for index in some]
    return replace(background, scattered=float(np.mean(strewn)))


def _scattered(
    frame: UInt8[np.ndarray, "h w 4"], background: FrameBackground, border: Bool[np.ndarray, "h w"]
) -> float:
    """Share of the border that differs from the background outside of the four largest patches that do."""
    labels, _ = ndimage.label((background.distance(frame[..., :3]) > background.contrast) & border, np.ones((3, 3)))
    sizes = np.sort(np.bincount(labels.ravel())[1:])
    return float(sizes[:-4].sum() / border.sum())


def _places(region: Region) -> tuple[Float[np.ndarray, " w"], Float[np.ndarray, " h"]]:
    """Where the columns and rows of a clip lie in the source: -1 at the left and upper border, 1 at the others."""
    height, width = region.shape
    x = (region.left + (np.arange(width) + 0.5) / region.scale) / region.source_width
    y = (region.top + (np.arange(height) + 0.5) / region.scale) / region.source_height
    return 2 * x - 1, 2 * y - 1


def _plane(
    basis: Float[np.ndarray, "n 3"], pixels: Float[np.ndarray, "n 3"], colour: Float[np.ndarray, " 3"]
) -> Float[np.ndarray, "3 3"]:
    """The plane of colours through the pixels of a border, without those of an object that reaches it."""
    plane = np.zeros((3, 3))
    plane[0] = colour
    for reach in (2 * MAX_SLOPE, MIN_CONTRAST, MIN_CONTRAST):
        near = largest_difference(pixels, basis @ plane) <= reach
        if near.mean() < 0.5:
            break
        plane = np.linalg.lstsq(basis[near], pixels[near], rcond=None)[0]
    return plane


def without_bars(clip: Clip) -> Region | None:
    """The region of the source between black bars; None if there are none.

    A bar is made of whole lines of one black, the same in all frames, and ends at once. Bars of another colour are
    believed where they lie on opposite sides and are equally wide.
    """
    frames = clip.frames[:: max(1, len(clip.frames) // 12), :, :, :3]
    height, width = frames.shape[1:3]
    left, top, right, bottom = 0, 0, width, height
    for _ in range(2):  # where bars are on all sides the first two hide how far the others reach
        part = frames[:, top:bottom, left:right]
        one, other = _pair_of_bars(part.transpose(0, 2, 1, 3))
        left, right = left + one, right - other
        one, other = _pair_of_bars(frames[:, top:bottom, left:right])
        top, bottom = top + one, bottom - other
    if (left, top, right, bottom) == (0, 0, width, height):
        return None
    region, scale = clip.region, clip.region.scale
    x0, y0 = region.left + int(np.ceil(left / scale)), region.top + int(np.ceil(top / scale))
    x1, y1 = region.left + int(right / scale), region.top + int(bottom / scale)
    if x1 - x0 < 16 or y1 - y0 < 16:
        return None
    return Region(x0, y0, x1 - x0, y1 - y0, region.source_width, region.source_height, min(1.0, scale))


def _pair_of_bars(frames: UInt8[np.ndarray, "t n m 3"]) -> tuple[int, int]:
    """Lines of the bars before the first and behind the last line of a picture."""
    (one, one_colour), (other, other_colour) = _bar(frames), _bar(frames[:, ::-1])
    alike = np.abs(one_colour - other_colour).max() <= BAR_TOLERANCE
    symmetric = one and other and alike and abs(one - other) <= max(4, 0.2 * max(one, other))
    return (
        one if symmetric or one_colour.max() <= BAR_BLACK else 0,
        other if symmetric or other_colour.max() <= BAR_BLACK else 0,
    )


def _bar(frames: UInt8[np.ndarray, "t n m 3"]) -> tuple[int, Float[np.ndarray, " 3"]]:
    """Lines of one colour from the first one on that end at once (0 if they do not), and their colour."""
    frames = frames[:, :, :: max(1, frames.shape[2] // BAR_PIXELS)]
    colour = np.median(frames[:, 0].reshape(-1, 3), axis=0)
    begin: int | None = None
    for index in range(frames.shape[1] // 2):
        share = (largest_difference(frames[:, index].astype(np.float32), colour) <= BAR_TOLERANCE).mean()
        if begin is None and share < BAR_SHARE:
            begin = index
        if begin is None:
            continue
        if begin == 0 or index == begin + BAR_EDGE:
            break
        if share <= INSIDE_SHARE:
            return index + 1, colour
    return 0, colour
