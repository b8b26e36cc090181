"""How a new frame's motion is found before its pixels are asked: by its visual hull and the surface's flow.

Pixels pull only on what already overlaps them; distances to a hull do from anywhere near. Own design.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.field.occupancy import DISTANCE_REACH, OccupancyGrid
from sv4d_ns.fitting import losses
from sv4d_ns.fitting.scene_flow import SceneFlow
from sv4d_ns.utils import randomness
from sv4d_ns.utils.devices import upload

NEIGHBOUR_SCALE = 0.02
"""Standard deviation of the offsets of those terms, world units (about one cell of a 64^3 grid)."""
BAND = 0.08
"""How far from a hull's surface the deformation is registered and kept rigid, world units."""
BAND_POINTS = 512
"""Points of that band a step looks at in each of its frames."""
FLOW_POINTS = 1024
"""Followed surface points a new frame's start looks at in a step, and half as many of a batch's frames."""


@dataclass(frozen=True)
class Admission:
    """A frame that enters the window, and the one in it that it starts from."""

    new: int
    known: int


@dataclass(frozen=True)
class _Start:
    """How a new frame's motion is found before its pixels are asked."""

    steps: int
    rigidity: float
    """Weights of rigidity and of residual on the canonical hull; that of the surface's flow is 1."""
    residual: float


BY_HULL = _Start(steps=60, rigidity=30.0, residual=1.0)
"""The hulls alone say where matter went: rigid, or every limb goes to the nearest one."""
BY_FLOW = _Start(steps=100, rigidity=0.03, residual=0.01)
"""Followed points say it; hulls and rigidity fill in what nobody could follow."""
REGISTRATION_RATE = 0.02
"""Adam's rate of those steps, in grid cells."""


def init_frame_from_neighbour(
    field: DeformableField, occupancy: OccupancyGrid, flow: SceneFlow | None, frame: Admission, seed: int
) -> None:
    """Start a new frame's motion: that of the frame it is found from (`FrameOrder`), moved as the hulls' middles did,
    then registered to its own hull and to where the views' optical flow says its surface came from.

    Costs about a second, once per frame. Pixels could not do this: they pull on what already overlaps them.
    """
    shift = occupancy.centroid(frame.new) - occupancy.centroid(frame.known)
    if not field.init_frame_from_neighbour(frame.new, frame.known, shift):
        return
    start = BY_HULL if flow is None else BY_FLOW
    parameter = field.motion.keyframes[frame.new]
    optimizer = torch.optim.Adam([parameter], lr=REGISTRATION_RATE, betas=(0.9, 0.99), eps=1e-15)
    for number in range(start.steps):
        rng = randomness.generator(seed, number, 5)
        band = draw_band(occupancy, [frame.new], rng)
        if band is None:
            return
        optimizer.param_groups[0]["lr"] = REGISTRATION_RATE * (1 - number / start.steps)
        residual, rigidity = band_losses(field, occupancy, band)
        loss = start.residual * residual + start.rigidity * rigidity
        if flow is not None:
            loss = loss + flow_loss(field, occupancy, flow, frame, FLOW_POINTS, rng)
        parameter.grad = torch.autograd.grad(loss, parameter)[0]
        optimizer.step()
    parameter.grad = None


def flow_loss(
    field: DeformableField,
    occupancy: OccupancyGrid,
    flow: SceneFlow,
    frame: Admission,
    points: int,
    rng: np.random.Generator,
) -> Tensor:
    """What followed points of `frame.new` owe: to come from where they came from in `frame.known`."""
    known, new = flow.matches(frame.known, frame.new).draw(points, rng)
    if not len(new):
        return new.sum()  # nothing could be followed: nothing is owed
    before, now = (number / max(occupancy.bins - 1, 1) for number in (frame.known, frame.new))
    with torch.no_grad():
        origin = known + field.deformation(known, torch.full_like(known[:, :1], before), [before])
    moved = field.deformation(new, torch.full_like(new[:, :1], now), [now])
    return losses.scene_flow(new + moved, origin, occupancy.cell_size)


@dataclass(frozen=True)
class Band:
    """Points around the hulls of some moments."""

    moments: list[float]
    x: Tensor
    t: Tensor
    distance: Tensor
    offset: Tensor


def draw_band(occupancy: OccupancyGrid, bins: list[int], rng: np.random.Generator) -> Band | None:
    moments, points, times, distances = [], [], [], []
    for k in bins:
        x = occupancy.draw_points(occupancy.band(k, BAND), BAND_POINTS, rng)
        if not len(x):
            continue
        moments.append(k / max(occupancy.bins - 1, 1))
        points.append(x)
        times.append(torch.full_like(x[:, :1], moments[-1]))
        distances.append(occupancy.distance_at(x, k))
    if not points:
        return None
    x = torch.cat(points)
    offset = upload(2 * NEIGHBOUR_SCALE * rng.normal(size=x.shape), x.device).to(x)
    return Band(moments, x, torch.cat(times), torch.cat(distances), offset)


def band_losses(field: DeformableField, occupancy: OccupancyGrid, band: Band) -> tuple[Tensor, Tensor]:
    """Registration and rigidity of the deformation at a band's points."""
    canonical = occupancy.nearest_bin(field.config.canonical_time)
    moved = field.deformation(torch.cat([band.x, band.x + band.offset]), torch.cat([band.t, band.t]), band.moments)
    here, neighbour = moved.chunk(2)
    landed = occupancy.distance_at(band.x + here, canonical)
    residual = losses.registration(landed, band.distance, occupancy.cell_size, DISTANCE_REACH)
    return residual, losses.deformation_rigidity(here, neighbour, band.offset)
