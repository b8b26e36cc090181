"""The pictures of a training step, with gradients in bounded memory.

Rays are rendered in chunks. Where there is more than one chunk each is checkpointed: only its pictures are kept, and it
is rendered again when its gradient arrives (deferred back-propagation, Zhang et al. 2022, ARF).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sv4d_ns.distillation.losses import depth_variance
from sv4d_ns.field.compositing import composite
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.space_time import SpaceTimeField
from sv4d_ns.field.volume_rendering import box_step, colours, march
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.geometry.rays import picture_rays
from sv4d_ns.utils.devices import upload


@dataclass(frozen=True)
class Rays:
    """n rays."""

    origins: Float[Tensor, "n 3"]
    directions: Float[Tensor, "n 3"]
    times: Float[Tensor, "n 1"]

    def __len__(self) -> int:
        return len(self.origins)


@dataclass(frozen=True)
class Rendered:
    """What n rays show, on white."""

    rgb: Float[Tensor, "n 3"]
    alpha: Float[Tensor, " n"]
    orientation: Float[Tensor, ""]
    """Sum over rays of w max(n . d, 0)^2, estimated from samples drawn by weight; see `losses.orientation`."""
    z_variance: Float[Tensor, " n"]
    """Of the depth along each ray; zero unless asked for."""


@dataclass(frozen=True)
class RenderSettings:
    """How rays are rendered in training."""

    samples: int = 256
    """Steps along the box's diagonal; only those in occupied space are evaluated."""
    chunk_rays: int = 1 << 17
    """Rays whose graph is kept at once."""
    normals: int = 4096
    """Samples a chunk's orientation is estimated from; 0 leaves it out."""
    z_variance: bool = False


def grid_rays(plan: ViewPlan, times: Float[Tensor, " f"], size: int, device: torch.device | str) -> Rays:
    """All pixels of the plan's novel views at all times, in (f v y x) order."""
    c2w = upload(plan.c2w()[1:].astype(np.float32), device)
    pictures = [picture_rays(camera, plan.focal_px(size), size) for camera in c2w]
    origins, directions = (torch.cat(parts) for parts in zip(*pictures, strict=True))
    frames = len(times)
    return Rays(
        origins.repeat(frames, 1),
        directions.repeat(frames, 1),
        upload(times, device).repeat_interleave(len(origins))[:, None],
    )


def render(
    field: SpaceTimeField, occupancy: OccupancyGrid, rays: Rays, settings: RenderSettings, seed: int
) -> Rendered:
    """Render rays with gradient; the random shift of samples along each ray follows from the seed."""
    return render_together(field, occupancy, [(rays, seed)], settings)[0]


def render_together(
    field: SpaceTimeField, occupancy: OccupancyGrid, parts: Sequence[tuple[Rays, int]], settings: RenderSettings
) -> list[Rendered]:
    """Several sets of rays, each with its own seed, as if they were one: a GPU is waited for once, not for each.

    Orientation is asked of the first set alone.
    """
    sets, seeds = zip(*parts, strict=True)
    names = [f.name for f in fields(Rays)]
    rays = Rays(*(torch.cat([getattr(each, name) for each in sets]) for name in names))
    shifts = [torch.rand(len(each), generator=torch.Generator().manual_seed(seed)) for each, seed in parts]
    jitter = upload(torch.cat(shifts), rays.origins.device)
    turned = len(sets[0])
    starts = range(0, len(rays), settings.chunk_rays)

    def chunk(start: int) -> tuple[Tensor, ...]:
        part = slice(start, start + settings.chunk_rays)
        piece = Rays(rays.origins[part], rays.directions[part], rays.times[part])
        counted = min(max(turned - start, 0), len(piece))
        return _render_chunk(field, occupancy, piece, jitter[part], settings, counted, seeds[0] + 1 + start)

    if len(starts) == 1 or not torch.is_grad_enabled():
        chunks = [chunk(start) for start in starts]
    else:
        chunks = [checkpoint(chunk, start, use_reentrant=False, preserve_rng_state=False) for start in starts]
    rgb, alpha, orientation, variance = zip(*chunks, strict=True)
    sizes = [len(each) for each in sets]
    split = [torch.cat(values).split(sizes) for values in (rgb, alpha, variance)]
    turning = torch.stack(orientation).sum()
    return [
        Rendered(of_rgb, of_alpha, turning if number == 0 else torch.zeros_like(turning), of_variance)
        for number, (of_rgb, of_alpha, of_variance) in enumerate(zip(*split, strict=True))
    ]


def _render_chunk(
    field: SpaceTimeField,
    occupancy: OccupancyGrid,
    rays: Rays,
    jitter: Float[Tensor, " n"],
    settings: RenderSettings,
    counted: int,
    seed: int,
) -> tuple[Tensor, ...]:
    """rgb, alpha, the orientation of the first `counted` rays, and the variance of depth."""
    step = box_step(occupancy.half_extent, settings.samples)
    samples = march(occupancy, rays.origins, rays.directions, rays.times, step, jitter)
    index, distances = samples.ray_indices, samples.distances
    x = rays.origins[index] + distances[:, None] * rays.directions[index]
    t = rays.times[index]
    queried = field.sample(x, t)
    weights, sums = composite(queried.density, samples)
    seen: torch.nn.Module = field
    rgb = colours(seen, queried.geometry, weights, samples)  # type: ignore[arg-type]  # it has the methods this needs
    alpha = sums[:, 0]
    turning = weights.detach() * (index < counted)
    normals = settings.normals if counted else 0
    orientation = _orientation(field, x, t, rays.directions[index], turning, normals, seed)
    variance = torch.zeros_like(alpha)
    if settings.z_variance:
        variance = depth_variance(weights, distances, index, len(rays))
    return rgb + (1 - alpha[:, None]), alpha, orientation, variance


def _orientation(
    field: SpaceTimeField,
    x: Float[Tensor, "m 3"],
    t: Float[Tensor, "m 1"],
    directions: Float[Tensor, "m 3"],
    weights: Float[Tensor, " m"],
    count: int,
    seed: int,
) -> Float[Tensor, ""]:
    """An unbiased estimate of sum w max(n . d, 0)^2 over all samples, from `count` of them drawn by weight."""
    total = weights.double().cumsum(0)
    if not count or not len(weights):
        return weights.new_zeros(())
    # evenly spaced thresholds with a common shift: as even a draw as can be
    generator = torch.Generator().manual_seed(seed)
    shift = upload(torch.rand(1, generator=generator, dtype=torch.float64), x.device)
    thresholds = (torch.arange(count, device=x.device) + shift) / count * total[-1]
    pick = torch.searchsorted(total, thresholds).clamp(max=len(weights) - 1)
    away = (field.normals(x[pick], t[pick]) * directions[pick]).sum(-1).clamp(min=0).square()
    return total[-1].to(away.dtype) * away.mean()
