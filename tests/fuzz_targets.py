"""Loaders of files from strangers under any bytes: each returns or raises `InputError`, and writes nothing.

Used by the short property tests (test_fuzz.py) and by the long, coverage-guided runs (benchmarks/fuzz.py).
"""

import io
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from test_video import ball, over, write_video
from test_views import make_grid

from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.runs.layout import read_checkpoint
from sv4d_ns.runs.safe_config import check_config
from sv4d_ns.utils.errors import InputError
from sv4d_ns.video import StabilisedFraming, read_clip
from sv4d_ns.video.crop import Framing
from sv4d_ns.views.grid import GRID_FILE, TRANSFORMS_FILE, ViewGrid

Target = Callable[[bytes, Path], None]


def _guarded(load: Callable[[], object], folder: Path) -> None:
    """Call a loader; whatever it is given, it may only return or say why not, and leave the folder as it is."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()
    except InputError as error:
        assert "\n" not in str(error), "one sentence"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "a loader wrote something"


def _file(name: str, load: Callable[[Path], object]) -> Target:
    def target(data: bytes, folder: Path) -> None:
        path = folder / name
        path.write_bytes(data)
        _guarded(lambda: load(path), folder)

    return target


def _grid(name: str) -> Target:
    """One of the two descriptions of a grid replaced by any bytes."""

    def target(data: bytes, folder: Path) -> None:
        grid = folder / "grid"
        if not grid.exists():
            make_grid().save(grid)
        whole = (grid / name).read_bytes()
        (grid / name).write_bytes(data)
        try:
            _guarded(lambda: ViewGrid.load(grid), folder)
        finally:
            (grid / name).write_bytes(whole)

    return target


def _cameras(data: bytes, folder: Path) -> None:
    """Cameras and crops as JSON: nothing but their own fields may come out."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    for read in (ViewPlan.from_dict, Framing.from_dict, StabilisedFraming.from_dict):
        _guarded(partial(read, values), folder)


TARGETS: dict[str, Target] = {
    "mp4": _file("clip.mp4", read_clip),
    "gif": _file("clip.gif", read_clip),
    "png": _file("clip.png", read_clip),
    "grid": _grid(GRID_FILE),
    "transforms": _grid(TRANSFORMS_FILE),
    "cameras": _cameras,
    "checkpoint": _file("step-000000001.ckpt", read_checkpoint),
    "config": _file("config.yml", check_config),
}


def example(name: str, folder: Path) -> bytes:
    """A good file of a target's kind, to start from."""
    if name == "mp4":
        frames = over(ball(3), (255, 255, 255))
        return write_video(folder / "good.mp4", frames, container={"movflags": "faststart"}).read_bytes()
    if name in ("gif", "png"):
        stream = io.BytesIO()
        first, *rest = (Image.fromarray(frame) for frame in ball(3))
        first.save(stream, name, save_all=True, append_images=rest, duration=100)
        return stream.getvalue()
    if name in ("grid", "transforms"):
        return (make_grid().save(folder / "good") / f"{name}.json").read_bytes()
    if name == "cameras":
        return json.dumps(ViewPlan.BUNDLED.to_dict()).encode()
    if name == "config":
        return b"!!python/object:sv4d_ns.plugin.model.SV4DModelConfig\nschedule_steps: 3\n"
    stream = io.BytesIO()
    torch.save({"step": 1, "pipeline": {"a": torch.from_numpy(np.arange(64.0))}}, stream)
    return stream.getvalue()
