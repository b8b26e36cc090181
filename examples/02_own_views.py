"""Videos of one object from several sides (filmed, rendered, or made by another model) become a view grid.

    python examples/02_own_views.py grid input.mp4 right.mp4 back.mp4 left.mp4 --azimuths 90 180 270
    ns-train sv4d --data grid

The first video is the input view; the others are seen from the azimuths given, relative to it: 90 is a quarter turn
counter-clockwise as seen from above. All have the same number of frames; cut out (alpha) or before a plain background.
"""

from pathlib import Path

import numpy as np
import tyro

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.errors import InputError, one_sentence_errors
from sv4d_ns.utils.images import resize_rgba
from sv4d_ns.video import read_clip, segment
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
    if len(videos) != 1 + len(azimuths):
        raise InputError(f"{len(videos)} videos and {len(azimuths)} --azimuths: give one for each video but the first.")
    clips = [read_clip(video) for video in videos]
    shortest = min(len(clip.frames) for clip in clips)
    pictures = [resize_rgba(segment(clip).frames[:shortest], size) for clip in clips]
    plan = ViewPlan(azimuths, (0.0,) * len(azimuths), input_elevation_deg=elevation)
    grid = ViewGrid(
        pictures[0], np.stack(pictures[1:], axis=1), plan, clips[0].fps, provenance={"source": [str(v) for v in videos]}
    )
    print(f"{grid.save(folder)}: {grid.num_frames} frames of {1 + grid.num_views} views")


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(main)
