"""The anchor: one view whose pictures the field is to match pixel by pixel.

Score distillation alone leaves much open; 4Diffusion (section 3.3) ties the field to the pictures of one sampled view,
the one nearest to the input camera. Where the input camera's place is known, the input video itself is that view.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional

from sv4d_ns.distillation.losses import ssim
from sv4d_ns.utils.errors import InputError

if TYPE_CHECKING:
    from sv4d_ns.views.grid import ViewGrid

MASK_THRESHOLD = 0.5
COMPARED_SIZE = 32
"""Pixels a side at which views are compared with the input: fine enough for limbs, too coarse for texture."""
KNOWN_POSE = "input_pose_known"
"""Entry of a grid's provenance: false where the input camera's azimuth is only a guess (4DM's own frame)."""


def anchor_target(
    rgba: UInt8[np.ndarray, "h w 4"], background: float = 1.0
) -> tuple[Float[Tensor, "h w 3"], Bool[Tensor, "h w"]]:
    """The picture a render at the anchor is compared with, and its mask.

    Colours are first put on white with their soft alpha, then everything below half opacity becomes background.
    """
    values = torch.from_numpy(rgba).float() / 255.0
    alpha = values[..., 3:]
    on_white = values[..., :3] * alpha + (1 - alpha)
    mask = alpha > MASK_THRESHOLD
    return torch.where(mask, on_white, torch.full_like(on_white, background)), mask[..., 0]


def choose_anchor(grid: "ViewGrid", override: int | None = None) -> int:
    """The anchor's view number in the grid (0 is the input).

    The input itself where its camera is known; otherwise the sampled view that looks most like it.

    Args:
        override: the user's choice.

    Raises:
        InputError: the grid has no such view.
    """
    if override is not None:
        if not 0 <= override <= grid.num_views:
            raise InputError(
                f"--pipeline.anchor-view {override} is not a view of the grid: give 0 (the input) to {grid.num_views}."
            )
        return override
    if grid.provenance.get(KNOWN_POSE, True):
        return 0
    return 1 + nearest_view(grid.input_frames, grid.novel_views)


def nearest_view(frames: UInt8[np.ndarray, "t h w 4"], views: UInt8[np.ndarray, "t v s s 4"]) -> int:
    """Which of the views looks most like the input frames, in structure and outline, whatever its size and place."""
    mine = _normalised(frames)
    likeness = [ssim(mine, _normalised(views[:, view])) for view in range(views.shape[1])]
    return int(torch.stack(likeness).argmax())


def _normalised(rgba: UInt8[np.ndarray, "t h w 4"]) -> Float[Tensor, "t 4 s s"]:
    """Premultiplied colour and alpha, cropped to a square around what is opaque in any frame, small."""
    alpha = rgba[..., 3].max(0) >= 128
    if not alpha.any():
        alpha[:] = True
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    values = torch.from_numpy(rgba).float().movedim(-1, 1) / 255.0
    premultiplied = torch.cat([values[:, :3] * values[:, 3:], values[:, 3:]], 1)
    padded = functional.pad(premultiplied, [int(side)] * 4)
    top = int((rows[0] + rows[-1] + 1 - side) // 2 + side)
    left = int((columns[0] + columns[-1] + 1 - side) // 2 + side)
    crop = padded[:, :, top : top + side, left : left + side]
    return functional.interpolate(crop, (COMPARED_SIZE, COMPARED_SIZE), mode="bilinear", antialias=True)
