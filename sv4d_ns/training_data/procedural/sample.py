"""Make the bundled sample video: a creature that training never sees, on white, as a user's clip would be.

python -m sv4d_ns.training_data.procedural.sample assets/sample.mp4
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import tyro

from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.training_data.procedural import creature, render
from sv4d_ns.utils.files import atomic_path

SAMPLE_SEED = 2**31 + 100055
"""Outside the seeds of training and of the held-out evaluation."""


@dataclass(frozen=True)
class SampleConfig:
    """What to render."""

    output: Annotated[Path, tyro.conf.Positional]
    """The mp4 file to write."""
    seed: int = SAMPLE_SEED
    """The creature."""
    size: int = 256
    """Pixels per side."""
    frames: int = 21
    """Frames over the whole motion."""
    fps: int = 10
    """Frames a second."""


def write_sample(config: SampleConfig) -> None:
    """Render the creature from azimuth 0, elevation 0, and encode it as H.264."""
    camera = look_at_cameras(np.array([0.0]), np.array([0.0]))
    pictures = render(creature(config.seed), np.linspace(0.0, 1.0, config.frames), camera, config.size)[:, 0]
    values = pictures.astype(np.float64)
    alpha = values[..., 3:] / 255.0
    rgb = (values[..., :3] * alpha + 255.0 * (1.0 - alpha)).round().astype(np.uint8)
    with atomic_path(config.output) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=config.fps, options={"crf": "16"})
        stream.width = stream.height = config.size
        stream.pix_fmt = "yuv420p"
        for picture in rgb:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    write_sample(tyro.cli(SampleConfig, description=__doc__))
