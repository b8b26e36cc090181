"""The field of 4Diffusion: density and colour over space and time, from a static and a moving hash grid.

Source: 4Diffusion (arXiv 2405.20674) section 3.3 and aejion/4Diffusion @ 627d0cd, `implicit-volume` with
`HashGridSpatialTime`; the density bias is Magic3D's (Lin et al. 2023). Colour does not depend on the view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sv4d_ns.field.deformable import FieldSample
from sv4d_ns.field.hash_grid import HashGrid
from sv4d_ns.field.motion import Moments
from sv4d_ns.utils.errors import InputError

SPACE_OCTAVES, TIME_OCTAVES = 3, 3
"""Octaves of the motion network's inputs: limbs, not texture."""


@dataclass(frozen=True)
class SpaceTimeFieldConfig:
    """Sizes of a `SpaceTimeField`; the defaults are the reference's, in a box of half side 1."""

    half_extent: float = 1.0
    """The object lives in the box [-half_extent, half_extent]^3."""
    levels: int = 16
    """Of each grid."""
    log2_table_size: int = 19
    """Of each grid's hashed levels."""
    base_resolution: int = 16
    growth: float = 1.447269237440378
    """From level to level, in space and time alike (finest 4096)."""
    hidden_width: int = 64
    """Of the density and the colour network, one hidden layer each."""
    blob_density: float = 10.0
    """Density logit the untrained field has in its centre, per unit of length."""
    blob_radius: float = 0.5
    """Distance from the centre at which that logit has fallen to zero."""
    canonical_time: float = 0.0
    """The time whose shape the motion refers to."""
    motion_width: int = 64
    """Width of the motion's two hidden layers."""
    gate_width: float = 0.05
    """The motion is multiplied by tanh(|t - canonical_time| / gate_width)."""
    encoding_backend: Literal["numba", "torch"] = "numba"

    def scaled(self, factor: float) -> SpaceTimeFieldConfig:
        """The same field in a world whose unit of length is `factor` times shorter: everything grows by `factor`."""
        return replace(self, half_extent=self.half_extent * factor, blob_radius=self.blob_radius * factor)


class SpaceTimeField(nn.Module):
    """Features of two hash grids, one over (x, y, z) and one over (x, y, z, t), are summed and decoded.

    It has the methods of `DeformableField` that rendering, pictures and export need, so that both share them. Pictures
    need no deformation; `deformation` is a network beside the field that learns from it where its matter goes
    (`distillation.motion`), because a mesh of fixed topology has to know.

    Raises:
        InputError: a size in the config that makes no field.
    """

    aabb: Tensor

    def __init__(self, config: SpaceTimeFieldConfig | None = None) -> None:
        super().__init__()
        config = config or SpaceTimeFieldConfig()
        if config.half_extent <= 0 or config.blob_radius <= 0 or config.hidden_width < 1:
            raise InputError("half_extent, blob_radius and hidden_width of a field must be positive.")
        self.config = config

        def grid(dimensions: int) -> HashGrid:
            return HashGrid(
                dimensions,
                config.levels,
                config.log2_table_size,
                config.base_resolution,
                config.growth,
                config.encoding_backend,
            )

        self.space, self.space_time = grid(3), grid(4)
        self.density_net = _decoder(self.space.out_dim, config.hidden_width, 1)
        self.color_net = _decoder(self.space.out_dim, config.hidden_width, 3)
        self.motion_net = _motion(config.motion_width)
        e = config.half_extent
        self.register_buffer("aabb", torch.tensor([[-e, -e, -e], [e, e, e]]))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Groups with their own learning rates: "encoding", "heads" and "motion" (which no picture depends on)."""
        return {
            "encoding": [self.space.table, self.space_time.table],
            "heads": [*self.density_net.parameters(), *self.color_net.parameters()],
            "motion": list(self.motion_net.parameters()),
        }

    def deformation(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3"]:
        """Offset from points at times to where their matter is at `canonical_time`, world units."""
        c = self.config
        place = frequency_encoding(x / c.half_extent, SPACE_OCTAVES)
        moment = frequency_encoding(t, TIME_OCTAVES)
        gate = torch.tanh((t - c.canonical_time).abs() / c.gate_width)
        return gate * c.half_extent * self.motion_net(torch.cat([place, moment], -1))

    def canonical_density(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Density at `canonical_time`."""
        return self.density(x, torch.full_like(x[:, :1], self.config.canonical_time))

    def features(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, "n f"]:
        """The sum of both grids' features at points of the box and times in [0, 1]."""
        place = self._unit(x)
        return self.space(place) + self.space_time(torch.cat([place, t], -1))

    def density_of(self, features: Float[Tensor, "n f"], x: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Density per unit of length from features; positive and unbounded."""
        return functional.softplus(self.density_net(features)[:, 0] + self._bias(x))

    def sample(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"], moments: Moments = None) -> FieldSample:
        """Density, zero outside the box, and the features for `color_from_geometry`; any time will do."""
        features = self.features(x, t)
        inside = x.detach().abs().amax(-1) <= self.config.half_extent
        return FieldSample(self.density_of(features, x) * inside, features, torch.zeros_like(x), x)

    def color_from_geometry(self, geometry: Float[Tensor, "n f"]) -> Float[Tensor, "n 3"]:
        """sRGB colour in [0, 1] from features."""
        return torch.sigmoid(self.color_net(geometry))

    def density(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"], moments: Moments = None) -> Float[Tensor, " n"]:
        """Density per unit of length; zero outside the box; any time will do."""
        return self.sample(x, t).density

    def density_and_color(
        self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]:
        """Density per unit of length and sRGB colour in [0, 1]."""
        sample = self.sample(x, t)
        return sample.density, self.color_from_geometry(sample.geometry)

    def normals(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3"]:
        """Unit outward normals: minus the analytic gradient of density, differentiable in all parameters."""
        differentiable = torch.is_grad_enabled()
        x = x.detach()
        place = self._unit(x)
        moment = torch.cat([place, t.detach()], -1)
        with torch.enable_grad():
            features = self.space(place) + self.space_time(moment)
            if not features.requires_grad:  # frozen parameters
                features.requires_grad_()
            logit = self.density_net(features)[:, 0]
            (slope,) = torch.autograd.grad(logit.sum(), features, create_graph=differentiable)
        pulled = self.space.vjp(place, slope) + self.space_time.vjp(moment, slope)[:, :3]
        # density rises with its logit, so both have the same normal
        return -functional.normalize(pulled / (2 * self.config.half_extent) + self._bias_gradient(x), dim=-1)

    def _unit(self, x: Tensor) -> Tensor:
        e = self.config.half_extent
        # beyond the box a coordinate would wrap around to the other side of a dense level
        return ((x + e) / (2 * e)).clamp(0, 1)

    def _bias(self, x: Tensor) -> Tensor:
        c = self.config
        return c.blob_density * (1 - x.norm(dim=-1) / c.blob_radius)

    def _bias_gradient(self, x: Tensor) -> Tensor:
        c = self.config
        return -c.blob_density / c.blob_radius * functional.normalize(x, dim=-1)


def frequency_encoding(x: Float[Tensor, "n d"], octaves: int) -> Float[Tensor, "n e"]:
    """x, then sin and cos of pi 2^k x for k < octaves."""
    # Doubling the angle (sin 2a = 2 sin a cos a, cos 2a = 1 - 2 sin^2 a) costs two products where sin and cos cost
    # twenty, and float32 keeps six digits over the few octaves used.
    sin, cos = torch.sin(math.pi * x), torch.cos(math.pi * x)
    features = [x, sin, cos]
    for _ in range(octaves - 1):
        sin, cos = 2 * sin * cos, 1 - 2 * sin * sin
        features += [sin, cos]
    return torch.cat(features, -1)


def _motion(width: int) -> nn.Sequential:
    inputs = 3 * (1 + 2 * SPACE_OCTAVES) + 1 + 2 * TIME_OCTAVES
    last = nn.Linear(width, 3)
    # at rest until it has learned otherwise
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)


def _decoder(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False), nn.ReLU(inplace=True), nn.Linear(hidden, outputs, bias=False)
    )
