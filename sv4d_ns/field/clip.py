"""The field and the empty-space grid of a clip, as a run of `sv4d` has them."""

from typing import Literal

from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import OccupancyGrid


def clip_field(
    num_frames: int, canonical_frame: int, encoding: Literal["auto", "numba", "tinycudann"]
) -> tuple[DeformableField, OccupancyGrid]:
    """An untrained field with a keyframe for every frame, canonical at one of them, and a grid with a bin for each.

    Args:
        num_frames: of the clip.
        canonical_frame: at which nothing is deformed.
        encoding: of the hash grid; "auto", which `ns-train` settles before, is "numba" here, which runs anywhere.
    """
    canonical_time = canonical_frame / max(num_frames - 1, 1)
    backend: Literal["numba", "tinycudann"] = "numba" if encoding == "auto" else encoding
    config = DeformableFieldConfig(keyframes=num_frames, canonical_time=canonical_time, encoding_backend=backend)
    return DeformableField(config), OccupancyGrid(num_frames)
