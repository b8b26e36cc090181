"""What runs beside the server, in processes of their own: `python -m sv4d_ns.app.work look|train|export ...`.

A video that crashes its decoder, or a run that takes all memory, ends its own process and never the server; and these
processes end with the server, however it ends.
"""

import json
import signal
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from sv4d_ns.app.jobs import without_flags
from sv4d_ns.cli.batch import train
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.processes import end_with_the_parent

if TYPE_CHECKING:
    from sv4d_ns.video import ObjectVideo

LOOK_FILE, CUTOUT_FILE, CROP_FILE = "look.json", "cutout.png", "crop.jpg"
RESULT_FOLDER, PAGE_FILE, OBJ_FOLDER, OBJ_FILE = "result", "index.html", "frames_obj", "frames_obj.zip"
CROP_WIDTH = 480
"""Pixels of the picture that shows what part of the video is used."""


@dataclass
class Export:
    """Every file the page offers, from one finished run."""

    load_config: Path
    folder: Path
    """Where the files go; older ones of the same names are replaced."""
    resolution: int
    max_faces: int
    texture_size: int | None = None


def look(arguments: Sequence[str]) -> None:
    """What `sv4d doctor` sees in a video, as JSON and pictures beside it; takes the doctor's arguments."""
    from sv4d_ns.cli.doctor import Doctor, examine, marks_of, write_marked_sheet

    settings = tyro.cli(Doctor, prog="look", args=list(arguments))
    folder = settings.video.parent
    video = examine(settings)
    write_marked_sheet(video, folder / CUTOUT_FILE)
    _write_crop(video, settings.video, folder / CROP_FILE)
    marks = marks_of(video.findings)
    findings = [
        {"text": without_flags(f.sentence), "mark": None if f.where is None else marks[f.name]} for f in video.findings
    ]
    with atomic_path(folder / LOOK_FILE) as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "frames": len(video.frames),
                    "fps": video.fps,
                    "confidence": video.confidence,
                    "messages": [without_flags(message) for message in video.messages],
                    "findings": findings,
                }
            )
        )


def _write_crop(video: "ObjectVideo", source: Path, path: Path) -> None:
    """The middle frame of the source, bright where the square of the run lies."""
    import numpy as np
    from PIL import Image, ImageDraw

    from sv4d_ns.utils.images import over_white
    from sv4d_ns.video import StabilisedFraming, read_clip

    middle = len(video.frames) // 2
    clip = read_clip(source, len(video.frames))
    frame = Image.fromarray(over_white(np.ascontiguousarray(clip.frames[min(middle, len(clip.frames) - 1)])))
    framing = video.framing.squares[middle] if isinstance(video.framing, StabilisedFraming) else video.framing
    scale = CROP_WIDTH / framing.source_width
    shown = frame.resize((CROP_WIDTH, max(round(framing.source_height * scale), 1)))
    left, top = framing.center_x - framing.side / 2, framing.center_y - framing.side / 2
    box = tuple(round(scale * edge) for edge in (left, top, left + framing.side, top + framing.side))
    inside = Image.new("L", shown.size, 90)
    ImageDraw.Draw(inside).rectangle(box, fill=255)
    picture = Image.composite(shown, Image.new("RGB", shown.size), inside)
    ImageDraw.Draw(picture).rectangle(box, outline=(255, 255, 255), width=2)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="JPEG", quality=88)


def export(arguments: Sequence[str]) -> None:
    """The mesh is made once and written in every format; the web page last, which says that all are there."""
    from sv4d_ns.export import files
    from sv4d_ns.export.formats.usd import require_usd
    from sv4d_ns.export.make import Options, make_asset
    from sv4d_ns.export.terminal import Terminal
    from sv4d_ns.runs.open import load_run
    from sv4d_ns.utils.errors import InputError

    settings = tyro.cli(Export, prog="export", args=list(arguments))
    settings.folder.mkdir(parents=True, exist_ok=True)
    run, terminal = load_run(settings.load_config), Terminal()
    options = Options(settings.resolution, settings.max_faces, texture_size=settings.texture_size)
    mesh = make_asset(run, options, terminal)
    try:
        require_usd()
        usd = True
    except InputError:
        usd = False
    files.write_mesh(run, mesh, settings.folder, "morph", 64, "usdz" if usd else "none", "obj", terminal)
    _pack(settings.folder / OBJ_FOLDER, settings.folder / OBJ_FILE)
    files.web_files(run, mesh, settings.folder)


def _pack(folder: Path, path: Path) -> None:
    """A folder of files as one .zip."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(folder.iterdir()):
            packed.write(file, f"{folder.name}/{file.name}")


KINDS = {"look": look, "train": train, "export": export}


if __name__ == "__main__":
    end_with_the_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    with one_sentence_errors():
        KINDS[sys.argv[1]](sys.argv[2:])
