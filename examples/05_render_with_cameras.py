"""A finished run, rendered from cameras of your own.

    python examples/05_render_with_cameras.py outputs/video/sv4d/.../config.yml movie.mp4

Here the camera rises from the horizon while it turns once and the clip plays; any camera-to-world matrices do.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

from sv4d_ns.field.images import render_rgba
from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.runs.open import load_run
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.utils.images import over_white
from sv4d_ns.utils.progress import bar
from sv4d_ns.video.writer import write_h264


def main(config: Path, movie: Path, /, size: int = 256, pictures: int = 48, fps: float = 12.0) -> None:
    """Render a run.

    Args:
        config: the run's config.yml.
        movie: the MP4 to write.
        size: pixels along the side.
        pictures: number of pictures.
        fps: pictures per second.
    """
    run = load_run(config)
    share = np.linspace(0.0, 1.0, pictures)
    # OpenGL camera-to-world matrices, z up, the object at the origin, the input camera at azimuth 0
    cameras = look_at_cameras(360.0 * share, 45.0 * share)
    focal = size / 2 / np.tan(np.radians(FIELD_OF_VIEW_DEG) / 2)

    def drawn() -> Iterator[np.ndarray]:
        for camera, time in zip(cameras, share, strict=True):
            yield over_white(render_rgba(run.field, run.occupancy, camera, focal, size, float(time)))

    with bar("Rendering") as progress:
        write_h264(movie, drawn(), fps, on_written=lambda done: progress(done, pictures))
    print(f"{movie}: {pictures} pictures")


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(main)
