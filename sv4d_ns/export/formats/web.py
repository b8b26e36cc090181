"""One self-contained HTML page: the asset with play, scrub and orbit, and the input video beside it.

The page holds the .glb itself, the input video's frames as pictures (so that both stand at the same moment, which a
video element cannot promise) and a small WebGL viewer of our own, `viewer.html`; it opens from disk and asks the
network for nothing.
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
from PIL import Image

from sv4d_ns import __version__
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.images import over_white

LARGEST_FRAME = 512
"""Pixels along the side of the embedded video frames."""


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
    }
    values = {
        "title": html.escape(name),
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


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c")


def _data_url(frame: UInt8[np.ndarray, "s s 4"]) -> str:
    image = Image.fromarray(over_white(frame))
    if image.width > LARGEST_FRAME:
        image = image.resize((LARGEST_FRAME, LARGEST_FRAME), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
