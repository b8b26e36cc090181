"""The README's pictures: films, and the assets the present code makes of them.

    scripts/gallery assets/sample.mp4 more.mp4 --work /tmp/gallery

Those of the README beside the sample are films of CC0 models, held out from training (docs/data.md says which):

    python benchmarks/make_cases.py ASSETS CASES --names animated/quat_rpgchar_ranger:2 animated/quat_animals_wolf \\
        animated/quat_space_mech_fernando_the_flamingo

Each film goes through `ns-train sv4d` and `ns-export mesh` with default settings (finished ones are kept in --work).
The first becomes the moving teaser: the film, and its GLB turning once while it plays twice. Every one becomes a
poster: a frame of the film, and the GLB at that moment from four sides. Pictures show the file's own colours without
light. `made.json` says of which commit they are.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tyro
from export_fidelity import PlayedGlb, read_glb, render
from jaxtyping import UInt8
from PIL import Image

from sv4d_ns.geometry.cameras import ViewPlan, look_at_cameras
from sv4d_ns.runs.layout import newest_views
from sv4d_ns.utils.errors import InputError, one_sentence_errors
from sv4d_ns.utils.files import atomic_path
from sv4d_ns.utils.images import over_white, resize_rgba
from sv4d_ns.views.grid import ViewGrid

TEASER_SIZE, POSTER_SIZE = 288, 192
TEASER_PLAYS = 2
"""Times the clip passes while the asset turns once."""
ELEVATION_DEG = 12.0
POSTER_AZIMUTHS = (0.0, 60.0, 150.0, 250.0)


def main(films: list[Path], /, work: Path, out: Path = Path("docs/pictures")) -> None:
    """Make the pictures.

    Args:
        films: each becomes a poster, the first also the teaser.
        work: runs and exports are made here.
        out: pictures are written here.
    """
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    commit = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    out.mkdir(parents=True, exist_ok=True)
    for number, film in enumerate(films):
        glb, grid = made(film, work)
        if number == 0:
            write_teaser(glb, grid, out / "teaser.webp")
        poster = Image.fromarray(poster_of(glb, grid))
        with atomic_path(out / f"{film.stem}.webp") as path:
            poster.save(path, format="WEBP", quality=82)
    with atomic_path(out / "made.json") as path:
        path.write_text(json.dumps({"commit": commit, "films": [film.name for film in films]}, indent=1) + "\n")


def made(film: Path, work: Path) -> tuple[PlayedGlb, ViewGrid]:
    """The GLB and the view grid of a film.

    Raises:
        InputError: a command failed; what it printed says why.
    """
    folder, scripts = work / film.stem, Path(sys.executable).parent
    glbs = sorted((folder / "glb").glob("*.glb"))
    if not glbs:
        train = ["ns-train", "sv4d", "--data", str(film), "--output-dir", str(folder / "runs")]
        run([str(scripts / train[0]), *train[1:], "--timestamp", "run"])
        config = run_folder(folder) / "config.yml"
        export = [str(scripts / "ns-export"), "mesh", "--load-config", str(config)]
        run([*export, "--output-dir", str(folder / "glb"), "--overwrite"])
        glbs = sorted((folder / "glb").glob("*.glb"))
    views = newest_views(run_folder(folder))
    assert views is not None
    return read_glb(glbs[0]), ViewGrid.load(views)


def run_folder(folder: Path) -> Path:
    """The one run below a film's folder."""
    (found,) = (folder / "runs").glob("*/sv4d/run")
    return found


def run(command: list[str]) -> None:
    """Run a command, or say that it failed."""
    if subprocess.run(command).returncode:
        raise InputError(f"{' '.join(command)} failed: see above.")


def seen(glb: PlayedGlb, frame: int, azimuth_deg: float, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The GLB on white."""
    camera = look_at_cameras(np.array([azimuth_deg]), np.array([ELEVATION_DEG if azimuth_deg else 0.0]))[0]
    picture, _ = render(glb, frame, camera, ViewPlan.BUNDLED.focal_px(size), size)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def write_teaser(glb: PlayedGlb, grid: ViewGrid, path: Path) -> None:
    """The film beside its asset, which turns once."""
    film = over_white(resize_rgba(grid.input_frames, TEASER_SIZE))
    count = TEASER_PLAYS * grid.num_frames
    pictures = []
    for number in range(count):
        frame = number % grid.num_frames
        turned = seen(glb, frame, 360.0 * number / count + 1e-3, TEASER_SIZE)
        pictures.append(Image.fromarray(np.concatenate([film[frame], turned], axis=1)))
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary, format="WEBP", save_all=True, append_images=pictures[1:], loop=0, quality=60,
            duration=round(1000 / grid.fps),
        )  # fmt: skip


def poster_of(glb: PlayedGlb, grid: ViewGrid) -> UInt8[np.ndarray, "h w 3"]:
    """A frame of the film, and the asset at that moment from four sides."""
    frame = grid.num_frames // 3
    tiles = [over_white(resize_rgba(grid.input_frames[frame : frame + 1], POSTER_SIZE))[0]]
    tiles += [seen(glb, frame, azimuth, POSTER_SIZE) for azimuth in POSTER_AZIMUTHS]
    return np.concatenate(tiles, axis=1)


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(main)
