"""The embedded model on the 4D benchmark's cases, downscaled: whole clips, eight views, against the true views.

    python benchmarks/embedded_model.py ../shared/benchmark/fox_run ../shared/benchmark/frog_jump --sheet sheet.png

For each case: the scores of `sv4d_ns.diffusion_training.evaluate` for the `nv8` views, of copying the input frame and
of the model, and the time of sampling. The cases are rendered game assets, nothing the model was trained on.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from jaxtyping import UInt8
from PIL import Image

from sv4d_ns.diffusion.embedded import load_embedded_pipeline
from sv4d_ns.diffusion.sv4d.grid import generate_grid
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion_training.data import to_model_images
from sv4d_ns.diffusion_training.evaluate import as_floats, score, table
from sv4d_ns.geometry.cameras import ViewPlan

SHEET_FRAMES = (0, 7, 14)


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    cases: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of benchmark cases."""
    model: Path | None = None
    """Folder of a saved pipeline; the embedded model by default."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Of the sampling noise."""
    sheet: Path | None = None
    """Also write pictures here: per case and frame the input, the truth and the samples of four views."""


def load_case(folder: Path, size: int) -> tuple[UInt8[np.ndarray, "t v h w 4"], list[float]]:
    """Input and `nv8` views (the input first) at the given size, and the azimuths of the latter, degrees."""
    description = json.loads((folder / "cameras.json").read_text())
    views = [view for view in description["views"] if "input" in view["roles"]]
    views += [view for view in description["views"] if "nv8" in view["roles"]]
    pictures = [[_read(folder / name, size) for name in view["frames"]] for view in views]
    return np.stack([np.stack(frames) for frames in pictures], axis=1), [float(v["azimuth_deg"]) for v in views[1:]]


def _read(path: Path, size: int) -> UInt8[np.ndarray, "h w 4"]:
    """A picture reduced by averaging, with its alpha taken into account."""
    pixels = np.asarray(Image.open(path).convert("RGBA")).astype(np.float64) / 255.0
    pixels[..., :3] *= pixels[..., 3:]
    blocks = pixels.reshape(size, pixels.shape[0] // size, size, -1, 4).mean(axis=(1, 3))
    colour = np.divide(blocks[..., :3], blocks[..., 3:], out=np.ones_like(blocks[..., :3]), where=blocks[..., 3:] > 0)
    return (np.concatenate([colour, blocks[..., 3:]], axis=-1).clip(0, 1) * 255).round().astype(np.uint8)


def main(config: BenchmarkConfig) -> None:
    """Measure every case and print one table for each."""
    torch.set_num_threads(config.threads)
    if config.model is None:
        pipeline = load_embedded_pipeline("cpu")
    else:
        pipeline = StableVideo4D2Pipeline.from_pretrained(config.model)
    rows = []
    for folder in config.cases:
        grid, azimuths = load_case(folder, pipeline.config.image_size)
        video = (to_model_images(grid[:, 0]) + 1) / 2
        began = time.monotonic()
        made = generate_grid(
            pipeline, video, azimuths, [0.0] * 8, seed=config.seed, store=None, on_progress=lambda done, total: None
        ).images
        seconds = time.monotonic() - began
        sampled = made.permute(0, 1, 3, 4, 2).double().numpy()
        truth = as_floats(grid[:, 1:])
        print(f"\n{folder.name}: {seconds:.1f} s for {len(video)} frames x {len(azimuths)} views")
        plans = [ViewPlan.ring(tuple(azimuths))]
        copied = score("copy of the input frame", [as_floats(grid[:, :1])], [truth], plans)
        model = score("model", [sampled], [truth], plans, seconds / (len(video) * len(azimuths)))
        print(table([copied, model]))
        for frame in SHEET_FRAMES:
            pictures = [as_floats(grid[frame, 0]), *truth[frame, ::2], *sampled[frame, ::2]]
            rows.append(np.concatenate([picture[..., :3] for picture in pictures], axis=1))
    if config.sheet is not None:
        Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(config.sheet)


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig, description=__doc__))
