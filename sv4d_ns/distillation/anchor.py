"""The anchor: one view whose pictures the field is to match pixel by pixel.

Score distillation alone leaves much open; 4Diffusion (section 3.3) ties the field to the pictures of one sampled view,
the one nearest to the input camera. Where the input camera's place is known, the input video itself is that view.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from sv4d_ns.synthesis.fourdm import KNOWN_POSE, nearest_view
from sv4d_ns.utils.errors import InputError

if TYPE_CHECKING:
    from sv4d_ns.views.grid import ViewGrid

MASK_THRESHOLD = 0.5


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
