"""Samples of openly licensed 3D models, posed and drawn while training."""

from pathlib import Path

import numpy as np

from sv4d_ns.diffusion.bundled.frustum import Frustum
from sv4d_ns.diffusion_training.bundled.data import Sample, draw_cameras, shell
from sv4d_ns.training_data.library import AssetLibrary

LARGEST_STRETCH = 1.25
"""Of training assets along each of their axes: a few hundred shapes become many."""
CROPPED_SHARE = 0.5
"""Of training samples that are framed by their box in the picture, as most users' films; the others by their middle in
space, as renders are (`sv4d_ns.video.crop.is_framed`)."""
FRAME_SECONDS = 0.12
"""Longest time between two frames of a clip: a 21-frame video of two and a half seconds."""


class AssetSource:
    """Random moments of the GLB files below a folder; a tenth of them, by name, is held out.

    Args:
        folder: of GLB files.
        cache: where decoded files are kept.

    Raises:
        InputError: the folder holds no asset that can be used.
    """

    def __init__(self, folder: Path, cache: Path | None = None):
        self.library = AssetLibrary(folder, cache=cache)

    def sample(self, rng: np.random.Generator, frames: int, views: int, size: int) -> Sample:
        elevation, c2w = draw_cameras(rng, views)
        asset = self.library.sample(
            rng, frames, elevation_deg=elevation, longest_window_s=FRAME_SECONDS * max(frames - 1, 3),
            largest_stretch=LARGEST_STRETCH, cropped_share=CROPPED_SHARE,
        )  # fmt: skip
        frustum = Frustum()
        occupancy = np.stack([asset.occupancy(frame, c2w[0], size) for frame in range(frames)])
        shells = np.stack([shell(moment) for moment in occupancy])
        colours = np.ones((*shells.shape, 3), dtype=np.float32)
        for frame, near in enumerate(shells):
            if near.any():
                points = frustum.world_points(size // 2, c2w[0], near)
                colours[frame][near] = asset.nearest_colours(frame, points)
        return Sample(asset.draw(c2w, size), c2w, elevation, occupancy, colours, shells)
