"""What may spoil the result, told before the work begins: each finding with what to do about it.

The thresholds are our own design; they were set on the public benchmark clips (none of which is flagged) and on the
deliberately bad clips of the tests.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt8
from scipy import ndimage

from sv4d_ns.video.background import FrameBackground
from sv4d_ns.video.foreground import MIN_OBJECT_SHARE, SURE, Foreground, reduced
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
PATCH_SHARE = 0.003
"""An opening that was filled is told from this share of the object's area on."""
DROPPED_PIXELS, DROPPED_SHARE = 8, 3e-4
"""An island that was left out is told from so many pixels, and from this share of the object's area, on."""
UNDECIDED, UNDECIDED_WIDTH, UNDECIDED_SHARE = (26, 230), 0.02, 0.01
"""A matting model is undecided where it sees so much coverage, of 255, in a patch wider than a soft edge (of the root
of the object's area) and this share of the object's area large. Of knight, fox and rabbit of the benchmark before
six photographs this names 32 of 47 pieces that are missing; 44 of the 79 patches named are wrong in the cut-out. What a
model leaves out without a doubt, as of the rabbit, is not named."""
MOST_NAMED = 6
"""So many patches are described one by one."""
LOOSE_GAP = 0.15
LOOSE_SHARE, SEVERAL_MOST = 0.004, 0.6
"""A part hangs loose if the gap to the object is at most so wide (of the root of the object's area), and its own area
is between these shares of the object's."""
STAYS = 0.8
"""Share of the frames in which a small part must be in its place to be one that never moves."""
SHADOW_SHARE = 0.02
SHADOW_HUE, SHADOW_DARKEST, SHADOW_STEEPEST = 0.06, 0.4, 8.0
"""A shadow is this share of the cut-out or more; its colour is the background's times a factor that differs by at most
so much between the channels and is at least so large; it changes by at most so many levels from pixel to pixel."""
HARD_DARKEST, HARD_SPREAD, HARD_WIDTH = 0.15, 0.05, 1.5
"""With a hard edge it may be so much darker, if that factor spreads by at most so much of itself (things have light and
shade of their own), and if it is so many times as wide as high: it lies on the floor."""
COMBED = 0.1
"""Share of torn pixels, of all at horizontal edges, from which a frame is interlaced."""
WORK_SIZE = 256
"""Longer side of the reduced pictures in which motion is measured, pixels."""


@dataclass(frozen=True)
class Finding:
    """Something about the clip that may spoil the result."""

    name: str
    """One of the names of `CHECKS`."""
    sentence: str
    """What was seen, in which frames, and what to do."""
    where: Bool[np.ndarray, "t h w"] | None = None
    """The pixels it is about, where it is about some."""


def examine(clip: Clip, foreground: Foreground) -> list[Finding]:
    """Everything the doctor finds, in the order of `CHECKS`."""
    case = _Case.of(clip, foreground)
    findings = []
    for name, check in CHECKS.items():
        for found in check(case):
            sentence, where = (found, None) if isinstance(found, str) else found
            findings.append(Finding(name, sentence, where))
    return findings


Found = str | tuple[str, Bool[np.ndarray, "t h w"]]
"""A sentence, and where in the clip what it says is seen, if that can be pointed at."""


@dataclass(frozen=True)
class _Case:
    """Clip and cut-out, and both once more at the size in which motion is measured."""

    clip: Clip
    foreground: Foreground
    grey: Float[np.ndarray, "t h w"]
    """Mean level of the source pictures, reduced."""
    solid: Bool[np.ndarray, "t h w"]
    """Where the object is, reduced."""
    step: int
    """Pixels of the clip along a side of a reduced one."""

    @classmethod
    def of(cls, clip: Clip, foreground: Foreground) -> "_Case":
        step = max(1, -(-max(clip.frames.shape[1:3]) // WORK_SIZE))
        grey = np.stack([reduced(frame[..., :3].mean(axis=-1), step) for frame in clip.frames])
        solid = np.stack([reduced(alpha.astype(np.float32), step) >= 128 for alpha in foreground.alpha])
        return cls(clip, foreground, grey, solid, step)


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


def _cutout_is_a_guess(case: _Case) -> Iterator[str]:
    if case.foreground.method == "matting" and case.foreground.confidence < SURE:
        yield (
            f"The cut-out is a guess (confidence {case.foreground.confidence:.2f}): the model is undecided, or what "
            "moves in the video is not what it took as the object; look at it (sv4d doctor --picture), and film before "
            "a plain background or give masks (--pipeline.datamanager.masks)."
        )


def _undecided(case: _Case) -> Iterator[Found]:
    """Where the matting model half sees the object: a leg it lost looks like that, and background it took."""
    if case.foreground.method != "matting":
        return
    area = case.solid.sum(axis=(1, 2)).max() * case.step**2
    width = max(3, round(UNDECIDED_WIDTH * np.sqrt(area)))
    low, high = UNDECIDED
    half = (case.foreground.alpha >= low) & (case.foreground.alpha < high)
    half = np.stack([ndimage.binary_opening(frame, np.ones((width, width))) for frame in half])
    patches = _tracked(half, case.step, UNDECIDED_SHARE * area)
    if patches:
        yield (
            f"The model is undecided about {_those(patches, area, case)}: the object may lack a part there, or hold "
            "some of the background; look at them (sv4d doctor --picture), and film before a plain background or give "
            "masks (--pipeline.datamanager.masks).",
            _painted(half, patches, case.step),
        )


def _combed(case: _Case) -> Iterator[str]:
    if case.clip.region.scale != 1:
        return  # scaling has mixed the lines
    combed = np.array([_comb_share(frame[..., 1].astype(np.int32)) > COMBED for frame in case.clip.frames])
    if combed.any():
        yield (
            f"{_count(combed)} show two moments in alternate lines (interlaced footage stored as progressive): moving "
            "edges are torn; deinterlace the video first, for one with `ffmpeg -i VIDEO -vf bwdif OUT`."
        )


def _comb_share(level: Shaped[np.ndarray, "h w"]) -> float:
    """Of the pixels that differ much from the lines above and below, the share that does so in the same direction.

    That of torn lines, and not of the lines that an edge or a thin thing makes: the line two above is like it.
    """
    above, below = level[2:-2] - level[1:-3], level[2:-2] - level[3:-1]
    steep = (np.abs(above) > 20) & (np.abs(below) > 20)
    torn = steep & (above * below > 0) & (np.abs(level[2:-2] - level[:-4]) < np.abs(above) / 2)
    torn &= np.abs(level[2:-2] - level[4:]) < np.abs(below) / 2
    edges = np.abs(level[2:-2] - level[:-4]) > 20
    return float(torn.sum() / max(torn.sum() + edges.sum(), 200))


def _filled(case: _Case) -> Iterator[Found]:
    """Each opening that was taken as part of the object, followed through the frames."""
    mask = case.foreground.filled
    if mask is None:
        return
    area = case.solid.sum(axis=(1, 2)).max() * case.step**2
    patches = _tracked(mask, case.step, PATCH_SHARE * area)
    if patches:
        yield (
            f"{_those(patches, area, case)} inside the object and in the colour of the background "
            f"{_were(patches)} taken as part of it: if you can look through there, give a video with an alpha channel, "
            "masks (--pipeline.datamanager.masks), or film before another colour.",
            _painted(mask, patches, case.step),
        )


def _dropped(case: _Case) -> Iterator[Found]:
    """Each island that was left out as too small to be part of the object."""
    mask = case.foreground.dropped
    if mask is None:
        return
    area = case.solid.sum(axis=(1, 2)).max() * case.step**2
    patches = _tracked(mask, 1, max(DROPPED_PIXELS, DROPPED_SHARE * area))
    if patches:
        yield (
            f"{_those(patches, area, case)} apart from the object {_were(patches)} left out as too small: if it "
            "belongs to the object, give masks (--pipeline.datamanager.masks) or a larger picture.",
            _painted(mask, patches, 1),
        )


@dataclass(frozen=True)
class _Patch:
    """A patch of pixels followed through the frames."""

    label: int
    labels: Integer[np.ndarray, "t h w"]
    frames: tuple[int, int]
    """First and last."""
    x: float
    y: float
    """Its middle in the clip, pixels."""
    largest: float
    """Pixels in the frame where it is largest."""


def _tracked(mask: Bool[np.ndarray, "t H W"], step: int, least: float) -> list[_Patch]:
    """The patches that are `least` pixels large in some frame, largest first."""
    if not mask.any():
        return []
    small = np.stack([reduced(frame, step) >= 0.5 for frame in mask]) if step > 1 else mask
    labels, count = ndimage.label(small, np.ones((3, 3, 3)))
    sizes = np.stack([np.bincount(frame.ravel(), minlength=count + 1) for frame in labels]) * step**2
    patches = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        largest = float(sizes[:, label].max())
        if box is not None and largest >= least:
            time, rows, columns = box
            x, y = (step * (side.start + side.stop) / 2 for side in (columns, rows))
            patches.append(_Patch(label, labels, (time.start, time.stop - 1), x, y, largest))
    return sorted(patches, key=lambda patch: -patch.largest)


def _those(patches: list[_Patch], area: float, case: _Case) -> str:
    """Where the patches are, in pixels of the source, and how large."""
    region = case.clip.region
    each = [
        f"{_frames(patch.frames)} at ({region.left + patch.x / region.scale:.0f}, "
        f"{region.top + patch.y / region.scale:.0f}), up to {patch.largest / area:.1%} of its area"
        for patch in patches[:MOST_NAMED]
    ]
    more = f"; {len(patches) - MOST_NAMED} smaller" if len(patches) > MOST_NAMED else ""
    return f"{len(patches)} {'patches' if len(patches) > 1 else 'patch'} ({'; '.join(each)}{more})"


def _were(patches: list[_Patch]) -> str:
    return "were" if len(patches) > 1 else "was"


def _frames(span: tuple[int, int]) -> str:
    return f"frame {span[0]}" if span[0] == span[1] else f"frames {span[0]} to {span[1]}"


def _painted(mask: Bool[np.ndarray, "t H W"], patches: list[_Patch], step: int) -> Bool[np.ndarray, "t H W"]:
    """The pixels of the patches."""
    chosen = np.isin(patches[0].labels, [patch.label for patch in patches])
    if step == 1:
        return chosen
    large = ndimage.binary_dilation(chosen, np.ones((1, 3, 3))).repeat(step, axis=1).repeat(step, axis=2)
    height, width = mask.shape[1:]
    large = np.pad(large, ((0, 0), (0, height - large.shape[1]), (0, width - large.shape[2])), mode="edge")
    return large & mask


def _loose(case: _Case) -> Iterator[Found]:
    """Parts of the object beside its largest one, with a gap in the colour of the background between them."""
    if case.foreground.method != "plain background":
        return
    where = np.zeros_like(case.solid)
    shares = np.zeros(len(case.solid))
    for index, mask in enumerate(case.solid):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        if count < 2:
            continue
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        main = labels == sizes.argmax()
        near = ndimage.binary_dilation(main, np.ones((3, 3)), iterations=max(3, round(LOOSE_GAP * np.sqrt(main.sum()))))
        for number in range(1, count + 1):
            if number == sizes.argmax() or not LOOSE_SHARE <= sizes[number] / main.sum() < SEVERAL_MOST:
                continue
            if (near & (labels == number)).any():
                where[index] |= labels == number
                shares[index] += sizes[number] / main.sum()
    loose = shares > 0
    if loose.any():
        yield (
            f"A part of the object hangs loose in {_count(loose)} (up to {shares.max():.1%} of its area): it may be "
            "cut through where its colour is that of the background; look at it (sv4d doctor --picture), and film "
            "before another colour or give masks (--pipeline.datamanager.masks).",
            _enlarged(where, case),
        )


def _still_part(case: _Case) -> Iterator[Found]:
    """Small parts beside the object that stay in their place while it moves: watermarks, logos, time stamps."""
    if len(case.solid) < 3 or case.foreground.method == "masks":
        return
    beside = np.zeros_like(case.solid)
    for index, mask in enumerate(case.solid):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        if count > 1:
            sizes = np.bincount(labels.ravel())
            sizes[0] = 0
            beside[index] = mask & (labels != sizes.argmax())
    usual = np.stack([ndimage.binary_dilation(mask, np.ones((3, 3))) for mask in beside]).mean(axis=0) >= STAYS
    labels, count = ndimage.label(usual, np.ones((3, 3)))
    largest = (case.solid & ~beside).sum(axis=(1, 2)).max()
    where = np.zeros_like(case.solid)
    for number in range(1, count + 1):
        part = beside & (labels == number)
        seen = part.any(axis=0).sum()
        if part.all(axis=0).sum() >= 0.5 * seen and 0 < seen < SEVERAL_SHARE * largest:
            where |= part
    if where.any():
        rows, columns = np.nonzero(where.any(axis=0))
        yield (
            f"Small parts at {_side(columns.mean(), rows.mean(), where.shape[1:])} of the picture never move (together "
            f"{len(rows) / largest:.1%} of the object's area; a watermark, a logo, a time stamp?): they become part of "
            "the asset and widen the crop; crop the video so that they are outside, or give masks "
            "(--pipeline.datamanager.masks).",
            _enlarged(where, case),
        )


def _side(x: float, y: float, shape: tuple[int, ...]) -> str:
    vertical = "top" if y < shape[0] / 3 else "bottom" if y > 2 * shape[0] / 3 else "middle"
    horizontal = "left" if x < shape[1] / 3 else "right" if x > 2 * shape[1] / 3 else ""
    return f"the {vertical} {horizontal}".rstrip()


def _shadow(case: _Case) -> Iterator[Found]:
    """What looks like the background itself, darker, and fades into it: a shadow on the floor."""
    background = case.foreground.background
    if background is None:
        return
    where = np.zeros_like(case.solid)
    for index, frame in enumerate(case.clip.frames):
        if case.solid[index].any():
            plain = background.at(index, case.clip.region)
            where[index] = _shadowed(_small(frame, case.step), _small_plain(plain, case.step), case.solid[index])
    shares = where.sum(axis=(1, 2)) / np.maximum(case.solid.sum(axis=(1, 2)), 1)
    shaded = shares >= SHADOW_SHARE
    if shaded.mean() >= SEVERAL_FRAMES:
        yield (
            f"What looks like a shadow on the background is part of the cut-out in {_count(shaded)} (up to "
            f"{shares.max():.0%} of it): it becomes part of the asset; light the object from all sides, lift it off "
            "the floor, or give masks (--pipeline.datamanager.masks).",
            _enlarged(where, case),
        )


def _shadowed(
    colours: Float[np.ndarray, "h w 3"], plain: FrameBackground, solid: Bool[np.ndarray, "h w"]
) -> Bool[np.ndarray, "h w"]:
    """Patches with the background's hue at or below the middle of the object: with a soft outer edge, or flat."""
    ratio = (colours + 1) / (plain.levels + 1)
    factor = ratio.mean(axis=-1)
    grey = colours.mean(axis=-1)
    smooth = np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1)) / 8 < SHADOW_STEEPEST
    candidates = solid & (np.ptp(ratio, axis=-1) <= SHADOW_HUE) & (factor < 1) & smooth
    soft, count = ndimage.label(candidates & (factor > SHADOW_DARKEST))
    where = _low_and_open(soft, count, solid, reach=1)[soft]
    hard, count = ndimage.label(candidates & (factor > HARD_DARKEST))
    # the edge itself is not smooth: the patch ends beside it
    return where | (_low_and_open(hard, count, solid, reach=3) & _flat_and_wide(hard, count, factor))[hard]


def _low_and_open(
    labels: Integer[np.ndarray, "h w"], count: int, solid: Bool[np.ndarray, "h w"], reach: int
) -> Bool[np.ndarray, " n"]:
    """Which patches lie at or below the middle of the object and have the background beside much of their outline."""
    outside = ndimage.binary_dilation(~solid, np.ones((3, 3)), iterations=reach)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    rim = np.bincount(labels[outside], minlength=count + 1)
    middle = ndimage.center_of_mass(solid)[0]
    heights = [0.0, *(place[0] for place in ndimage.center_of_mass(labels > 0, labels, range(1, count + 1)))]
    # the outline is as long as that of a disc at least
    found = (rim >= 0.25 * 2 * np.sqrt(np.pi * sizes)) & (np.asarray(heights) > middle)
    found[0] = False
    return found


def _flat_and_wide(
    labels: Integer[np.ndarray, "h w"], count: int, factor: Float[np.ndarray, "h w"]
) -> Bool[np.ndarray, " n"]:
    """Which patches have one level throughout and are wider than high."""
    found = np.zeros(count + 1, bool)
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        levels = factor[box][labels[box] == label]
        height, width = np.shape(labels[box])
        found[label] = width >= HARD_WIDTH * height and levels.std() <= HARD_SPREAD * levels.mean()
    return found


def _small(frame: UInt8[np.ndarray, "H W 4"], step: int) -> Float[np.ndarray, "h w 3"]:
    return np.stack([reduced(frame[..., channel], step) for channel in range(3)], axis=-1)


def _small_plain(plain: FrameBackground, step: int) -> FrameBackground:
    if plain.levels.ndim == 1:
        return plain
    return replace(plain, levels=np.stack([reduced(plain.levels[..., i], step) for i in range(3)], axis=-1))


def _enlarged(where: Bool[np.ndarray, "t h w"], case: _Case) -> Bool[np.ndarray, "t H W"]:
    """A mask of the reduced pictures at the size of the clip."""
    height, width = case.clip.frames.shape[1:3]
    large = where.repeat(case.step, axis=1).repeat(case.step, axis=2)
    return np.pad(large, ((0, 0), (0, height - large.shape[1]), (0, width - large.shape[2])), mode="edge")


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


CHECKS: dict[str, Callable[[_Case], Iterator[Found]]] = {
    "cut-out": _cutout_is_a_guess,
    "undecided": _undecided,
    "filled": _filled,
    "dropped": _dropped,
    "loose": _loose,
    "still part": _still_part,
    "shadow": _shadow,
    "combed": _combed,
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
