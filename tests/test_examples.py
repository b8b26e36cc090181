"""The examples are the library's documentation: each runs, small, as a user would run it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pygltflib
import pytest
from glb_fixture import waving
from PIL import Image
from tiny_run import write_tiny_run

from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.training_data.procedural import creature, render
from sv4d_ns.views.grid import ViewGrid

ROOT = Path(__file__).parents[1]
LONGEST_LINEAR_SCRIPT = 80


def run_example(name: str, *arguments: object) -> str:
    """What it prints; fails with what it says."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A creature's first four frames as transparent pictures, seen from the front and the left."""
    folder = tmp_path_factory.mktemp("clips")
    views = render(creature(7), np.linspace(0, 0.5, 4), look_at_cameras(np.array([0.0, 90.0]), np.zeros(2)), 64)
    folders = []
    for number in range(2):
        folders.append(folder / f"view{number}")
        folders[-1].mkdir()
        for frame, picture in enumerate(views[:, number]):
            Image.fromarray(picture).save(folders[-1] / f"{frame:03}.png")
    return folders


def test_a_video_becomes_a_glb(clips: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "asset.glb"
    assert str(out) in run_example("01_video_to_glb.py", clips[0], out, "--steps", 30, "--resolution", 32)
    gltf = pygltflib.GLTF2().load(str(out))
    assert len(gltf.animations) == 1 and gltf.asset.extras["sv4d"]["provenance"]["model"]


def test_that_script_is_short() -> None:
    source = (ROOT / "examples" / "01_video_to_glb.py").read_text().splitlines()
    assert len(source) <= LONGEST_LINEAR_SCRIPT


def test_own_views_become_a_grid(clips: list[Path], tmp_path: Path) -> None:
    run_example("02_own_views.py", tmp_path / "grid", *clips, "--azimuths", 90)
    grid = ViewGrid.load(tmp_path / "grid")
    assert grid.num_frames == 4 and grid.plan.azimuths_deg == (90.0,)
    assert (grid.novel_views[..., 3] > 0).any()


def test_views_that_cannot_belong_together_are_refused(clips: list[Path], tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        command = [sys.executable, str(ROOT / "examples" / "02_own_views.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "grid").exists()
        return done.stdout + done.stderr

    short, wide = tmp_path / "short", tmp_path / "wide"
    for folder, pictures in ((short, 3), (wide, 4)):
        folder.mkdir()
        for path in sorted(clips[1].glob("*.png"))[:pictures]:
            with Image.open(path) as picture:
                (picture.crop((-30, 0, 94, 64)) if folder is wide else picture).save(folder / path.name)
    assert "124x64" in refused(tmp_path / "grid", clips[0], wide, "--azimuths", 90)
    assert "3 frames" in refused(tmp_path / "grid", clips[0], short, "--azimuths", 90)
    assert "twice" in refused(tmp_path / "grid", *clips, "--azimuths", 360)


def test_the_pipeline_makes_a_sheet(clips: list[Path], tmp_path: Path) -> None:
    run_example("03_diffusers_pipeline.py", clips[0], tmp_path / "sheet.png", "--azimuths", 90, 180)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 128, 3 * 128)
        assert np.asarray(sheet)[128:].std() > 5


def test_training_on_a_folder(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    waving(tmp_path / "assets" / "box.glb")
    run_example("04_train_on_my_assets.py", tmp_path / "assets", tmp_path / "run", "--steps", 2, "--moments", 1)
    losses = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in losses] == [1, 2]
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()


def test_a_run_is_rendered(tmp_path: Path) -> None:
    run = write_tiny_run("sv4d", tmp_path)
    run_example("05_render_with_cameras.py", run / "config.yml", tmp_path / "movie.mp4", "--pictures", 3, "--size", 32)
    assert (tmp_path / "movie.mp4").stat().st_size > 0
