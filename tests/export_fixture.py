"""An analytic animated field with a known inverse: an ellipsoid body with a limb that swings about the y axis."""

import numpy as np
import torch
from torch import Tensor

from sv4d_ns.export.colour.baking import Picture
from sv4d_ns.export.formats.asset import AnimatedMesh, animated_mesh
from sv4d_ns.export.surface.extraction import CanonicalMesh, canonical_mesh, follow_vertices, opacity_grid
from sv4d_ns.geometry.cameras import ViewPlan

SURFACE_DENSITY = 120.0


class SwingingLimb:
    """Satisfies `sv4d_ns.export.surface.extraction.AnimatedField`.

    Points turn about the y axis by angle(t) * ramp(distance from the axis). The turn keeps that distance, so the
    inverse map is the opposite turn, exactly; near the axis (the body) nothing moves.
    """

    def __init__(self, swing: float = 0.8, density: float = SURFACE_DENSITY, edge: float = 0.004):
        self.aabb = torch.tensor([[-0.57] * 3, [0.57] * 3])
        self.swing, self.peak, self.edge = swing, density, edge

    def _turned(self, x: Tensor, angle: Tensor) -> Tensor:
        radius = torch.sqrt(x[:, 0] ** 2 + x[:, 2] ** 2)
        ramp = ((radius - 0.15) / 0.25).clamp(0, 1)
        ramp = ramp * ramp * (3 - 2 * ramp)
        a = angle.reshape(-1) * ramp
        return torch.stack([x[:, 0] * a.cos() + x[:, 2] * a.sin(), x[:, 1], x[:, 2] * a.cos() - x[:, 0] * a.sin()], -1)

    def _angle(self, t: Tensor) -> Tensor:
        return self.swing * torch.sin(2 * np.pi * (t + 0.1))

    def deformation(self, x: Tensor, t: Tensor) -> Tensor:
        return self._turned(x, self._angle(t)) - x

    def moved(self, canonical: Tensor, t: float) -> Tensor:
        """The truth: where canonical points are at time t."""
        return self._turned(canonical, -self._angle(torch.full_like(canonical[:, :1], t)))

    def distance(self, x: Tensor) -> Tensor:
        """Approximate signed distance to body and limb."""
        body = (torch.linalg.norm(x / torch.tensor([0.22, 0.16, 0.3]), dim=-1) - 1) * 0.16
        along = x[:, 0].clamp(0, 0.45)
        limb = torch.sqrt((x[:, 0] - along) ** 2 + x[:, 1] ** 2 + x[:, 2] ** 2) - 0.07
        return torch.minimum(body, limb)

    def canonical_density(self, x: Tensor) -> Tensor:
        return self.peak * torch.sigmoid(-self.distance(x) / self.edge)

    def canonical_color(self, x: Tensor) -> Tensor:
        """Red body with a greener left side (+y), blue limb: no two sides look alike."""
        blue = (x[:, 0] > 0.25).float()
        green = (1 - blue) * (x[:, 1] > 0.03).float()
        return torch.stack([0.9 - 0.8 * blue - 0.6 * green, 0.25 + 0.5 * green, 0.1 + 0.8 * blue], -1)

    def density(self, x: Tensor, t: Tensor) -> Tensor:
        return self.canonical_density(x + self.deformation(x, t))

    def density_and_color(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        canonical = x + self.deformation(x, t)
        return self.canonical_density(canonical), self.canonical_color(canonical)


def surface_of(field: SwingingLimb, resolution: int, max_faces: int) -> CanonicalMesh:
    return canonical_mesh(opacity_grid(field, resolution), max_faces)


def exported(field: SwingingLimb, times: np.ndarray, fps: float, resolution: int, max_faces: int) -> AnimatedMesh:
    """The field's animated mesh in its own colours; the limb's tip counts as unseen, what faces +x as observed."""
    surface = surface_of(field, resolution, max_faces)
    colors = field.canonical_color(torch.from_numpy(surface.vertices)).numpy()
    sure = np.where(surface.vertices[:, 0] > 0.4, 0.0, np.where(surface.vertices[:, 0] > 0, 1.0, 0.5))
    tracks = follow_vertices(field, surface, times)
    return animated_mesh(tracks.positions, surface.faces, np.round(colors * 255).astype(np.uint8), sure, fps)


def drawn(field: SwingingLimb, plan: ViewPlan, camera: int, time: float, size: int, steps: int = 400) -> np.ndarray:
    """uint8 RGBA [size, size, 4] of the field at a camera of the plan, by plain quadrature along each ray."""
    c2w = torch.from_numpy(plan.c2w()[camera]).float()
    grid = (torch.arange(size) + 0.5 - size / 2) / plan.focal_px(size)
    y, x = torch.meshgrid(-grid, grid, indexing="ij")
    directions = torch.stack([x, y, -torch.ones_like(x)], -1).reshape(-1, 3) @ c2w[:3, :3].T
    depths, step = torch.linspace(1.3, 2.7, steps), 1.4 / (steps - 1)
    rgb, transmitted = torch.zeros(size**2, 3), torch.ones(size**2, 1)
    for depth in depths:
        points = c2w[:3, 3] + depth * directions
        density, color = field.density_and_color(points, torch.full((size**2, 1), time))
        alpha = 1 - torch.exp(-density[:, None] * step * directions.norm(dim=-1, keepdim=True))
        rgb, transmitted = rgb + transmitted * alpha * color, transmitted * (1 - alpha)
    coverage = 1 - transmitted
    rgba = torch.cat([rgb / coverage.clamp(min=1e-6), coverage], -1).reshape(size, size, 4)
    return (rgba.clamp(0, 1) * 255).round().byte().numpy()


def pictures(field: SwingingLimb, plan: ViewPlan, cameras: list[int], times: np.ndarray, size: int) -> list[Picture]:
    """The field drawn at cameras of a plan, frame by frame."""
    return [
        Picture(drawn(field, plan, camera, float(time), size, 150), plan.c2w()[camera], plan.focal_px(1), frame)
        for frame, time in enumerate(times)
        for camera in cameras
    ]
