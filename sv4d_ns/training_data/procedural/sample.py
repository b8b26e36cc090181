"""Make the bundled sample video: a creature that training never sees, on white, as a user's clip would be.

python -m sv4d_ns.training_data.procedural.sample assets/sample.mp4
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.training_data.procedural import creature, render
from sv4d_ns.utils.images import over_white
from sv4d_ns.video.writer import write_h264

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
    write_h264(config.output, over_white(pictures), config.fps, crf=16)


if __name__ == "__main__":
    write_sample(tyro.cli(SampleConfig, description=__doc__))
