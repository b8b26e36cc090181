"""What is object and what is background: the file's own alpha, or a plain background of any colour."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from scipy import ndimage

from sv4d_ns.utils.errors import InputError
from sv4d_ns.video.reader import Clip

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
MIN_OBJECT_SHARE = 5e-4
"""An object smaller than this share of the picture in every frame is taken as noise."""
MAX_OBJECT_SHARE = 0.98
"""Above this share of the whole clip there is no background left to speak of."""
SPECK_PIXELS = 16
SPECK_SHARE = 2e-3
"""Islands smaller than so many pixels, or than this share of the frame's largest part, are codec noise."""
OPEN_REACH = 2
OPEN_OVERLAP = 0.3
"""A pocket of background inside the object is an opening if this share of it is outside (or an opening) so many frames
before or after. On the benchmark this opens 93 % of the truly open area and nothing else; see `segment`."""


Matting = Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "h w"]]
"""A model that tells how much of each pixel of a picture the object covers, 0 to 255 (see `matting.py`)."""


@dataclass(frozen=True)
class Background:
    """A background of one colour."""

    colour: Float[np.ndarray, " 3"]
    noise: float
    """Standard deviation of the background, levels, robustly from the borders."""
    plain_share: float
    """Share of the border pixels that look like the background."""

    @property
    def contrast(self) -> float:
        """Levels of difference from which a pixel is not background."""
        return max(MIN_CONTRAST, NOISE_FACTOR * self.noise)

    @property
    def is_plain(self) -> bool:
        """Whether the borders are alike enough to tell an object by its colour."""
        return self.noise <= MAX_NOISE and self.plain_share >= MIN_PLAIN_SHARE

    @property
    def described(self) -> str:
        """How the borders look, in a few words."""
        return f"{self.plain_share:.0%} of the border looks alike, give or take {self.noise:.0f} levels"

    def distance(self, colours: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n"]:
        """The largest difference from the background in any channel, levels."""
        return np.abs(colours - self.colour).max(axis=-1)


@dataclass(frozen=True, eq=False)
class Foreground:
    """The clip with its object cut out."""

    frames: UInt8[np.ndarray, "t h w 4"]
    """Straight-alpha pictures; along soft edges the colour is the object's own, without the old background."""
    method: str
    """"masks" (given by the user), "alpha" (from the file), "plain background" or "matting"."""
    confidence: float
    """0 to 1: 1 for masks and a file's own alpha; how plain the background is times how well the outline stands out;
    how decided a matting model is about the pixels it takes as object."""
    messages: tuple[str, ...]
    """What was chosen, a sentence each."""
    background: Background | None = None
    """The plain background that was removed, if that was the method."""

    @property
    def alpha(self) -> UInt8[np.ndarray, "t h w"]:
        """Coverage of each pixel by the object, 0 to 255."""
        return self.frames[..., 3]


def segment(
    clip: Clip,
    masks: UInt8[np.ndarray, "t h w"] | None = None,
    matting: Matting | None = None,
    background: Background | None = None,
) -> Foreground:
    """Cut the object out of the clip.

    Masks the user gives are used as they are. A file with a real alpha channel keeps it. Otherwise a background of one
    colour (any colour) is removed; it is estimated from the picture borders of all frames together with its noise;
    soft edges follow from how far a pixel's colour lies between the background and the object beside it. Patches of
    background colour enclosed by the object are part of it (a white belly before white), unless they look exactly
    like the background, have a sharp rim, and are found outside the outline in a frame shortly before or after (the
    gap between two legs). An opening that stays closed through the whole clip (the handle of a cup) is therefore
    filled, and a message says so. A background of many colours is left to the matting model, whose alpha is the median
    of three frames.

    Args:
        masks: coverage by the object, 0 to 255.
        matting: used where the background is not plain.
        background: what is already known of it (for a clip that shows only part of the pictures).

    Raises:
        InputError: no visible object, an object that covers the picture, or a background that is not plain and no
            matting model.
    """
    if masks is not None:
        foreground = _with_alpha(clip, masks, "masks", 1.0, "The object was cut out with the masks given.")
    elif clip.has_alpha:
        message = "The alpha channel of the file separates the object from the background."
        foreground = Foreground(clip.frames, "alpha", 1.0, (message,))
    else:
        background = background or _border_colour(clip)
        if background.is_plain:
            foreground = _without_plain_background(clip, background)
        elif matting is not None:
            foreground = _matted(clip, matting, background)
        else:
            raise InputError(
                f"{clip.source} has no plain background ({background.described}): give "
                "a video with an alpha channel or one filmed before a single colour, a folder of masks "
                "(--pipeline.datamanager.masks), or name a matting model (--pipeline.datamanager.matting "
                "isnet-general-use)."
            )
    _check_coverage(clip, foreground.alpha)
    return foreground


def _with_alpha(clip: Clip, alpha: np.ndarray, method: str, confidence: float, message: str) -> Foreground:
    """The clip with a given alpha; colours of soft pixels are taken from the object beside them."""
    frames = np.stack([_own_colours(frame[..., :3], cover) for frame, cover in zip(clip.frames, alpha, strict=True)])
    return Foreground(frames, method, confidence, (message,))


def _own_colours(colours: UInt8[np.ndarray, "h w 3"], alpha: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 4"]:
    """Straight-alpha pixels in which the old background no longer shines through.

    A soft pixel is C = alpha F + (1 - alpha) B and neither F nor B is known: F is taken from the sure pixels around.
    """
    sure = (alpha >= 250).astype(np.float32)
    reach = max(2, round(min(alpha.shape) / 400))
    weight = ndimage.gaussian_filter(sure, reach, truncate=4)
    layers = [ndimage.gaussian_filter(colours[..., i] * sure, reach, truncate=4) for i in range(3)]
    nearby = np.stack(layers, axis=-1) / np.maximum(weight, 1e-6)[..., None]
    soft = (alpha > 0) & (alpha < 250) & (weight > 1e-4)
    clean = np.where(soft[..., None], nearby, colours)
    clean[alpha == 0] = 255
    return np.dstack([clean.round().clip(0, 255), alpha]).astype(np.uint8)


def _matted(clip: Clip, matting: Matting, background: Background) -> Foreground:
    alpha = np.stack([matting(np.ascontiguousarray(frame[..., :3])) for frame in clip.frames])
    if len(alpha) >= 3:  # a per-picture model flickers: the median over time drops what is there for one frame only
        inner = np.median(np.stack([alpha[:-2], alpha[1:-1], alpha[2:]]), axis=0)
        alpha = np.concatenate([alpha[:1], inner.astype(np.uint8), alpha[-1:]])
    seen = alpha[alpha >= 26]
    confidence = float(np.abs(seen / 127.5 - 1).mean()) if seen.size else 0.0
    message = (
        f"The background is not plain ({background.described}): the object was found "
        f"by the matting model, confidence {confidence:.2f}."
    )
    return _with_alpha(clip, alpha, "matting", confidence, message)


def _without_plain_background(clip: Clip, background: Background) -> Foreground:
    cutouts, contrasts, filled = _cut_out(clip.frames, background)
    if cutouts is None:
        raise _nothing_visible(clip)
    confidence = background.plain_share * contrasts
    colour = ", ".join(f"{level:.0f}" for level in background.colour)
    messages = [f"A plain background of colour ({colour}) was removed, confidence {confidence:.2f}."]
    if filled:
        messages.append(
            "Patches of background colour inside the object were taken as part of it; "
            "if they are openings, give a video with an alpha channel."
        )
    return Foreground(cutouts, "plain background", confidence, tuple(messages), background)


def _border_colour(clip: Clip) -> Background:
    """What the borders of the pictures look like."""
    frames = clip.frames
    width = max(2, round(0.02 * min(frames.shape[1:3])))
    # at most about 30 frames: the borders of a long clip say nothing new
    some = frames[:: max(1, len(frames) // 30), :, :, :3]
    strips = (some[:, :width], some[:, -width:], some[:, width:-width, :width], some[:, width:-width, -width:])
    pixels = np.concatenate([strip.reshape(-1, 3) for strip in strips]).astype(np.float32)
    colour = np.median(pixels, axis=0)
    distance = np.abs(pixels - colour).max(axis=-1)
    noise = 1.4826 * float(np.median(distance))
    plain = (distance <= max(MIN_CONTRAST, NOISE_FACTOR * noise)).mean()
    return Background(colour, noise, float(plain))


def _cut_out(
    frames: UInt8[np.ndarray, "t h w 4"], background: Background
) -> tuple[UInt8[np.ndarray, "t h w 4"] | None, float, bool]:
    """Cut-outs (None if nothing is there), the share of the outline that stands out, whether patches were filled."""
    solid = np.stack([_without_specks(background.distance(frame[..., :3]) > background.contrast) for frame in frames])
    if solid.mean(axis=(1, 2)).max() < MIN_OBJECT_SHARE:
        return None, 0.0, False
    solid, filled = _fill_closed_pockets(frames, solid, background)
    cutouts = np.full_like(frames, 255)
    cutouts[..., 3] = 0
    clear, total = 0, 0
    reach = max(2, round(min(frames.shape[1:3]) / 400))
    for source, mask, target in zip(frames, solid, cutouts, strict=True):
        window = _window(mask, margin=4 * reach)
        if window is None:
            continue
        matte, edge_contrast = _matte(source[window][..., :3].astype(np.float32), mask[window], background, reach)
        target[window] = matte
        clear += int((edge_contrast > 2 * background.contrast).sum())
        total += edge_contrast.size
    return cutouts, clear / max(total, 1), filled


def _without_specks(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(SPECK_PIXELS, SPECK_SHARE * sizes.max()))[labels]


def _fill_closed_pockets(
    frames: UInt8[np.ndarray, "t h w 4"], solid: Bool[np.ndarray, "t h w"], background: Background
) -> tuple[Bool[np.ndarray, "t h w"], bool]:
    """The solid pixels with enclosed background filled, except where it opens to the outside; whether much was."""
    opened = ~np.stack([ndimage.binary_fill_holes(mask) for mask in solid])
    pockets = [
        _see_through(frame[..., :3].astype(np.float32), ~mask & ~outside, background)
        for frame, mask, outside in zip(frames, solid, opened, strict=True)
    ]
    # forwards and backwards, so that a pocket counts as open for as long as it can be followed
    for order in (range(len(solid)), range(len(solid) - 1, -1, -1)):
        for index in order:
            sizes = np.bincount(pockets[index].ravel())
            for neighbour in range(max(index - OPEN_REACH, 0), min(index + OPEN_REACH + 1, len(solid))):
                overlaps = np.bincount(pockets[index][opened[neighbour]], minlength=len(sizes))
                is_open = overlaps >= OPEN_OVERLAP * sizes
                is_open[0] = False
                opened[index] |= is_open[pockets[index]]
    filled = ~opened
    return filled, bool((filled & ~solid).sum() > 0.005 * solid.sum())


def _see_through(
    colours: Float[np.ndarray, "h w 3"], pockets: Bool[np.ndarray, "h w"], background: Background
) -> Integer[np.ndarray, "h w"]:
    """Labels of the pockets that look like the background itself, with a sharp rim; 0 elsewhere.

    Fur or cloth in the colour of the background is shaded: it differs a little, and fades into its surroundings.
    """
    labels, count = ndimage.label(pockets)
    if not count:
        return labels
    numbers = np.arange(1, count + 1)
    distance = background.distance(colours)
    rim = ndimage.grey_dilation(labels, size=(7, 7)) * (ndimage.grey_dilation(labels, size=(5, 5)) == 0)
    exact = ndimage.median(distance, labels, numbers) <= background.contrast / 2
    sharp = ndimage.median(distance, rim, numbers) >= 3 * background.contrast
    return labels * np.concatenate([[False], exact & sharp])[labels]


def _window(mask: Bool[np.ndarray, "h w"], margin: int) -> tuple[slice, slice] | None:
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found:
        return None
    rows, columns = found[0]
    return (
        slice(max(rows.start - margin, 0), rows.stop + margin),
        slice(max(columns.start - margin, 0), columns.stop + margin),
    )


def _matte(
    colours: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], background: Background, reach: int
) -> tuple[UInt8[np.ndarray, "h w 4"], Float[np.ndarray, " n"]]:
    """Soft alpha and clean colours of one frame, and the contrast along the n pixels of its outline.

    A pixel of the outline is C = alpha F + (1 - alpha) B with known background B. F is the mean colour of the sure
    inside next to it (or, in parts too thin to have one, of the pixels that differ most from the background), so
    alpha = (C - B).(F - B) / |F - B|^2. Where F is as good as B (white fur before white) the outline stays hard.
    """
    square = np.ones((3, 3), bool)
    core = ndimage.binary_erosion(mask, square, iterations=reach, border_value=1)
    band = ndimage.binary_dilation(mask, square, iterations=reach) & ~core
    distance = background.distance(colours)
    weight = np.where(core, 1.0, 1e-6 * mask * (distance / 255) ** 4).astype(np.float32)
    blurred = [
        ndimage.gaussian_filter(layer, reach / 2, truncate=8)
        for layer in (*np.moveaxis(colours, -1, 0) * weight, weight)
    ]
    nearby = np.stack(blurred[:3], axis=-1)[band] / np.maximum(blurred[3][band], 1e-30)[:, None]

    towards_object = nearby - background.colour
    observed = colours[band] - background.colour
    coverage = (observed * towards_object).sum(axis=-1) / np.maximum((towards_object**2).sum(axis=-1), 1e-6)
    coverage = coverage.clip(0, 1)
    coverage[distance[band] <= 2 + 3 * background.noise] = 0
    contrast = np.abs(towards_object).max(axis=-1)
    hard = contrast <= background.contrast
    coverage[hard] = mask[band][hard]

    alpha = core.astype(np.float32)
    alpha[band] = coverage
    clean = colours.copy()
    own = (background.colour + observed / np.maximum(coverage, 1e-3)[:, None]).clip(0, 255)
    # the smaller the coverage the more its division amplifies noise, so the neighbours' colour takes over
    clean[band] = np.where(hard[:, None], colours[band], coverage[:, None] * own + (1 - coverage[:, None]) * nearby)
    clean[alpha == 0] = 255
    return np.dstack([clean, 255 * alpha]).round().clip(0, 255).astype(np.uint8), contrast


def _nothing_visible(clip: Clip) -> InputError:
    return InputError(
        f"{clip.source} shows no visible object: give a video in which the object differs from its background."
    )


def _check_coverage(clip: Clip, alpha: UInt8[np.ndarray, "t h w"]) -> None:
    share = (alpha >= 128).mean(axis=(1, 2))
    if share.max() < MIN_OBJECT_SHARE:
        raise _nothing_visible(clip)
    if share.mean() > MAX_OBJECT_SHARE:
        raise InputError(
            f"The object covers all of {clip.source}: give a video that shows it whole, with space around."
        )
