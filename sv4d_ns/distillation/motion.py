"""Where the matter of a space-time field goes, learned from the field itself, for meshes of fixed topology.

The field says at each time what is where, not which point becomes which. A small network is trained beside it, in
every step, to carry points of any time to the canonical time so that density and colour agree there; the field does
not feel it. Own design, in the manner of D-NeRF's canonical deformation.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.space_time import SpaceTimeField
from sv4d_ns.fitting import losses
from sv4d_ns.utils import randomness
from sv4d_ns.utils.devices import upload

POINTS = 1024
"""Points of a step."""
OPACITY_STEP = 1 / 16
"""Length over which opacity is compared, as a share of the box's half side."""
COLOR = 0.5
"""Weight of colours against opacity."""
RIGIDITY, REST = 0.02, 0.01
"""Weights of keeping short lengths, and of small motion."""
NEIGHBOUR = 0.05
"""Standard deviation of the short lengths, as a share of the box's half side."""


def motion_loss(
    field: SpaceTimeField, occupancy: OccupancyGrid, num_frames: int, seed: int, step: int
) -> Float[Tensor, ""]:
    """How badly the motion explains one random frame; has gradients in the motion network alone."""
    rng = randomness.generator(seed, step, 20)
    frame = int(rng.integers(num_frames))
    occupied = occupancy.occupied[min(frame, occupancy.bins - 1)]
    place, any_there = randomness.draw_true(occupied.flatten(), POINTS, rng)
    side = len(occupied)
    cells = torch.stack([place // side**2, place // side % side, place % side], 1)
    within = upload(rng.random((POINTS, 3), dtype=np.float32), cells.device)
    x = (cells + within) * occupancy.cell_size - occupancy.half_extent
    t = torch.full_like(x[:, :1], frame / max(num_frames - 1, 1))
    moved = field.deformation(x, t)
    residual, slope = _disagreement(field, x, t, (x + moved).detach())
    # the value of the residual with its gradient in the motion, and none in the field
    pulled = (moved * slope).sum()
    explained = residual + pulled - pulled.detach()
    offset = upload(rng.normal(size=x.shape), x.device).to(x) * NEIGHBOUR * field.config.half_extent
    rigid = losses.deformation_rigidity(moved, field.deformation(x + offset, t), offset)
    rest = (moved / field.config.half_extent).square().sum(-1).mean()
    return any_there * (explained + RIGIDITY * rigid + REST * rest)


def _disagreement(
    field: SpaceTimeField, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"], carried: Float[Tensor, "n 3"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "n 3"]]:
    """Mean difference of opacity and colour here and at the carried points, and its slope in the latter."""
    length = OPACITY_STEP * field.config.half_extent
    rest = torch.full_like(t, field.config.canonical_time)
    with torch.no_grad():
        density, color = field.density_and_color(x, t)
        opacity = -torch.expm1(-density * length)
    carried.requires_grad_()
    with torch.enable_grad():
        other_density, other_color = field.density_and_color(carried, rest)
        other = -torch.expm1(-other_density * length)
        both = (opacity - other).square() + COLOR * opacity * (color - other_color).square().mean(-1)
        residual = both.mean()
        (slope,) = torch.autograd.grad(residual, carried)
    return residual.detach(), slope
