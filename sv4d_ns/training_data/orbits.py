"""The two camera orbits of a rendered object.

Sources: SV3D (arXiv 2403.12008) and SV4D (arXiv 2407.17470). Static orbit: azimuths evenly spaced from 0, one random
elevation. Dynamic orbit: elevations are a random weighted sum of sinusoids around it, azimuths evenly spaced plus
noise, both smooth and clamped. Ranges of the static elevation, amplitudes and periods are SV3D's; the azimuth noise
and the number of sinusoids are not published and our own.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from jaxtyping import Float

ELEVATION_RANGE_DEG = (-5.0, 30.0)
AMPLITUDE_RANGE_DEG = (0.5, 10.0)
LARGEST_PERIODS = 5
LARGEST_ELEVATION_DEG = 89.0
SINUSOIDS = 3
AZIMUTH_NOISE = 0.5
"""Standard deviation of the azimuths' noise in units of their spacing, before smoothing over three neighbours."""


class Orbit(str, Enum):
    """Which way the cameras go around the object."""

    STATIC = "static"
    DYNAMIC = "dynamic"


@dataclass(frozen=True)
class OrbitCameras:
    """Absolute angles of an orbit's V cameras, degrees; azimuths ascend from 0."""

    azimuths_deg: Float[np.ndarray, " v"]
    elevations_deg: Float[np.ndarray, " v"]


def draw_orbit(rng: np.random.Generator, orbit: Orbit, views: int) -> OrbitCameras:
    """Random cameras of an orbit."""
    azimuths = 360.0 * np.arange(views) / views
    elevation = rng.uniform(*ELEVATION_RANGE_DEG)
    if orbit is Orbit.STATIC:
        return OrbitCameras(azimuths, np.full(views, elevation))
    phase = 2.0 * np.pi * np.arange(views) / views
    weights = rng.dirichlet(np.ones(SINUSOIDS))
    elevations = np.full(views, elevation)
    for weight in weights:
        amplitude = rng.uniform(*AMPLITUDE_RANGE_DEG)
        elevations += weight * amplitude * np.sin(rng.integers(1, LARGEST_PERIODS + 1) * phase + rng.uniform(0, 6.283))
    noise = rng.normal(0.0, AZIMUTH_NOISE * 360.0 / views, views)
    noise = (np.roll(noise, 1) + noise + np.roll(noise, -1)) / 3
    # neighbours may not change places: at most 0.45 of the spacing either way
    noise = np.clip(noise - noise[0], -0.45 * 360.0 / views, 0.45 * 360.0 / views)
    return OrbitCameras(azimuths + noise, np.clip(elevations, -LARGEST_ELEVATION_DEG, LARGEST_ELEVATION_DEG))
