"""Training samples made on the fly: any step's batch is a function of (seed, step) alone."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sv4d_ns.cameras import look_at_cameras
from sv4d_ns.procedural import creature, render

TRAINING_SEEDS = range(0, 2**31)
HELD_OUT_SEEDS = range(2**31, 2**32)
"""Creatures of these two ranges are never mixed: the second is for evaluation and for the bundled sample."""

VIDEO_FRAMES = 21
"""Frames of a whole motion; consecutive frames of a clip are about 1/20 of it apart."""


@dataclass(frozen=True)
class BatchShape:
    """How many objects, frames and novel views a batch has."""

    objects: int
    frames: int
    views: int = 4


@dataclass(frozen=True)
class Batch:
    """Rendered pictures (RGBA, straight alpha) and cameras relative to the input view, degrees."""

    inputs: UInt8[np.ndarray, "b t h w 4"]
    views: UInt8[np.ndarray, "b t v h w 4"]
    azimuths: Float[np.ndarray, "b v"]
    elevations: Float[np.ndarray, "b v"]


def draw_cameras(
    rng: np.random.Generator, views: int
) -> tuple[float, Float[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    """(input elevation, relative azimuths ascending in [0, 360), relative elevations), degrees.

    Our design: novel views go around the object 60 to 90 degrees apart (for 4 views) from a random start, so that both
    interleaved calls of the default eight views and the released 4-view orbit are inside the distribution. Most rings
    are at the input's own elevation, which is 0 in a good part of the samples.
    """
    elevation = 0.0 if rng.random() < 0.4 else rng.uniform(-10.0, 30.0)
    spacing = rng.uniform(60.0, 90.0) * 4 / views
    azimuths = rng.uniform(10.0, 100.0) + spacing * np.arange(views) + rng.uniform(-6.0, 6.0, views)
    relative = np.zeros(views) if rng.random() < 0.7 else rng.uniform(-20.0, 20.0, views)
    return elevation, np.sort(azimuths % 360.0), relative


def draw_times(rng: np.random.Generator, frames: int) -> Float[np.ndarray, " t"]:
    """Evenly spaced moments in [0, 1], about as far apart as the frames of a 21-frame video."""
    step = rng.uniform(0.7, 1.5) / (VIDEO_FRAMES - 1)
    start = rng.uniform(0.0, 1.0 - step * (frames - 1))
    return start + step * np.arange(frames)


def make_batch(seed: int, step: int, shape: BatchShape, size: int) -> Batch:
    """The training batch of a step."""
    rng = np.random.default_rng([seed, step])
    samples = [_sample(rng, shape, size) for _ in range(shape.objects)]
    inputs, views, azimuths, elevations = (np.stack(parts) for parts in zip(*samples, strict=True))
    return Batch(inputs, views, azimuths, elevations)


def _sample(
    rng: np.random.Generator, shape: BatchShape, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    subject = creature(int(rng.integers(TRAINING_SEEDS.start, TRAINING_SEEDS.stop)))
    elevation, azimuths, relative = draw_cameras(rng, shape.views)
    cameras = look_at_cameras(np.append(0.0, azimuths), elevation + np.append(0.0, relative))
    pictures = render(subject, draw_times(rng, shape.frames), cameras, size)
    return pictures[:, 0], pictures[:, 1:], azimuths, relative


def to_model_images(pictures: UInt8[np.ndarray, "... h w 4"]) -> Float[Tensor, "... 4 h w"]:
    """RGB composited on white, and alpha, in [-1, 1]."""
    values = torch.from_numpy(pictures).float() / 255.0
    colour, alpha = values[..., :3], values[..., 3:]
    images = torch.cat([colour * alpha + (1.0 - alpha), alpha], dim=-1) * 2.0 - 1.0
    return images.movedim(-1, -3)
