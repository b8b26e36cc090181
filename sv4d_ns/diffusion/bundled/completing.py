"""Volumes completed to what the input picture shows. Own design, see docs/deviations.md.

A denoiser of coarse cells leaves out what is thin (a rod, a tail, the legs of a running animal): 1 to 6 % of the
silhouettes that it was given. But the input says that something is there, and in which colour; only its depth is not
known, and what it hangs on tells that.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sv4d_ns.diffusion.bundled.frustum import Frustum, ball_mask
from sv4d_ns.diffusion.bundled.network import EMPTY_ALPHA
from sv4d_ns.diffusion.bundled.rendering import Volume

MOST = 0.98
"""Opacity that a completed column has at most."""
STIFFNESS = 0.05
"""What a pixel's neighbours' depths count against its own column's, if that is opaque."""
SPREAD = 64
"""Pixels that depths are carried over from opaque columns."""
SMOOTHED = 96
"""Relaxations of the depths."""
MOST_HALF = 8
"""Cells before and behind its middle that a completed column reaches at most."""


def completed(volumes: Volume, alpha: Float[Tensor, "n h w"], frustum: Frustum) -> Volume:
    """Volumes whose columns are at least as opaque as the input's alpha says.

    What lacks is put at the depth of the matter around it in the picture, as thick as the silhouette is wide there, in
    the picture's colours.

    Args:
        alpha: of the input's pictures, one pixel for each column.
    """
    density = volumes.density.float()
    side = density.shape[1]
    lacking = (-torch.log1p(-alpha.clamp(max=MOST)) - density.sum(1)).clamp(min=0)
    layer = torch.arange(side, device=density.device) + 0.5
    middle = _depths(density, alpha, layer)
    half = _half_widths(alpha)
    profile = (half[:, None] + 0.5 - (layer[:, None, None] - middle[:, None]).abs()).clamp(0, 1)
    profile = profile * ball_mask(frustum, side, density.device)
    added = lacking[:, None] * profile / profile.sum(1, keepdim=True).clamp(min=1e-3)
    coarse = volumes.gate.shape[1]
    shown = F.adaptive_max_pool3d(added[:, None], (coarse,) * 3)[:, 0]
    gate = torch.maximum(volumes.gate, (shown / (shown + 0.1)).to(volumes.gate))
    return replace(volumes, density=(density + added).to(volumes.density), gate=gate)


def _depths(
    density: Float[Tensor, "n d h w"], alpha: Float[Tensor, "n h w"], layer: Float[Tensor, " d"]
) -> Float[Tensor, "n h w"]:
    """The middle of each column's matter, cells; where there is little, that of the columns around it."""
    total = density.sum(1)
    own = (density * layer[:, None, None]).sum(1) / total.clamp(min=1e-6)
    inside = (alpha > EMPTY_ALPHA).float()
    weight = (1.0 - torch.exp(-total)) * inside
    known = (weight > 0.5).float()
    depth = torch.where(known > 0, own, len(layer) / 2)
    for _ in range(SPREAD):
        around, count = _around(depth * known), _around(known)
        depth = torch.where((known == 0) & (count > 0), around / count.clamp(min=1.0), depth)
        known = torch.maximum(known, (count > 0).float() * inside)
    for _ in range(SMOOTHED):
        around, count = _around(depth * inside), _around(inside)
        depth = (weight * own + STIFFNESS * around + 1e-6 * depth) / (weight + STIFFNESS * count + 1e-6)
    return depth


def _around(values: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """Sums over the eight neighbours."""
    return F.avg_pool2d(values[:, None], 3, 1, 1, divisor_override=1)[:, 0] - values


def _half_widths(alpha: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    """Half the silhouette's width around each pixel, about, in cells."""
    inside = (alpha > 0.5).float()
    half = torch.full_like(alpha, 0.5)
    for _ in range(MOST_HALF):
        inside = -F.max_pool2d(-inside[:, None], 3, 1, 1)[:, 0]
        half = half + inside
    return half
