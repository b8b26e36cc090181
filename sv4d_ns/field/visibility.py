"""How much each pixel of each view is trusted.

Soft visibility is SV3D's (Voleti et al. 2024, smoothstep of n.v between 0 and 0.5); SV4D 2.0 is only known to weight
its photometric loss by visibility. The combination here is our own design: the input view counts 1 everywhere; a
generated pixel counts by its angular distance from the input view, by how frontally its own camera sees the surface,
and less where the input view sees the same surface well (there the real pixels should decide).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.volume_rendering import render_depth
from sv4d_ns.geometry.rays import picture_rays, project
from sv4d_ns.utils.images import smoothstep
from sv4d_ns.utils.split import results_of


@dataclass(frozen=True)
class VisibilityConfig:
    """Our own values, except the smoothstep's edges (SV3D)."""

    facing_edges: tuple[float, float] = (0.0, 0.5)
    facing_floor: float = 0.2
    """Weight left to grazing pixels: silhouettes are all that shapes the outline."""
    farthest_weight: float = 0.25
    """Weight of a generated view opposite to the input view; 1 for one at the input view itself."""
    seen_by_input: float = 0.5
    """Share of a generated pixel's weight that is taken away where the input view sees the surface frontally."""
    occlusion_tolerance: float = 0.03
    """World units by which a point may lie behind the input view's depth and still count as seen."""
    scale: float = 0.5
    """Resolution of the maps relative to the images (weights are smooth; normals are finite differences anyway)."""


def soft_visibility(
    points: Float[Tensor, "n 3"],
    normals: Float[Tensor, "n 3"],
    camera: Float[Tensor, " 3"],
    edges: tuple[float, float] = (0.0, 0.5),
) -> Float[Tensor, " n"]:
    """SV3D's soft visibility of surface points from a camera position: 0 from behind, 1 from within 60 degrees."""
    toward = torch.nn.functional.normalize(camera - points, dim=-1)
    return smoothstep((normals * toward).sum(-1), *edges)


def angular_weight(camera: Float[Tensor, " 3"], input_camera: Float[Tensor, " 3"], farthest: float = 0.25) -> float:
    """From 1 at the input camera down to `farthest` on the other side, linear in the angle seen from the origin."""
    cosine = torch.nn.functional.cosine_similarity(camera, input_camera, dim=0).clamp(-1, 1)
    return float(1 - (1 - farthest) * torch.arccos(cosine) / torch.pi)


def unoccluded(
    points: Float[Tensor, "n 3"],
    depth: Float[Tensor, "h w"],
    camera_to_world: Float[Tensor, "4 4"],
    focal: float,
    tolerance: float,
) -> Bool[Tensor, " n"]:
    """Whether points are on the first surface a camera sees. `depth` is its rendered distance along the rays."""
    height, width = depth.shape
    uv, _ = project(points, camera_to_world, focal, height, width)
    column, row = uv.floor().long().unbind(-1)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    # The largest depth of the 3x3 neighbourhood: beside a silhouette the nearest pixel may belong to what is in front.
    far = torch.nn.functional.max_pool2d(depth[None, None], 3, 1, 1)[0, 0]
    limit = far[row.clamp(0, height - 1), column.clamp(0, width - 1)] + tolerance
    return inside & ((points - camera_to_world[:3, 3]).norm(dim=-1) <= limit)


@dataclass(frozen=True)
class SurfaceMap:
    """The first surface a camera sees, a value for each of its pixels (rows first)."""

    alpha: Tensor
    depth: Tensor
    points: Tensor


@torch.no_grad()
def surface_map(
    field: DeformableField, occupancy: OccupancyGrid, camera_to_world: Tensor, focal: float, size: int, time: float
) -> SurfaceMap:
    """What a camera sees of the field at a time in [0, 1], in a square picture; size and focal length in pixels."""
    origins, directions = picture_rays(camera_to_world, focal, size)
    times = torch.full_like(origins[:, :1], time)
    alpha, depth = render_depth(field, occupancy, origins, directions, times, n_samples=96)
    points = origins + depth[:, None] * directions
    return SurfaceMap(alpha.reshape(size, size), depth.reshape(size, size), points)


@torch.no_grad()
def surface_normals(
    field: Any, points: Float[Tensor, "n 3"], alpha: Float[Tensor, " n"], times: Float[Tensor, "n 1"], **options: float
) -> Float[Tensor, "n 3"]:
    """Unit world normals at the points where rays meet the surface (alpha >= 0.5), zero elsewhere.

    Args:
        options: of the field's `normals`.
    """
    hit = (alpha >= 0.5).nonzero()[:, 0]
    normals = torch.zeros_like(points)
    if len(hit):
        normals[hit] = field.normals(points[hit], times[hit], **options)
    return normals


@torch.no_grad()
def view_weights(
    field: DeformableField,
    occupancy: OccupancyGrid,
    input_camera: Float[Tensor, "4 4"],
    cameras: Float[Tensor, "v 4 4"],
    fov_tan: float,
    size: int,
    time: float,
    config: VisibilityConfig | None = None,
) -> Float[Tensor, "v h w"]:
    """Weights in [0, 1] of generated square views at one time, [v, s, s] with s = round(scale * size).

    The caller recomputes them every so many steps (one frame at a time keeps the pauses short) and resizes them to the
    images. `fov_tan` is the tangent of half the field of view. Pixels where the field is empty keep the view's angular
    weight: there the generated mask is the only witness.
    """
    config = config or VisibilityConfig()
    side = max(round(config.scale * size), 8)
    focal = side / 2 / fov_tan
    seen = surface_map(field, occupancy, input_camera, focal, side, time)

    def seen_from(camera: Float[Tensor, "4 4"]) -> Float[Tensor, "s s"]:
        surface = surface_map(field, occupancy, camera, focal, side, time)
        times = torch.full_like(surface.points[:, :1], time)
        # smooth over a map's pixel
        normals = surface_normals(field, surface.points, surface.alpha.flatten(), times, epsilon=0.015)
        facing = soft_visibility(surface.points, normals, camera[:3, 3], config.facing_edges)
        by_input = soft_visibility(surface.points, normals, input_camera[:3, 3], config.facing_edges)
        by_input = by_input * unoccluded(surface.points, seen.depth, input_camera, focal, config.occlusion_tolerance)
        weight = (config.facing_floor + (1 - config.facing_floor) * facing) * (1 - config.seen_by_input * by_input)
        weight = torch.where(surface.alpha.flatten() > 0.5, weight, torch.ones_like(weight))
        return angular_weight(camera[:3, 3], input_camera[:3, 3], config.farthest_weight) * weight.reshape(side, side)

    maps = results_of([partial(seen_from, camera) for camera in cameras])
    return torch.stack(maps) if maps else seen.depth.new_zeros(0, side, side)
