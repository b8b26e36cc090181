"""One self-contained HTML page: the asset with play, scrub and orbit, and the input video beside it.

The page holds the .glb itself, the input video's frames as pictures (so that both stand at the same moment, which a
video element cannot promise) and a small WebGL viewer of our own, `viewer.html`; it opens from disk and asks the
network for nothing. The picture that sites show where the page is linked lies beside it, because they take no other.
"""

import base64
import html
import io
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from sv4d_ns import __version__
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.images import (
    GENERATED_COLOR,
    LABEL_COLOR,
    OBSERVED_COLOR,
    UNSEEN_COLOR,
    over_white,
    resize_rgba,
)

LARGEST_FRAME = 512
"""Pixels along the side of the embedded video frames."""
POSTER_NAME = "poster.jpg"
POSTER_SIZE = (1200, 630)
"""Pixels, as sites that show links ask for."""
CONFIDENCE = (
    ("seen by the input video", OBSERVED_COLOR),
    ("by generated views only", GENERATED_COLOR),
    ("by none", UNSEEN_COLOR),
)
"""The legend, from the mesh's 1 to its 0; the viewer's colours."""


def write_page(
    glb: Path, video: UInt8[np.ndarray, "t s s 4"], plan: ViewPlan, fps: float, name: str, path: Path
) -> None:
    """Write the page `path`, whole or not at all.

    Args:
        glb: an animated asset with morph targets.
        video: the input frames, one for each key of the clip.
        plan: its input camera is where the viewer starts.
        name: shown as the title.
    """
    settings = {
        "fps": fps,
        "frames": [_data_url(frame) for frame in video],
        "elevation": math.radians(plan.input_elevation_deg),
        "radius": plan.radius,
        "fov": math.radians(plan.fov_deg),
        "confidence": [{"name": name, "color": color} for name, color in CONFIDENCE],
    }
    values = {
        "title": html.escape(name, quote=True),
        "description": f"4D asset from one video: {len(video)} frames, {(len(video) - 1) / fps:.2f}\N{NO-BREAK SPACE}s",
        "poster": POSTER_NAME,
        "generator": f"sv4d_ns {__version__}",
        "file_name": html.escape(f"{name}.glb", quote=True),
        "video_size": str(min(video.shape[1], LARGEST_FRAME)),
        "settings": _script_json(settings),
        "asset": base64.b64encode(glb.read_bytes()).decode(),
    }
    page = resources.files(__package__).joinpath("viewer.html").read_text(encoding="utf-8")
    for key, value in values.items():
        page = page.replace("{{" + key + "}}", value)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write_poster(frame: UInt8[np.ndarray, "s s 4"], asset: UInt8[np.ndarray, "s s 4"], path: Path) -> None:
    """The picture for links to the page: a frame of the video, and the asset at that moment from another side."""
    width, height = POSTER_SIZE
    poster = Image.new("RGB", POSTER_SIZE, "white")
    pen, font = ImageDraw.Draw(poster), ImageFont.load_default(24)
    for number, (picture, label) in enumerate(((frame, "input video"), (asset, "4D asset"))):
        side = resize_rgba(picture[None], width // 2)[0]
        poster.paste(Image.fromarray(over_white(side)), (number * width // 2, (height - width // 2) // 2))
        pen.text((number * width // 2 + 24, 20), label, LABEL_COLOR, font)
    with atomic_path(path) as temporary:
        poster.save(temporary, format="JPEG", quality=90)


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c")


def _data_url(frame: UInt8[np.ndarray, "s s 4"]) -> str:
    """Without a background: the page has a light and a dark one."""
    buffer = io.BytesIO()
    Image.fromarray(resize_rgba(frame[None], min(len(frame), LARGEST_FRAME))[0]).save(buffer, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
