"""From a file of any kind to square, cut-out pictures of one object, and the way back to the source."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sv4d_ns.video.background import without_bars
from sv4d_ns.video.checks import Finding, examine
from sv4d_ns.video.crop import (
    FRAME_RATIO,
    VISIBLE_ALPHA,
    CropRule,
    Framing,
    fixed_framing,
    is_framed,
    released_framing,
    released_preprocess,
    union_box,
    whole_framing,
)
from sv4d_ns.video.foreground import Foreground, segment
from sv4d_ns.video.matting import BUNDLED, load_matting, read_masks
from sv4d_ns.video.reader import Clip, Region, choose_frames, open_film, read_clip, take
from sv4d_ns.video.stabilised import StabilisedFraming, stabilised_framing

__all__ = [
    "Clip",
    "CropRule",
    "Foreground",
    "Framing",
    "ObjectVideo",
    "StabilisedFraming",
    "fixed_framing",
    "load_object_video",
    "read_clip",
    "released_preprocess",
    "segment",
]


@dataclass(frozen=True, eq=False)
class ObjectVideo:
    """A video of one object, cut out and framed: what view synthesis starts from."""

    frames: UInt8[np.ndarray, "t size size 4"]
    """sRGB, straight alpha."""
    fps: float
    framing: Framing | StabilisedFraming
    """The square of the source video the frames show, or one for each frame."""
    confidence: float
    """0 to 1: how sure the separation of object and background is."""
    messages: tuple[str, ...]
    """What was decided on the way, a sentence each."""
    findings: tuple[Finding, ...]
    """What may spoil the result, and where in `frames` it is seen."""
    source: str
    """The path of the video."""


def load_object_video(
    path: Path,
    size: int,
    max_frames: int | None = None,
    frame_ratio: float = FRAME_RATIO,
    fps: float | None = None,
    masks: Path | None = None,
    matting: str | None = BUNDLED,
    crop: CropRule = CropRule.AUTO,
) -> ObjectVideo:
    """Read a video, cut the object out and frame it.

    Args:
        path: anything `read_clip` reads.
        size: side of the square frames, pixels.
        max_frames: keep at most so many frames, evenly spaced in time.
        frame_ratio: share of the frame that the longer side of the object fills over the whole clip, in (0, 1].
        fps: keep so many frames a second instead of a number of frames; the rate of pictures, which carry none.
        masks: a folder, pattern or video of masks, which then separate object and background.
        matting: name of the model that finds the object where the background is not plain (`MATTING_MODELS`).
        crop: which square of the video is shown.

    Raises:
        InputError: the file cannot be read, or no object can be told from its background.
    """
    model = load_matting(matting) if matting else None
    film = open_film(path).at_rate(fps)
    chosen = choose_frames(film, max_frames, fps)

    def cut_out(clip: Clip, known: Foreground | None) -> Foreground:
        given = read_masks(masks, film, chosen, clip.region) if masks else None
        return segment(clip, given, model, known.background if known else None)

    clip = take(film, chosen)
    bars = None if clip.has_alpha or masks else without_bars(clip)
    if bars is not None:
        clip = take(film, chosen, bars)
        sizes = f"{bars.width}x{bars.height} of {bars.source_width}x{bars.source_height} pixels"
        cropped = f"Bars of one colour were cut off: {sizes}."
        clip = replace(clip, messages=(*clip.messages, cropped))
    foreground = cut_out(clip, None)
    findings = examine(clip, foreground)
    framing: Framing | StabilisedFraming
    if crop is CropRule.RELEASED:  # its square is around the middle of the whole picture
        framing, pictures = released_framing(foreground.frames, size, frame_ratio)
        findings = [_framed(finding, framing) for finding in findings]
    else:
        frame = _framing_rule(crop, foreground, frame_ratio)
        framing = frame(foreground.alpha, size)
        findings = [_framed(finding, framing) for finding in findings]
        closer = _closer_look(clip, foreground, framing)
        if closer is not None:
            clip = replace(take(film, chosen, closer), messages=clip.messages)
            foreground = cut_out(clip, foreground)
        framing, pictures = frame(foreground.alpha, size), foreground.frames
    return ObjectVideo(
        framing.apply(pictures),
        clip.fps,
        framing.in_source(clip.region),
        foreground.confidence,
        (*clip.messages, *foreground.messages),
        tuple(findings),
        clip.source,
    )


def _framing_rule(
    crop: CropRule, foreground: Foreground, frame_ratio: float
) -> Callable[[UInt8[np.ndarray, "t h w"], int], Framing | StabilisedFraming]:
    """What makes the framing from the object's coverage and a size in pixels."""
    if crop is CropRule.AUTO and is_framed(foreground.alpha):
        return whole_framing
    return partial(stabilised_framing if crop is CropRule.STABILISED else fixed_framing, frame_ratio=frame_ratio)


def _closer_look(clip: Clip, foreground: Foreground, framing: Framing | StabilisedFraming) -> Region | None:
    """The part of a scaled-down clip to read again, because the crop would show it smaller than it was filmed."""
    region, scale = clip.region, clip.region.scale
    side = (framing.squares[0] if isinstance(framing, StabilisedFraming) else framing).side / scale
    wanted = min(1.0, framing.size / side)
    if scale >= wanted:
        return None
    if isinstance(framing, Framing) and framing.side == clip.frames.shape[2]:
        return replace(region, scale=wanted)
    margin = 0.1 * side  # the background's pixels around the object, which the cut-out needs
    x0, y0, x1, y1 = (edge / scale for edge in union_box(foreground.alpha >= VISIBLE_ALPHA))
    left, top = max(int(x0 - margin), 0), max(int(y0 - margin), 0)
    right, bottom = min(int(x1 + margin) + 1, region.width), min(int(y1 + margin) + 1, region.height)
    return replace(
        region,
        left=region.left + left,
        top=region.top + top,
        width=right - left,
        height=bottom - top,
        scale=wanted,
    )


def _framed(finding: Finding, framing: Framing | StabilisedFraming) -> Finding:
    """A finding that points into the crop instead of the clip."""
    if finding.where is None:
        return finding
    levels = 255 * finding.where.astype(np.uint8)
    layers = np.stack([levels, levels, levels, np.full_like(levels, 255)], axis=-1)
    shown = framing.apply(layers)
    return replace(finding, where=(shown[..., 0] >= 128) & (shown[..., 3] >= 128))
