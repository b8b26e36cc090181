"""Peak memory and time of reading long, large footage: 4K, a thousand frames, thinned to 21 and kept whole.

    python benchmarks/video_memory.py --frames 1000

The clip (a ball rolling before white, H.264) is made first; each way of reading it runs in a process of its own, whose
peak resident memory is read from /proc (Linux). Floor: one 4K RGBA frame is 33 MB, the crops of T frames at 256 pixels
0.26 T MB, a clip in work at most 256 MB (`CLIP_PIXELS`), Python with this package's imports about 150 MB.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import tyro

CHILD = """
import sys, time
from pathlib import Path
began = time.monotonic()
from sv4d_ns.video import load_object_video
video = load_object_video(Path(sys.argv[1]), 256, **eval(sys.argv[2]))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"{len(video.frames)} frames | {int(peak.split()[1]) / 1e6:.2f} GB | {time.monotonic() - began:.0f} s")
"""


@dataclass
class Settings:
    frames: int = 1000
    """Frames of the clip."""
    width: int = 3840
    height: int = 2160
    """Its size in pixels."""


def write_clip(path: Path, settings: Settings) -> None:
    """A shaded ball rolling to the right before white."""
    radius = settings.height // 6
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    distance = np.hypot(x, y) / radius
    ball = np.where(distance[..., None] <= 1, np.array([200, 60, 30]) * (1 - 0.4 * distance[..., None]), 255)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = settings.width, settings.height, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "20"}
        for index in range(settings.frames):
            picture = np.full((settings.height, settings.width, 3), 255, np.uint8)
            left = round((settings.width - 4 * radius) * index / settings.frames) + radius
            top = settings.height // 2 - radius
            picture[top : top + len(ball), left : left + len(ball)] = ball
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())


def main(settings: Settings) -> None:
    """Write the clip and print a line for each way of reading it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.mp4"
        write_clip(path, settings)
        print(f"{settings.width}x{settings.height}, {settings.frames} frames, {path.stat().st_size / 1e6:.0f} MB")
        for ways in ({"max_frames": 21}, {"fps": 30.0}):
            print(
                ways, subprocess.check_output([sys.executable, "-c", CHILD, str(path), repr(ways)], text=True).strip()
            )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
