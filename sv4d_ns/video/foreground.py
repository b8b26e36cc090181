"""What is object and what is background: the file's own alpha, or a plain background of any colour."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt8
from scipy import ndimage

from sv4d_ns.utils.errors import InputError
from sv4d_ns.video.background import Background, FrameBackground, border_background
from sv4d_ns.video.reader import Clip

# All numbers below are our own design decisions, set on the four public benchmark clips; levels are of 255.

MIN_OBJECT_SHARE = 5e-4
"""An object smaller than this share of the picture in every frame is taken as noise."""
MAX_OBJECT_SHARE = 0.98
"""Above this share of the whole clip there is no background left to speak of."""
SPECK_PIXELS = 16
SPECK_SHARE = 2e-3
"""Islands smaller than so many pixels, or than this share of the frame's largest part, are codec noise."""
MAX_CORNER = 0.05
CORNER_TOLERANCE = 16.0
"""What fills a corner of the picture in all frames is left out up to this share of it, if its levels differ by less."""
SURE = 0.6
"""Confidence of a matting model below which its cut-out is doubted."""
SLOW = 0.7
"""Overlap (IoU) of the outlines before and after a frame from which their median is believed."""
MOTION_SIZE = 128
"""Longer side of the reduced pictures in which motion is looked for, pixels (up to twice as many)."""
MOTION_LEVELS = 0.2
"""Mean change, levels above the noise, below which nothing moves."""
MOST_STILL = 2.5
"""An object may be so many times as large as the box around what moves of it (a waving arm) before it is doubted."""
MOTION_MARGIN = 0.35
"""Margin around what moves, of its longer side, in which the rest of the object is looked for."""
OPEN_REACH = 2
OPEN_OVERLAP = 0.3
"""A pocket of background inside the object is an opening if this share of it is outside (or an opening) so many frames
before or after, see `segment`."""
VIVID = 60.0
"""Levels between the strongest and the weakest channel of a background that no object has inside of it by chance (a
green screen): what looks like it is it."""
ALIKE, SMALL_ALIKE = 0.5, 0.25
"""Shares of the contrast by which a pocket before another background may differ from it; the smaller one for pockets
below `OPEN_SHARE`, which may be the light in an eye."""
OPEN_SHARE = 2e-3
"""A pocket that was never outside is an opening if it has this share of the object, ..."""
OPEN_LIKENESS = 1 / 3
"""... differs by less than this share of the contrast (cloth does not, by its shading), ..."""
OPEN_LIFE = 0.5
"""... and lasts for less than this share of the clip: gaps between limbs come and go, a white belly stays.

Of films of twelve models in H.264, with a thousand openings, 93 % of the truly open area is opened before white, 87 %
before grey with grain, all before green (85, 82 and 80 % without what is said of vivid backgrounds and of pockets that
were never outside), and of the object's own patches half as many (eight eyes in two thousand pictures)."""


Matting = Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "h w"]]
"""A model that tells how much of each pixel of a picture the object covers, 0 to 255 (see `matting.py`)."""


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
    filled: Bool[np.ndarray, "t h w"] | None = None
    """Pixels in the colour of the plain background that were taken as part of the object, which encloses them."""
    dropped: Bool[np.ndarray, "t h w"] | None = None
    """Islands that were left out as too small."""

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
    background colour enclosed by the object are openings where the background is vivid (a green screen). Before others
    they are part of the object (a white belly before white), unless they look exactly like the background, have a
    sharp rim, and are either found outside the outline in a frame shortly before or after (the gap between two legs)
    or come and go. An opening that stays closed through the whole clip (the handle of a cup) is filled there, and a
    message says so. A background of many colours is left to the matting model, whose alpha is the median of three
    frames (`_matted`).

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
        background = background or border_background(clip)
        if background.is_plain:
            foreground = _without_plain_background(clip, background)
        elif matting is not None:
            foreground = _matted(clip, matting, background)
        else:
            raise InputError(
                f"{clip.source} has no plain background ({background.described}): give "
                "a video with an alpha channel or one filmed before a single colour, a folder of masks "
                "(--pipeline.datamanager.masks), or name a matting model (--pipeline.datamanager.matting u2netp)."
            )
    _check_coverage(clip, foreground)
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
    """The clip cut out by a model that looks at one picture at a time.

    Such a model takes what strikes the eye, which may be a thing in the background. The object is what moves: where
    that lies outside of what was found, the model is asked again about the part of the picture in which it does.
    """
    step = max(1, max(clip.frames.shape[1:3]) // MOTION_SIZE)
    change = _change(clip.frames, step)
    alpha, confidence = _asked(clip.frames, matting, change, step)
    box = _moving_box(change, step) if confidence < SURE else None
    if box is not None:
        closer, closer_confidence = _asked(clip.frames, matting, change, step, box)
        if closer_confidence > confidence:
            alpha, confidence = closer, closer_confidence
    confidence *= _plausible_size(alpha, change, step)
    message = (
        f"The background is not plain ({background.described}): the object was found "
        f"by the matting model, confidence {confidence:.2f}; look at it with sv4d doctor --picture."
    )
    return _with_alpha(clip, alpha, "matting", confidence, message)


def _asked(
    frames: UInt8[np.ndarray, "t h w 4"],
    matting: Matting,
    change: Float[np.ndarray, "t h w"],
    step: int,
    box: tuple[slice, slice] = (slice(None), slice(None)),
) -> tuple[UInt8[np.ndarray, "t h w"], float]:
    """What a model says of a part of the pictures, steadied over time, and how far it is to be believed.

    The confidence is how decided the model is about the pixels it takes as object, times the share of the motion (per
    pixel) that is inside of them: near 0 where it found a still thing while another one moves.
    """
    from sv4d_ns.utils.progress import bar  # brings nerfstudio's console

    alpha = np.zeros(frames.shape[:3], np.uint8)
    with bar("Cutting the object out") as show:
        for index, frame in enumerate(frames):
            alpha[index][box] = matting(np.ascontiguousarray(frame[box][..., :3]))
            show(index + 1, len(frames))
    alpha = _steadied(alpha)
    seen = alpha[alpha >= 26]
    if not seen.size:
        return alpha, 0.0
    decided = float(np.abs(seen / 127.5 - 1).mean())
    solid = np.stack([reduced(mask, step) >= 128 for mask in alpha])
    inside, outside = (float(np.mean(change, where=part)) if part.any() else 0.0 for part in (solid, ~solid))
    if inside + outside < MOTION_LEVELS:
        return alpha, decided
    return alpha, decided * inside / (inside + outside)


def _plausible_size(alpha: UInt8[np.ndarray, "t H W"], change: Float[np.ndarray, "t h w"], step: int) -> float:
    """1, or less where what was found is much larger than the part of the picture in which anything moves.

    Then the model may have taken a thing of the background together with the object before it.
    """
    box = _window(_moving(change), margin=0)
    found = float(np.count_nonzero(alpha >= 128, axis=(1, 2)).max())
    if box is None or not found:
        return 1.0
    area = float(np.prod([(side.stop - side.start) * step for side in box]))
    return min(1.0, MOST_STILL * area / found)


def _steadied(alpha: UInt8[np.ndarray, "t h w"]) -> UInt8[np.ndarray, "t h w"]:
    """The median of three frames, which drops what a model saw or missed in one frame only.

    Where the outline moves too far between the frames before and after, the median would drop the object itself: then a
    frame keeps its own answer, unless the object was lost in it.
    """
    steady = alpha.copy()
    for index in range(1, len(alpha) - 1):
        before, own, after = (frame >= 128 for frame in alpha[index - 1 : index + 2])
        overlap = (before & after).sum() / max((before | after).sum(), 1)
        lost = own.sum() < 0.5 * min(before.sum(), after.sum())
        if overlap >= SLOW or lost:
            steady[index] = np.median(alpha[index - 1 : index + 2], axis=0)
    return steady


def _change(frames: UInt8[np.ndarray, "t H W 4"], step: int) -> Float[np.ndarray, "t h w"]:
    """Levels by which each frame differs from the clip's median picture, above the noise, at reduced size."""
    small = np.stack([np.stack([reduced(frame[..., i], step) for i in range(3)], axis=-1) for frame in frames])
    levels = np.abs(small - np.median(small, axis=0)).max(axis=-1)
    return np.maximum(levels - 4 * np.median(levels) - 2, 0).astype(np.float32)


def _moving(change: Float[np.ndarray, "t h w"]) -> Bool[np.ndarray, "h w"]:
    """Where anything moves in the clip, at reduced size."""
    return ndimage.binary_opening((change > 4).any(axis=0), np.ones((2, 2)))


def _moving_box(change: Float[np.ndarray, "t h w"], step: int) -> tuple[slice, slice] | None:
    """The part of the full pictures in which something moves, with a margin for what of the object does not."""
    box = _window(_moving(change), margin=0)
    if box is None:
        return None
    margin = round(MOTION_MARGIN * max(side.stop - side.start for side in box))
    rows, columns = (slice(max(side.start - margin, 0) * step, (side.stop + margin) * step) for side in box)
    return rows, columns


def reduced(layer: Shaped[np.ndarray, "H W"], step: int) -> Float[np.ndarray, "h w"]:
    """Means over squares of `step` pixels; what is left over at the right and below is dropped."""
    height, width = (side // step * step for side in layer.shape)
    parts = layer[:height, :width].reshape(height // step, step, width // step, step)
    return parts.mean(axis=(1, 3), dtype=np.float32)


def _without_plain_background(clip: Clip, background: Background) -> Foreground:
    from sv4d_ns.utils.progress import bar_if_slow  # brings nerfstudio's console

    behind = [background.at(index, clip.region) for index in range(len(clip.frames))]
    different = np.stack(
        [plain.distance(frame[..., :3]) > plain.contrast for frame, plain in zip(clip.frames, behind, strict=True)]
    )
    corners = _still_corners(clip.frames, different)
    different &= ~corners
    solid = np.stack([_without_specks(mask) for mask in different])
    if solid.mean(axis=(1, 2)).max() < MIN_OBJECT_SHARE:
        raise _nothing_visible(clip)
    frames = len(solid)
    with bar_if_slow("Cutting the object out") as show:
        whole = _fill_closed_pockets(clip.frames, solid, behind, lambda done: show(done, 2 * frames))
        cutouts, contrasts = _cut_out(clip.frames, whole, behind, lambda done: show(frames + done, 2 * frames))
    confidence = background.plain_share * contrasts
    messages = [f"A plain background of colour {background.colour} was removed, confidence {confidence:.2f}."]
    if corners.any():
        messages.append("The corners of the picture have another colour in all frames (a frame?): they were left out.")
    return Foreground(
        cutouts,
        "plain background",
        confidence,
        tuple(messages),
        background,
        filled=whole & ~solid,
        dropped=different & ~solid & ~whole,
    )


def _still_corners(
    frames: UInt8[np.ndarray, "t h w 4"], different: Bool[np.ndarray, "t h w"]
) -> Bool[np.ndarray, "h w"]:
    """What fills corners of the picture in all frames alike: the rounded corners of a frame, a mask of the lens."""
    always = np.asarray(different.all(axis=0))
    result = np.zeros_like(always)
    corners = [(y, x) for y in (0, -1) for x in (0, -1) if always[y, x]]
    if not corners or len(frames) < 2:
        return result
    some = frames[:: max(1, len(frames) // 8), :, :, :3].astype(np.int16)
    labels, _ = ndimage.label(always)
    for number in {labels[corner] for corner in corners}:
        piece = labels == number
        colours = some[:, piece]
        still = np.abs(colours - np.median(colours, axis=(0, 1))).max(axis=-1) <= CORNER_TOLERANCE
        if piece.mean() <= MAX_CORNER and still.mean() > 0.9:
            result |= ndimage.binary_dilation(piece, iterations=2)
    return result


def _cut_out(
    frames: UInt8[np.ndarray, "t h w 4"],
    solid: Bool[np.ndarray, "t h w"],
    behind: list[FrameBackground],
    told: Callable[[int], None],
) -> tuple[UInt8[np.ndarray, "t h w 4"], float]:
    """The object with soft edges, and the share of its outline that stands out."""
    cutouts = np.full_like(frames, 255)
    cutouts[..., 3] = 0
    clear, total = 0, 0
    reach = max(2, round(min(frames.shape[1:3]) / 400))
    for number, (source, mask, plain, target) in enumerate(zip(frames, solid, behind, cutouts, strict=True), start=1):
        told(number)
        window = _window(mask, margin=4 * reach)
        if window is None:
            continue
        colours = source[window][..., :3].astype(np.float32)
        matte, edge_contrast = _matte(colours, mask[window], plain.part(window), reach)
        target[window] = matte
        clear += int((edge_contrast > 2 * plain.contrast).sum())
        total += edge_contrast.size
    return cutouts, clear / max(total, 1)


def _without_specks(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(SPECK_PIXELS, SPECK_SHARE * sizes.max()))[labels]


def _fill_closed_pockets(
    frames: UInt8[np.ndarray, "t h w 4"],
    solid: Bool[np.ndarray, "t h w"],
    behind: list[FrameBackground],
    told: Callable[[int], None],
) -> Bool[np.ndarray, "t h w"]:
    """The solid pixels with enclosed background filled, except where it opens to the outside or is surely seen."""
    opened = ~np.stack([ndimage.binary_fill_holes(mask) for mask in solid])
    if all(plain.vividness >= VIVID for plain in behind):
        return solid
    least = OPEN_SHARE * solid.sum(axis=(1, 2)).max()
    looks = []
    for frame, mask, outside, plain in zip(frames, solid, opened, behind, strict=True):
        looks.append(_see_through(frame[..., :3], ~mask & ~outside, plain, least))
        told(len(looks))
    pockets = [labels for labels, _ in looks]
    opened |= _surely_open(pockets, [sure for _, sure in looks])
    places = [np.flatnonzero(labels) for labels in pockets]
    names = [labels.ravel()[place] for labels, place in zip(pockets, places, strict=True)]
    flat = opened.reshape(len(opened), -1)
    # forwards and backwards, so that a pocket counts as open for as long as it can be followed
    for order in (range(len(solid)), range(len(solid) - 1, -1, -1)):
        for index in order:
            sizes = np.bincount(names[index])
            for neighbour in range(max(index - OPEN_REACH, 0), min(index + OPEN_REACH + 1, len(solid))):
                overlaps = np.bincount(names[index][flat[neighbour, places[index]]], minlength=len(sizes))
                is_open = overlaps >= OPEN_OVERLAP * np.maximum(sizes, 1)
                flat[index, places[index]] |= is_open[names[index]]
    return ~opened


def _surely_open(
    pockets: list[Integer[np.ndarray, "h w"]], sure: list[Bool[np.ndarray, " n"]]
) -> Bool[np.ndarray, "t h w"]:
    """Pockets through which the background is seen whatever the frames around say: those that come and go among the
    labels that are sure."""
    lasting, _ = ndimage.label(np.stack(pockets) > 0)
    life = np.array([0, *(span[0].stop - span[0].start for span in ndimage.find_objects(lasting))])
    found = np.stack([chosen[labels] for chosen, labels in zip(sure, pockets, strict=True)])
    return found & (life < OPEN_LIFE * len(pockets))[lasting]


def _see_through(
    colours: UInt8[np.ndarray, "h w 3"], pockets: Bool[np.ndarray, "h w"], background: FrameBackground, least: float
) -> tuple[Integer[np.ndarray, "h w"], Bool[np.ndarray, " n"]]:
    """Labels of the pockets that look like the background itself, with a sharp rim, 0 elsewhere; and which labels are
    sure to be more than the light in an eye: of `least` pixels, and hardly unlike the background.

    Fur or cloth in the colour of the background is shaded: it differs a little, and fades into its surroundings. What
    is as small as an eye's light must be exactly like the background.
    """
    result = np.zeros(pockets.shape, np.int32)
    window = _window(pockets, margin=4)
    if window is None:
        return result, np.zeros(1, bool)
    labels, count = ndimage.label(pockets[window])
    numbers = np.arange(1, count + 1)
    background = background.part(window)
    distance = background.distance(colours[window])
    rim = ndimage.grey_dilation(labels, size=(7, 7)) * (ndimage.grey_dilation(labels, size=(5, 5)) == 0)
    unlike = _medians(distance, labels, numbers) / background.contrast
    large = np.bincount(labels.ravel())[1:] >= least
    sharp = _medians(distance, rim, numbers) >= 3 * background.contrast
    alike = unlike <= np.where(large, ALIKE, SMALL_ALIKE)
    seen = np.concatenate([[False], sharp & alike])
    sure = np.concatenate([[False], large & (unlike <= OPEN_LIKENESS)])
    result[window] = labels * seen[labels]
    return result, sure & seen


def _medians(
    values: Float[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"], numbers: Integer[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Of the values with each label; nan where there are none."""
    inside = labels > 0
    return np.asarray(ndimage.median(values[inside], labels[inside], numbers))


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
    colours: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], background: FrameBackground, reach: int
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

    plain = background.of(band)
    towards_object = nearby - plain
    observed = colours[band] - plain
    coverage = (observed * towards_object).sum(axis=-1) / np.maximum((towards_object**2).sum(axis=-1), 1e-6)
    coverage = coverage.clip(0, 1)
    coverage[distance[band] <= 2 + 3 * background.noise] = 0
    contrast = np.abs(towards_object).max(axis=-1)
    hard = contrast <= background.contrast
    coverage[hard] = mask[band][hard]

    alpha = core.astype(np.float32)
    alpha[band] = coverage
    clean = colours.copy()
    own = (plain + observed / np.maximum(coverage, 1e-3)[:, None]).clip(0, 255)
    # the smaller the coverage the more its division amplifies noise, so the neighbours' colour takes over
    clean[band] = np.where(hard[:, None], colours[band], coverage[:, None] * own + (1 - coverage[:, None]) * nearby)
    clean[alpha == 0] = 255
    return np.dstack([clean, 255 * alpha]).round().clip(0, 255).astype(np.uint8), contrast


def _nothing_visible(clip: Clip) -> InputError:
    return InputError(
        f"{clip.source} shows no visible object: give a video in which the object differs from its background."
    )


def _check_coverage(clip: Clip, foreground: Foreground) -> None:
    share = (foreground.alpha >= 128).mean(axis=(1, 2))
    if share.max() < MIN_OBJECT_SHARE:
        raise _nothing_visible(clip)
    if share.mean() > MAX_OBJECT_SHARE:
        raise InputError(
            f"The object covers all of {clip.source}: give a video that shows it whole, with space around."
        )
    uncut = np.flatnonzero((foreground.alpha == 255).all(axis=(1, 2)))
    if len(uncut):
        named = "masks" if foreground.method == "masks" else "alpha channel"
        raise InputError(
            f"The {named} of {clip.source} cut nothing out in {len(uncut)} of {len(share)} frames (first: {uncut[0]}): "
            "the object has to be cut out in all frames or in none; leave these out, or give masks "
            "(--pipeline.datamanager.masks)."
        )
