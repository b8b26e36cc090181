"""From a file of any kind to square, cut-out pictures of one object, and the way back to the source."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sv4d_ns.video.clip import Clip, read_clip
from sv4d_ns.video.foreground import Foreground, segment
from sv4d_ns.video.framing import FRAME_RATIO, Framing, fixed_framing, released_preprocess

__all__ = [
    "Clip",
    "Foreground",
    "Framing",
    "ObjectVideo",
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
    framing: Framing
    """The square of the source video the frames show."""
    confidence: float
    """0 to 1: how sure the separation of object and background is."""
    messages: tuple[str, ...]
    """What was decided on the way and what the user may want to change, a sentence each."""
    source: str
    """The path of the video."""


def load_object_video(
    path: Path, size: int, max_frames: int | None = None, frame_ratio: float = FRAME_RATIO
) -> ObjectVideo:
    """Read a video, cut the object out and frame it.

    Args:
        path: anything `read_clip` reads.
        size: side of the square frames, pixels.
        max_frames: keep at most so many frames, evenly spaced in time.
        frame_ratio: share of the frame that the longer side of the object fills over the whole clip, in (0, 1].

    Raises:
        InputError: the file cannot be read, or no object can be told from its background.
    """
    clip = read_clip(path, max_frames)
    foreground = segment(clip)
    framing = fixed_framing(foreground.alpha, size, frame_ratio)
    messages = (*clip.messages, *foreground.messages)
    return ObjectVideo(
        framing.apply(foreground.frames), clip.fps, framing, foreground.confidence, messages, clip.source
    )
