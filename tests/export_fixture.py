"""An analytic animated field with a known inverse: an ellipsoid body with a limb that swings about the y axis."""

import numpy as np
import torch
from torch import Tensor

from sv4d_ns.export.mesh import AnimatedMesh, animate, canonical_mesh, follow_vertices, opacity_grid, surface_colors

SURFACE_DENSITY = 120.0


class SwingingLimb:
    """Satisfies `sv4d_ns.export.mesh.AnimatedField`.

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


def exported(field: SwingingLimb, times: np.ndarray, fps: float, resolution: int, max_faces: int) -> AnimatedMesh:
    """The field's animated mesh, coloured from the input camera."""
    grid = opacity_grid(field, resolution)
    mesh = canonical_mesh(grid, max_faces)
    colors = surface_colors(field, mesh, grid, np.array([[2.0, 0.0, 0.0]]), np.ones(1))
    return animate(mesh, follow_vertices(field, mesh, times), colors, fps)
