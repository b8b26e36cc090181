"""Videos of one object from several sides (filmed, rendered, or made by another model) become a view grid.

    python examples/02_own_views.py grid input.mp4 right.mp4 back.mp4 left.mp4 --azimuths 90 180 270
    ns-train sv4d --data grid

The first video is the input view; the others are seen from the azimuths given, relative to it: 90 is a quarter turn
counter-clockwise as seen from above. All are square and show the same moments: the same frame rate, the same number of
frames. They are cut out (alpha) or before a plain background.
"""

from pathlib import Path

import numpy as np
import tyro

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.errors import InputError, one_sentence_errors
from sv4d_ns.utils.images import resize_rgba
from sv4d_ns.utils.limits import between, check_value
from sv4d_ns.video import read_clip, segment
from sv4d_ns.video.reader import Clip
from sv4d_ns.views.grid import ViewGrid


def main(
    folder: Path, videos: list[Path], /, azimuths: tuple[float, ...], elevation: float = 0.0, size: int = 256
) -> None:
    """Make a view grid of videos.

    Args:
        folder: where the grid is written.
        videos: the input view, then the others, square and with the object in the middle of the same cameras.
        azimuths: of the others, degrees.
        elevation: of all cameras above the horizon, degrees.
        size: pixels along the side of the grid's pictures.
    """
    check_value("size", size, between(16, 2048, "16 to 2048 pixels"))
    if len(videos) != 1 + len(azimuths):
        raise InputError(f"{len(videos)} videos and {len(azimuths)} --azimuths: give one for each video but the first.")
    angles = [0.0, *(azimuth % 360 for azimuth in azimuths)]
    if len(set(angles)) < len(angles):
        raise InputError(
            f"--azimuths {azimuths} name one place twice (the first video stands at 0): give each its own."
        )
    clips = [read_clip(video) for video in videos]
    for video, clip in zip(videos, clips, strict=True):
        check_like_the_first(video, clip, clips[0])
    pictures = [resize_rgba(segment(clip).frames, size) for clip in clips]
    plan = ViewPlan(azimuths, (0.0,) * len(azimuths), input_elevation_deg=elevation)
    grid = ViewGrid(
        pictures[0], np.stack(pictures[1:], axis=1), plan, clips[0].fps, provenance={"source": [str(v) for v in videos]}
    )
    print(f"{grid.save(folder)}: {grid.num_frames} frames of {1 + grid.num_views} views")


def check_like_the_first(video: Path, clip: Clip, first: Clip) -> None:
    """Raises `InputError` for a video that is not square, or cannot show the moments of the first one."""
    height, width = clip.frames.shape[1:3]
    if height != width:
        raise InputError(f"{video} is {width}x{height}: crop it to a square around the middle of its camera's picture.")
    if len(clip.frames) != len(first.frames) or abs(clip.fps / first.fps - 1) > 0.02:
        raise InputError(
            f"{video} has {len(clip.frames)} frames at {clip.fps:g} per second, the first video {len(first.frames)} at "
            f"{first.fps:g}: cut them to the same moments, at one frame rate."
        )


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(main)
