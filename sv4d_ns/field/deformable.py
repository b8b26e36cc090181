"""The 4D field: one canonical hash-grid object and a deformation that says where each observed point came from.

SV4D (Xie et al. 2024) section 4: canonical Instant-NGP grid with density and colour heads, a deformation, the canonical
field queried at x + dx. The deformation keeps the offsets of each frame in grids (`motion.py`). Sizes, activations and
the appearance residual are not in the papers; they are our own decisions, measured in docs/optimisation.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sv4d_ns.field.hash_grid import HashEncoding, HashGrid
from sv4d_ns.field.motion import KeyframeGrid, Moments, Places
from sv4d_ns.utils.devices import upload
from sv4d_ns.utils.errors import InputError

TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
EMPTY = -10.0
"""Density logit of places that cannot hold the object."""


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
    keyframes: int = 21
    """Moments the motion and the appearance residual know, evenly over [0, 1]: one for every frame of the clip."""
    motion_resolutions: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Cells a side of the levels of the deformation's grids; their sum is the offset."""
    appearance_resolutions: tuple[int, ...] = (4, 16)
    """The same for colour: what light and shadow of each moment add to the canonical colour's logit; () for none."""
    density_resolutions: tuple[int, ...] = (12, 48)
    """The same for the density's logit: what of a moment's shape no motion of the canonical shape explains; () for
    none. Closed until `open_residual`, and never part of the exported mesh. The canonical moment has a share too: its
    shape is what all moments together make of it."""
    canonical_time: float = 0.0
    """The time whose shape is the canonical shape, that of a keyframe; the deformation is exactly zero there."""
    encoding_backend: Literal["numba", "torch", "tinycudann"] = "numba"
    """Who evaluates the canonical hash grid. "tinycudann" also takes tiny-cuda-nn's layout (`hash_grid.HashGrid`), so a
    field keeps the one it was trained with; the motion grids are then the numba kernel's, or torch's on a GPU."""


@dataclass(frozen=True)
class FieldSample:
    """A field evaluated at n points."""

    density: Float[Tensor, " n"]
    """Per world unit, in [0, max_density]."""
    geometry: Float[Tensor, "n g"]
    """Input of `color_from_geometry`: features of the canonical place, and what the moment's light adds."""
    deformation: Float[Tensor, "n 3"]
    canonical: Float[Tensor, "n 3"]
    residual: Float[Tensor, " n"] | None = None
    """What the moment adds to the density's logit; None while the residual is closed."""


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class DeformableField(nn.Module):
    """Density and colour of a moving object: canonical grid at x + deformation(x, t).

    Parameters in groups for the optimiser: hash table, heads, deformation, appearance; see `parameter_groups`.

    Raises:
        InputError: a size in the config that makes no field.
    """

    aabb: Tensor
    bounds: Tensor
    residual_open: Tensor
    admitted: Tensor

    def __init__(self, config: DeformableFieldConfig | None = None) -> None:
        super().__init__()
        config = config or DeformableFieldConfig()
        if config.half_extent <= 0 or config.max_density <= 0:
            raise InputError("half_extent and max_density of a field must be positive.")
        if not 0 <= config.canonical_time <= 1:
            raise InputError(f"canonical_time={config.canonical_time} is outside [0, 1]; use a frame's time.")
        position = config.canonical_time * (config.keyframes - 1)
        if abs(position - round(position)) > 1e-3:
            raise InputError(
                f"canonical_time={config.canonical_time} is between two of {config.keyframes} keyframes; use a frame's."
            )
        self.config = config
        self.encoding = self._encoding(config)
        backend: Literal["numba", "torch"] = "torch" if config.encoding_backend == "torch" else "numba"
        self.density_head = mlp([self.encoding.out_dim, config.hidden_width, 1 + config.geometry_features])
        self.color_head = mlp([config.geometry_features, config.hidden_width, 3])
        self.motion = KeyframeGrid(config.keyframes, config.motion_resolutions, 3, True, backend)
        self.appearance = (
            KeyframeGrid(config.keyframes, config.appearance_resolutions, backend=backend)
            if config.appearance_resolutions
            else None
        )
        self.density_residual = (
            KeyframeGrid(config.keyframes, config.density_resolutions, 1, backend=backend)
            if config.density_resolutions
            else None
        )
        self._canonical_frame = round(position)
        for grid in (self.motion, self.appearance):
            if grid is not None:  # what the others' place is measured from; for the light see `_share_light`
                grid.keyframes[self._canonical_frame].requires_grad_(False)
        for layer in self.density_head:
            if isinstance(layer, nn.Linear):  # so that the untrained density is initial_logit's, whatever the seed
                nn.init.zeros_(layer.bias)
        e = config.half_extent
        self.register_buffer("residual_open", torch.tensor(False))
        self._residual_is_open = False
        """The same where it is read in every step: looking at the buffer would wait for the device."""
        self.register_load_state_dict_post_hook(lambda field, _: field._read_buffers())
        self.register_buffer("admitted", torch.arange(config.keyframes) == self._canonical_frame)
        self.admitted_frames = {self._canonical_frame}
        """The keyframes that have started, likewise read in every step."""
        self.register_buffer("aabb", torch.tensor([[-e, -e, -e], [e, e, e]]))
        self.register_buffer("bounds", torch.ones((config.bounds_resolution,) * 3, dtype=torch.bool))

    @staticmethod
    def _encoding(config: DeformableFieldConfig) -> HashEncoding | HashGrid:
        growth = (config.max_resolution / config.base_resolution) ** (1 / max(config.levels - 1, 1))
        if config.encoding_backend == "tinycudann":
            return HashGrid(
                3, config.levels, config.log2_table_size, config.base_resolution, growth, config.encoding_backend
            )
        return HashEncoding(
            levels=config.levels,
            log2_table_size=config.log2_table_size,
            base_resolution=config.base_resolution,
            max_resolution=config.max_resolution,
            backend=config.encoding_backend,
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Groups with their own learning rates: "encoding", "heads", "deformation", "appearance" (if there is one)."""
        groups = {
            "encoding": list(self.encoding.parameters()),
            "heads": [*self.density_head.parameters(), *self.color_head.parameters()],
            "deformation": list(self.motion.parameters()),
        }
        if self.appearance is not None:
            groups["appearance"] = list(self.appearance.parameters())
        if self.density_residual is not None:
            groups["density_residual"] = list(self.density_residual.parameters())
        return groups

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

    @torch.no_grad()
    def init_frame_from_neighbour(self, new: int, known: int, shift: Float[Tensor, " 3"]) -> bool:
        """Let keyframe `new` start from the motion and appearance of `known`, the object moved by `shift` (world units)
        since; whether it did.

        A keyframe starts once: a longer schedule comes by the frames of a finished run again, and they stay.
        """
        if new in self.admitted_frames:
            return False
        self.admitted[new] = True
        self.admitted_frames.add(new)
        self._share_light()
        cubes = shift / (2 * self.config.half_extent)
        self.motion.start_from(new, known, cubes)
        # what is seen at x came from x - shift, and from there as before
        coarsest = int((self.motion.levels[0][0] + 1) ** 3)
        self.motion.keyframes[new][:coarsest] -= cubes * float(self.motion.levels[0][0])
        if self.appearance is not None:
            self.appearance.start_from(new, known)
        return True

    def deformation(
        self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"], moments: Moments = None, places: Places | None = None
    ) -> Float[Tensor, "n 3"]:
        """World-unit offset from observed points at time t in [0, 1] to canonical points (zero at canonical_time);
        `places` are the times' between the keyframes, where the caller has them."""
        places = self.motion.places(t, moments) if places is None else places
        return 2 * self.config.half_extent * self.motion(self._unit(x), places)

    def sample(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"], moments: Moments = None) -> FieldSample:
        """Everything but colour, with the deformation evaluated once.

        Gradients reach `x` through the canonical point alone, as if the moment's grids were constant around it: their
        own slopes are small, and theirs is a faster kernel without.
        """
        places = self.motion.places(t, moments)
        sample = self._matter(x, t, moments, places)
        if self.appearance is None:
            return sample
        seen = x.detach()
        light = self.appearance(self._unit(seen), places) if len(seen) else seen
        return replace(sample, geometry=torch.cat([sample.geometry, light], -1))

    def _matter(
        self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"], moments: Moments, places: Places
    ) -> FieldSample:
        """A sample whose geometry does not know the moment's light yet."""
        # Nothing moves at the canonical time: the static phase does without the deformation.
        canonical_time = self.config.canonical_time
        still = bool((t == canonical_time).all()) if moments is None else all(m == canonical_time for m in moments)
        seen = x.detach()
        deformation = torch.zeros_like(seen) if still else self.deformation(seen, t, moments, places)
        canonical = x + deformation
        logit, geometry = self._canonical(canonical)
        inside = seen.abs().amax(-1) <= self.config.half_extent
        residual = self._residual(seen, places)
        if residual is None:
            density = self._density(logit) * (self._possible(canonical) & inside)
        else:
            density = self._density(torch.where(self._possible(canonical), logit, EMPTY) + residual) * inside
        return FieldSample(density, geometry, deformation, canonical, residual)

    def _residual(self, x: Float[Tensor, "n 3"], places: Places) -> Float[Tensor, " n"] | None:
        """What the moment adds to the density's logit at observed points; None while it is closed."""
        if self.density_residual is None or not self._residual_is_open or not len(x):
            return None
        return self.density_residual(self._unit(x), places)[:, 0]

    def open_residual(self) -> None:
        """From now on, density may differ from moment to moment by more than motion."""
        if not self._residual_is_open:
            self.residual_open.fill_(True)
            self._read_residual()

    def _read_residual(self) -> None:
        self._residual_is_open = bool(self.residual_open)

    def _share_light(self) -> None:
        """From the second frame on the canonical moment has a light of its own, like the others: the canonical colour
        becomes what all moments have in common, and a moment without one would show that, which is greyer."""
        if self.appearance is not None:
            self.appearance.keyframes[self._canonical_frame].requires_grad_(True)

    def _read_buffers(self) -> None:
        self._read_residual()
        self.admitted_frames = set(self.admitted.nonzero()[:, 0].tolist())
        if len(self.admitted_frames) > 1:
            self._share_light()

    def color_from_geometry(self, geometry: Float[Tensor, "n g"]) -> Float[Tensor, "n 3"]:
        """sRGB colour in [0, 1] (diffuse: no view direction) from a sample's geometry."""
        features = self.config.geometry_features
        logit = self.color_head(geometry[:, :features])
        return torch.sigmoid(logit if self.appearance is None else logit + geometry[:, features:])

    def density(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"], moments: Moments = None) -> Float[Tensor, " n"]:
        """Density per world unit in [0, max_density]; zero outside the box."""
        return self._matter(x, t, moments, self.motion.places(t, moments)).density

    def density_and_color(
        self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]:
        """Density per world unit and sRGB colour in [0, 1]."""
        sample = self.sample(x, t)
        return sample.density, self.color_from_geometry(sample.geometry)

    def canonical_density(self, xc: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Density per world unit at canonical points; zero outside the box and outside `bounds`."""
        return self._density(self._canonical(xc)[0]) * self._possible(xc)

    def normals(
        self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"], epsilon: float = 0.01, moments: Moments = None
    ) -> Float[Tensor, "n 3"]:
        """Unit outward normals at observed points and times (world space; the deformation's Jacobian is included)."""
        times = t.repeat(4, 1)
        return self._normals(lambda p: self._canonical(p + self.deformation(p, times, moments))[0], x, epsilon)

    def canonical_normals(self, xc: Float[Tensor, "n 3"], epsilon: float = 0.01) -> Float[Tensor, "n 3"]:
        """Unit outward normals at canonical points (canonical space)."""
        return self._normals(lambda p: self._canonical(p)[0], xc, epsilon)

    def _normals(self, logit, x: Tensor, epsilon: float) -> Tensor:  # type: ignore[no-untyped-def]
        # Four tetrahedral differences of the logit: smooth over epsilon (a few cells) where the grid's own gradient
        # jumps from cell to cell, and differentiable in the parameters with first derivatives only.
        corners = upload(TETRAHEDRON, x.device).to(x.dtype)
        points = (x[None] + epsilon * corners[:, None]).reshape(-1, 3)
        values = logit(points).reshape(4, -1)
        return nn.functional.normalize(-(values.t() @ corners), dim=-1)

    def _unit(self, x: Tensor) -> Tensor:
        """The box as [0, 1]^3."""
        return x / (2 * self.config.half_extent) + 0.5

    def _canonical(self, xc: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.density_head(self.encoding(self._unit(xc)))
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
