"""The bundled model as a diffusers pipeline: PIL pictures in, PIL pictures of any cameras out.

    python examples/03_diffusers_pipeline.py clip.gif views.png

One row for each camera, one column for each frame; the first row is the input.
"""

from pathlib import Path

import torch
import tyro
from PIL import Image

from sv4d_ns.diffusion.bundled import load_bundled_pipeline
from sv4d_ns.utils.errors import one_sentence_errors
from sv4d_ns.video import load_object_video


def main(
    video: Path,
    sheet: Path,
    /,
    azimuths: tuple[float, ...] = (45.0, 90.0, 180.0, 270.0),
    elevation: float = 0.0,
    steps: int | None = None,
    frames: int = 8,
    seed: int = 0,
) -> None:
    """Pictures of an object from other sides.

    Args:
        video: of one object.
        sheet: the picture to write.
        azimuths: of the cameras, relative to the input view, degrees.
        elevation: of the cameras above the input view, degrees.
        steps: denoising steps; the pipeline's own number by default.
        frames: at most so many of the video's.
        seed: of the noise.
    """
    pipeline = load_bundled_pipeline()
    clip = [Image.fromarray(frame) for frame in load_object_video(video, size=128, max_frames=frames).frames]
    out = pipeline(
        clip,
        azimuths_deg=azimuths,
        elevations_deg=[elevation] * len(azimuths),
        size=128,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pil",
    )
    rows = [clip, *zip(*out.frames, strict=True)]
    page = Image.new("RGB", (128 * len(clip), 128 * len(rows)), "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            page.paste(picture, (128 * left, 128 * top), picture)
    page.save(sheet)
    print(f"{sheet}: {len(rows) - 1} cameras, {len(clip)} frames")


if __name__ == "__main__":
    with one_sentence_errors():
        tyro.cli(main)
