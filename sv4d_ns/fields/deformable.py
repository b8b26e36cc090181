"""The 4D field: one canonical hash-grid object and a deformation that says where each observed point came from.

SV4D (Xie et al. 2024) section 4: canonical Instant-NGP grid with density and colour heads, a deformation MLP over
(position, time embedding), the canonical field queried at x + dx, time frequencies opened from low to high. Sizes,
activations and the canonical gate are not in the papers; they are our own decisions, measured in
`benchmarks/field_fit.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sv4d_ns.errors import InputError
from sv4d_ns.fields.encoding import HashEncoding


@dataclass(frozen=True)
class DeformableFieldConfig:
    """Sizes of a `DeformableField` (all defaults are our own, chosen by measurement on two CPU cores)."""

    half_extent: float = 0.57
    """The object lives in the box [-half_extent, half_extent]^3 (world units)."""
    levels: int = 8
    log2_table_size: int = 16
    base_resolution: int = 16
    max_resolution: int = 256
    hidden_width: int = 32
    """Width of the density and colour heads (one hidden layer each)."""
    geometry_features: int = 15
    """Features handed from the density head to the colour head."""
    max_density: float = 200.0
    """Density is max_density * sigmoid(logit), per world unit: bounded, so the surface is the level set logit = 0 and
    a 1/65 unit step through the object is 95 % opaque."""
    initial_logit: float = -6.5
    """Density logit of the untrained field (0.3 per unit: a thin fog). Denser fog must be cleared away before there is
    an object: -4.5 instead of -6.5 costs several dB after 150 steps. Keep it above the occupancy threshold."""
    logit_gain: float = 5.0
    """Factor on the network's density output: how fast fog can become a surface."""
    bounds_resolution: int = 64
    """Cells a side of the grid that bounds the canonical object (see `DeformableField.confine`)."""
    deformation_width: int = 64
    deformation_layers: int = 3
    """Hidden layers of the deformation MLP."""
    space_frequencies: int = 4
    time_frequencies: int = 5
    """Octaves of the positional encodings of position (in half extents) and time."""
    canonical_time: float = 0.0
    """The time whose shape is the canonical shape; the deformation is exactly zero there."""
    gate_width: float = 0.05
    """The deformation is multiplied by tanh(|t - canonical_time| / gate_width): exactly zero at the canonical time, so
    the canonical mesh is the object at that time, and free one frame (1/20) away from it."""
    encoding_backend: Literal["numba", "torch"] = "numba"


@dataclass(frozen=True)
class FieldSample:
    """A field evaluated at n points."""

    density: Float[Tensor, " n"]
    """Per world unit, in [0, max_density]."""
    geometry: Float[Tensor, "n g"]
    """Input of `DeformableField.color_from_geometry`."""
    deformation: Float[Tensor, "n 3"]
    canonical: Float[Tensor, "n 3"]


def frequency_encoding(x: Float[Tensor, "n d"], octaves: int, alpha: float) -> Float[Tensor, "n e"]:
    """x, then sin and cos of pi 2^k x for k < octaves; octave k is faded in by clip(alpha - k, 0, 1).

    The fade is the raised cosine of Park et al. 2021 (Nerfies) eq. 8; alpha runs from 0 to `octaves`.
    """
    # Doubling the angle (sin 2a = 2 sin a cos a, cos 2a = 1 - 2 sin^2 a) costs two products where sin and cos cost
    # twenty, and float32 keeps six digits over the few octaves used.
    sin, cos = torch.sin(math.pi * x), torch.cos(math.pi * x)
    features = [x]
    for k in range(octaves):
        if k > 0:
            sin, cos = 2 * sin * cos, 1 - 2 * sin * sin
        fade = 0.5 * (1 - math.cos(math.pi * min(max(alpha - k, 0.0), 1.0)))
        features += [sin * fade, cos * fade]
    return torch.cat(features, -1)


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class DeformableField(nn.Module):
    """Density and colour of a moving object: canonical grid at x + deformation(x, t).

    Parameters in two groups for the optimiser: `encoding` (hash table) and the three MLPs
    (`density_head`, `color_head`, `deformation_net`); see `parameter_groups`.

    Raises:
        InputError: a size in the config that makes no field.
    """

    progress: Tensor
    aabb: Tensor
    bounds: Tensor

    def __init__(self, config: DeformableFieldConfig | None = None) -> None:
        super().__init__()
        config = config or DeformableFieldConfig()
        if config.half_extent <= 0 or config.max_density <= 0 or config.deformation_layers < 1:
            raise InputError("half_extent, max_density and deformation_layers of a field must be positive.")
        if not 0 <= config.canonical_time <= 1:
            raise InputError(f"canonical_time={config.canonical_time} is outside [0, 1]; use a frame's time.")
        self.config = config
        self.encoding = HashEncoding(
            levels=config.levels,
            log2_table_size=config.log2_table_size,
            base_resolution=config.base_resolution,
            max_resolution=config.max_resolution,
            backend=config.encoding_backend,
        )
        self.density_head = _mlp([self.encoding.out_dim, config.hidden_width, 1 + config.geometry_features])
        self.color_head = _mlp([config.geometry_features, config.hidden_width, 3])
        inputs = 3 * (1 + 2 * config.space_frequencies) + 1 + 2 * config.time_frequencies
        self.deformation_net = _mlp([inputs] + [config.deformation_width] * config.deformation_layers + [3])
        for layer in self.density_head:
            if isinstance(layer, nn.Linear):  # so that the untrained density is initial_logit's, whatever the seed
                nn.init.zeros_(layer.bias)
        last = self.deformation_net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        e = config.half_extent
        self.register_buffer("aabb", torch.tensor([[-e, -e, -e], [e, e, e]]))
        self.register_buffer("progress", torch.tensor(1.0))
        self.register_buffer("bounds", torch.ones((config.bounds_resolution,) * 3, dtype=torch.bool))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Groups with their own learning rates: "encoding", "heads", "deformation"."""
        return {
            "encoding": list(self.encoding.parameters()),
            "heads": [*self.density_head.parameters(), *self.color_head.parameters()],
            "deformation": list(self.deformation_net.parameters()),
        }

    def confine(self, hull: Bool[Tensor, "r r r"]) -> None:
        """Forbid canonical density outside a visual hull of the canonical time (`OccupancyGrid.hull` of that bin).

        Other times see canonical places that the canonical images never look at; without this bound they are explained
        by new matter there instead of by motion, which shows up as floaters in the mesh.

        Raises:
            InputError: the hull has another resolution than `config.bounds_resolution`.
        """
        if hull.shape != self.bounds.shape:
            raise InputError(f"the hull has {hull.shape[0]} cells a side but bounds_resolution={len(self.bounds)}.")
        self.bounds.copy_(hull)

    def set_progress(self, fraction: float) -> None:
        """Open the deformation's time frequencies: 0 = the lowest octave only, 1 = all (the default)."""
        self.progress.fill_(min(max(fraction, 0.0), 1.0))

    def deformation(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3"]:
        """World-unit offset from observed points at time t in [0, 1] to canonical points (zero at canonical_time)."""
        c, progress = self.config, float(self.progress)
        # Only time is annealed (as in SV4D): neighbouring limbs move apart from the first moving frame on. Its lowest
        # octave is open from the start: raw time alone gives only straight, even motion.
        space = frequency_encoding(x / c.half_extent, c.space_frequencies, c.space_frequencies)
        time = frequency_encoding(t, c.time_frequencies, 1 + progress * (c.time_frequencies - 1))
        gate = torch.tanh((t - c.canonical_time).abs() / c.gate_width)
        return gate * self.deformation_net(torch.cat([space, time], -1))

    def sample(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> FieldSample:
        """Everything but colour, with the deformation evaluated once."""
        # At the canonical time the gate is zero for every point: skip the largest network of the static phase.
        still = bool((t == self.config.canonical_time).all())
        deformation = torch.zeros_like(x) if still else self.deformation(x, t)
        canonical = x + deformation
        logit, geometry = self._canonical(canonical)
        possible = self._possible(canonical) & (x.detach().abs().amax(-1) <= self.config.half_extent)
        return FieldSample(self._density(logit) * possible, geometry, deformation, canonical)

    def color_from_geometry(self, geometry: Float[Tensor, "n g"]) -> Float[Tensor, "n 3"]:
        """sRGB colour in [0, 1] (diffuse: no view direction)."""
        return torch.sigmoid(self.color_head(geometry))

    def density(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Float[Tensor, " n"]:
        """Density per world unit in [0, max_density]; zero outside the box."""
        return self.sample(x, t).density

    def density_and_color(
        self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]:
        """Density per world unit and sRGB colour in [0, 1]."""
        sample = self.sample(x, t)
        return sample.density, self.color_from_geometry(sample.geometry)

    def canonical_logit(self, xc: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Density logit at canonical points: the surface is its zero level, and it is close to linear across it,
        which is what marching cubes interpolates. At least -10, and -10 wherever density is impossible."""
        logit = self._canonical(xc)[0].clamp(min=-10)
        return torch.where(self._possible(xc), logit, logit.new_tensor(-10.0))

    def canonical_density(self, xc: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Density per world unit at canonical points; zero outside the box and outside `bounds`."""
        return self._density(self._canonical(xc)[0]) * self._possible(xc)

    def canonical_color(self, xc: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """sRGB colour in [0, 1] at canonical points."""
        return self.color_from_geometry(self._canonical(xc)[1])

    def normals(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"], epsilon: float = 0.01) -> Float[Tensor, "n 3"]:
        """Unit outward normals at observed points and times (world space; the deformation's Jacobian is included)."""
        return self._normals(lambda p: self._canonical(p + self.deformation(p, t.repeat(4, 1)))[0], x, epsilon)

    def canonical_normals(self, xc: Float[Tensor, "n 3"], epsilon: float = 0.01) -> Float[Tensor, "n 3"]:
        """Unit outward normals at canonical points (canonical space)."""
        return self._normals(lambda p: self._canonical(p)[0], xc, epsilon)

    def _normals(self, logit, x: Tensor, epsilon: float) -> Tensor:  # type: ignore[no-untyped-def]
        # Four tetrahedral differences of the logit: smooth over epsilon (a few cells) where the grid's own gradient
        # jumps from cell to cell, and differentiable in the parameters with first derivatives only.
        corners = x.new_tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        points = (x[None] + epsilon * corners[:, None]).reshape(-1, 3)
        values = logit(points).reshape(4, -1)
        return nn.functional.normalize(-(values.t() @ corners), dim=-1)

    def _canonical(self, xc: Tensor) -> tuple[Tensor, Tensor]:
        e = self.config.half_extent
        hidden = self.density_head(self.encoding((xc + e) / (2 * e)))
        return self.config.logit_gain * hidden[:, 0] + self.config.initial_logit, hidden[:, 1:]

    def _density(self, logit: Tensor) -> Tensor:
        return self.config.max_density * torch.sigmoid(logit)

    def _possible(self, xc: Tensor) -> Tensor:
        """Whether canonical points lie in a cell that may hold the object."""
        side = self.config.bounds_resolution
        cell = ((xc.detach() / self.config.half_extent + 1) * (side / 2)).floor().long()
        inside = ((cell >= 0) & (cell < side)).all(-1)
        i, j, k = cell.clamp(0, side - 1).unbind(-1)
        return self.bounds[i, j, k] & inside
