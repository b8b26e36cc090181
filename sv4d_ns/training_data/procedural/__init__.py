"""Articulated creatures from a seed, rendered with exact cameras and alpha: the training data of the shipped model."""

import numpy as np
from jaxtyping import Float, UInt8

from sv4d_ns.geometry.cameras import FIELD_OF_VIEW_DEG
from sv4d_ns.training_data.procedural.creatures import Creature, creature
from sv4d_ns.training_data.procedural.renderer import draw

__all__ = ["HELD_OUT_SEEDS", "TRAINING_SEEDS", "Creature", "creature", "render"]

TRAINING_SEEDS = range(0, 2**31)
HELD_OUT_SEEDS = range(2**31, 2**32)
"""Creatures of these two ranges are never mixed: the second is for evaluation and for the bundled sample."""


def render(
    subject: Creature,
    times: Float[np.ndarray, " t"],
    c2w: Float[np.ndarray, "v 4 4"],
    size: int,
    fov_deg: float = FIELD_OF_VIEW_DEG,
) -> UInt8[np.ndarray, "t v h w 4"]:
    """Pictures of a creature at every time from every camera.

    Args:
        subject: from `creature(seed)`.
        times: in [0, 1].
        c2w: OpenGL camera-to-world matrices, e.g. from `sv4d_ns.geometry.cameras.look_at_cameras`.
        size: pixels per side.
        fov_deg: field of view over the side.

    Returns:
        RGBA with straight alpha (pixel coverage), white where nothing is hit.
    """
    times = np.asarray(times, dtype=np.float64)
    cameras = np.ascontiguousarray(c2w, dtype=np.float64)
    rotations, positions = subject.poses(times)
    pictures = np.empty((len(times), len(cameras), size, size, 4), dtype=np.uint8)
    for frame in range(len(times)):
        for view, camera in enumerate(cameras):
            draw(
                camera, fov_deg, size, rotations[frame], positions[frame], subject.surface, subject.lights,
                pictures[frame, view],
            )  # fmt: skip
    return pictures
