"""The cameras of 4Diffusion's optimisation, in its own frame: distance 1.1, field of view 45 degrees, box of half
side 1.

Source: aejion/4Diffusion @ 627d0cd, its random-camera data module. The frame differs from this package's by one factor
(`WORLD_SCALE`); `DrawnViews.plan` at that many times the distance makes the same picture of an object normalised as
everywhere here.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from sv4d_ns.geometry.cameras import ViewPlan

VIEWS = 4
HIGHEST_ELEVATION_DEG = 5.0
FRAMES = 8
"""Of a window."""


@dataclass(frozen=True)
class DrawnViews:
    """The orthogonal views of a training step, degrees."""

    azimuths_deg: tuple[float, ...]
    elevation_deg: float

    def raised(self, elevation_deg: float) -> "DrawnViews":
        """The same views higher by so much."""
        return replace(self, elevation_deg=self.elevation_deg + elevation_deg)

    def plan(self, radius: float, fov_deg: float) -> ViewPlan:
        """As cameras of this package, of which only the novel views count."""
        count = len(self.azimuths_deg)
        return ViewPlan(self.azimuths_deg, (0.0,) * count, self.elevation_deg, radius, fov_deg)


def draw_views(rng: np.random.Generator, views: int = VIEWS, highest_deg: float = HIGHEST_ELEVATION_DEG) -> DrawnViews:
    """Views evenly around the object from a random start, all at one random elevation.

    The elevation is, with equal chance, uniform in [0, highest] or "uniform on the sphere" as threestudio has it,
    whose range is mapped through degrees rather than their sine and so ends early (at 3.18 instead of 5 degrees).
    """
    start = float(rng.random())
    azimuths = tuple((start + view) / views * 360.0 - 180.0 for view in range(views))
    if rng.random() < 0.5:
        return DrawnViews(azimuths, float(rng.random()) * highest_deg)
    share = 0.5 + float(rng.random()) * highest_deg / 180.0
    return DrawnViews(azimuths, math.degrees(math.asin(2.0 * share - 1.0)))


def draw_window(rng: np.random.Generator, num_frames: int, length: int = FRAMES) -> list[int]:
    """Consecutive frames at a random place; the last one repeats where the video is shorter than a window."""
    first = int(rng.integers(max(num_frames - length, 0) + 1))
    return [min(frame, num_frames - 1) for frame in range(first, first + length)]
