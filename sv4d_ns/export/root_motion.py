"""The object's way through the source video, from the crop that followed it."""

from typing import Any

import numpy as np

from sv4d_ns.export.formats.asset import RootMotion
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils.errors import InputError


def root_motion(framing: dict[str, Any] | None, plan: ViewPlan, num_frames: int) -> RootMotion | None:
    """Where the object was at each frame relative to frame 0, metres in the run's world; None where the crop stood.

    A crop that follows the object takes its travel out of the pictures; its centre and side in source pixels put it
    back. Seen by the camera of frame 0's crop, an object in a crop of side s_i centred at c_i stands at the depth
    R s_0 / s_i (R the plan's radius: a larger crop shows a nearer object) and (c_i - c_0) / f_0 times that depth to
    the side, f_0 being frame 0's focal length in source pixels. This is exact for the object's centre; the turn of the
    line of sight on the way is not undone.

    Args:
        framing: the view grid's `framing`; `center_x`, `center_y` and `side` are numbers, or lists of one per frame.

    Raises:
        InputError: the run has no framing, or one of another number of frames.
    """
    if framing is None:
        raise InputError(
            "--root-motion restore needs the crop's way through the source video, and this run has none "
            "(its views were given as files): use --root-motion in-place."
        )
    values = [np.asarray(framing[name], dtype=np.float64) for name in ("center_x", "center_y", "side")]
    if any(value.shape not in ((), (num_frames,)) for value in values):
        raise InputError(
            f"The run's framing is not of its {num_frames} frames: fit the run again, or use --root-motion in-place."
        )
    x, y, side = (np.broadcast_to(value, (num_frames,)) for value in values)
    depth = plan.radius * side[0] / side
    focal = plan.focal_px(1) * side[0]
    right, up, backward = plan.c2w()[0, :3, :3].T
    translation = (
        ((x - x[0]) / focal * depth)[:, None] * right
        - ((y - y[0]) / focal * depth)[:, None] * up
        - (depth - plan.radius)[:, None] * backward
    )
    if np.abs(translation).max() < 1e-9:
        return None
    return RootMotion(translation)
