"""`sv4d doctor VIDEO`: what the main job would make of a video, and what may spoil it, in seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from jaxtyping import UInt8

from sv4d_ns.utils.files import atomic_path


@dataclass
class Doctor:
    """Read a video, cut the object out and frame it as ns-train sv4d does, and say what was chosen and what to mend."""

    video: Annotated[Path, tyro.conf.Positional]
    """A video, an animated picture, a folder of pictures or a pattern."""
    max_frames: int | None = None
    """As --pipeline.datamanager.max-frames of ns-train sv4d; 21 where no rate is given."""
    fps: float | None = None
    """As --pipeline.datamanager.fps."""
    masks: Path | None = None
    """As --pipeline.datamanager.masks."""
    matting: str | None = None
    """As --pipeline.datamanager.matting."""
    crop: Literal["fixed", "stabilised", "released"] = "fixed"
    """As --pipeline.datamanager.crop."""
    picture: Path | None = None
    """Write the cut-out frames side by side as one picture (png)."""


def command(arguments: Sequence[str]) -> None:
    """`sv4d doctor`: parse the flags and report.

    Raises:
        InputError: the video cannot be used.
    """
    report(tyro.cli(Doctor, prog="sv4d doctor", args=list(arguments)))


def report(settings: Doctor) -> None:
    """Print what was read and chosen, and a line for each finding."""
    from sv4d_ns.plugin.datamanager import SV4DDataManagerConfig, read_video

    shared = {name: getattr(settings, name) for name in ("max_frames", "fps", "masks", "matting", "crop")}
    config = SV4DDataManagerConfig(data=settings.video, **shared)
    video = read_video(config)
    print(f"{settings.video}: {len(video.frames)} frames at {video.fps:g} per second.")
    for message in (*video.messages, *(finding.sentence for finding in video.findings)):
        print(f"- {message}")
    if not video.findings:
        print("Nothing was found that would spoil the result.")
    if settings.picture is not None:
        write_sheet(video.frames, settings.picture)
        print(f"The cut-out frames: {settings.picture}")


def write_sheet(frames: UInt8[np.ndarray, "t h w 4"], path: Path) -> None:
    """Frames side by side on grey, which shows white fringes and holes."""
    from PIL import Image

    share = frames[..., 3:] / 255
    pictures = (frames[..., :3] * share + 128 * (1 - share)).round().astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(list(pictures), axis=1)).save(temporary, format="PNG")
