"""`sv4d doctor VIDEO`: what the main job would make of a video, and what may spoil it, in seconds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from jaxtyping import Bool, UInt8

from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import atomic_path

if TYPE_CHECKING:
    from sv4d_ns.video import ObjectVideo
    from sv4d_ns.video.checks import Finding

SHEET_COLUMNS = 7
"""Frames in a row of --picture: three rows of 21 fit a screen."""


def _as_in_training(name: str) -> Any:
    """A setting under the flag it has in ns-train, too: what the findings advise can be tried here."""
    return tyro.conf.arg(aliases=[f"--pipeline.datamanager.{name.replace('_', '-')}"])


@dataclass
class Doctor:
    """Read a video, cut the object out and frame it as ns-train sv4d does, and say what was chosen and what to mend."""

    video: Annotated[Path, tyro.conf.Positional]
    """A video, an animated picture, a folder of pictures or a pattern."""
    max_frames: Annotated[int | None, _as_in_training("max_frames")] = None
    """Frames taken from the video, evenly in time; 21 where no rate is given."""
    fps: Annotated[float | None, _as_in_training("fps")] = None
    """Take so many frames a second instead."""
    masks: Annotated[Path | None, _as_in_training("masks")] = None
    """A folder, pattern or video of masks, one for each frame."""
    matting: Annotated[str | None, _as_in_training("matting")] = "u2netp"
    """Model that finds the object where the background is not plain."""
    crop: Annotated[Literal["auto", "fixed", "stabilised", "released"], _as_in_training("crop")] = "auto"
    """The square shown to the model."""
    picture: Path | None = None
    """Write the cut-out frames as one picture (png), with what was found marked in colours."""


def command(arguments: Sequence[str]) -> None:
    """`sv4d doctor`: parse the flags and report.

    Raises:
        InputError: the video cannot be used.
    """
    report(tyro.cli(Doctor, prog="sv4d doctor", args=list(arguments)))


def examine(settings: Doctor) -> "ObjectVideo":
    """The video, cut out and framed as a run does it, with what was found.

    Raises:
        InputError: the video cannot be used.
    """
    from sv4d_ns.fitting.settings import INPUT_SIZE, frames_taken
    from sv4d_ns.video import CropRule, load_object_video

    return load_object_video(
        settings.video,
        INPUT_SIZE,
        frames_taken(settings.max_frames, settings.fps),
        fps=settings.fps,
        masks=settings.masks,
        matting=settings.matting,
        crop=CropRule(settings.crop),
    )


def marks_of(findings: Sequence["Finding"]) -> dict[str, str]:
    """The colour, of `MARKS`, for the name of each finding that can be pointed at."""
    return dict(zip((f.name for f in findings if f.where is not None), itertools.cycle(MARKS), strict=False))


def report(settings: Doctor) -> None:
    """Print what was read and chosen, and a line for each finding.

    Raises:
        InputError: the video cannot be used, or the picture is to be something else than a PNG.
    """
    from sv4d_ns.diffusion.bundled import REACH
    from sv4d_ns.utils.progress import say

    if settings.picture is not None and settings.picture.suffix.lower() != ".png":
        raise InputError(f"--picture {settings.picture} does not end in .png: the cut-outs are written as a PNG.")
    video = examine(settings)
    say(f"{settings.video}: {len(video.frames)} frames at {video.fps:g} per second.")
    marks = marks_of(video.findings)
    for message in video.messages:
        say(f"- {message}")
    for finding in video.findings:
        mark = f" (In the picture: {marks[finding.name]}.)" if finding.where is not None and settings.picture else ""
        say(f"- {finding.sentence}{mark}")
    if not video.findings:
        say("Nothing was found that would spoil the result.")
    say(f"How far the bundled model reaches, which a run on a CPU takes: {REACH}")
    if settings.picture is not None:
        write_marked_sheet(video, settings.picture, SHEET_COLUMNS)
        say(f"The cut-out frames: {settings.picture}")


MARKS = {
    "magenta": (255, 0, 220),
    "cyan": (0, 210, 255),
    "yellow": (255, 225, 0),
    "green": (0, 220, 60),
    "orange": (255, 130, 0),
}
"""Colours in which findings are marked."""


def write_marked_sheet(video: "ObjectVideo", path: Path, columns: int | None = None) -> None:
    """All cut-out frames, with what was found marked; in one row where no number of columns is given."""
    marks = marks_of(video.findings)
    places = [(MARKS[marks[f.name]], f.where) for f in video.findings if f.where is not None]
    write_sheet(video.frames, path, places, columns or len(video.frames))


def write_sheet(
    frames: UInt8[np.ndarray, "t h w 4"],
    path: Path,
    marks: Sequence[tuple[tuple[int, int, int], Bool[np.ndarray, "t h w"]]],
    columns: int,
) -> None:
    """Frames in rows on grey, which shows white fringes and holes; places marked by their outlines in colours."""
    from PIL import Image
    from scipy import ndimage

    from sv4d_ns.utils.images import tiled

    share = frames[..., 3:] / 255
    pictures = (frames[..., :3] * share + 128 * (1 - share)).round().astype(np.uint8)
    for colour, places in marks:
        for picture, place in zip(pictures, places, strict=True):
            inside = picture[place]
            picture[place] = (0.5 * inside + 0.5 * np.asarray(colour)).astype(np.uint8)
            picture[ndimage.binary_dilation(place, iterations=2) & ~place] = colour
    columns = min(len(pictures), columns)
    blank = np.full((-len(pictures) % columns, *pictures.shape[1:]), 128, np.uint8)
    rows = np.concatenate([pictures, blank]).reshape(-1, columns, *pictures.shape[1:])
    with atomic_path(path) as temporary:
        Image.fromarray(tiled(rows)).save(temporary, format="PNG")
