"""Pictures of a training run: held-out creatures beside the truth."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sv4d_ns.diffusion.bundled.network import VolumeDenoiser
from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline
from sv4d_ns.diffusion_training.report import on_white
from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.training_data.procedural import HELD_OUT_SEEDS, creature, render
from sv4d_ns.utils.files import atomic_path

SHEET_OBJECTS = 6
SHEET_AZIMUTHS = (40.0, 120.0, 200.0, 280.0)


def sample_sheet(model: VolumeDenoiser, path: Path) -> None:
    """One row an object: input, truth of four views, then the same views sampled in one and in three steps."""
    size = model.config.image_size
    c2w = look_at_cameras(np.array([0.0, *SHEET_AZIMUTHS]), np.zeros(5))
    pipeline = BundledVideoPipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for index in range(SHEET_OBJECTS):
        pictures = render(creature(HELD_OUT_SEEDS.start + index), np.array([0.3]), c2w, size)
        shown = [*on_white(pictures[0])]
        for steps in (1, 3):
            generator = torch.Generator().manual_seed(index)
            made = pipeline(
                pictures[:, 0], SHEET_AZIMUTHS, (0.0,) * 4, num_inference_steps=steps, recolour=False,
                generator=generator, return_dict=False,
            )[0][0]  # fmt: skip
            shown += [*(made[..., :3] * made[..., 3:] + 1 - made[..., 3:])]
        rows.append(np.concatenate(shown, axis=1))
    sheet = (np.concatenate(rows).clip(0, 1) * 255).round().astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet.repeat(2, axis=0).repeat(2, axis=1)).save(temporary)
