"""The reference's empty-space grid: one for all times, with nerfacc's rules.

Source: nerfacc 0.5.2 (`OccGridEstimator`; its marching runs on CUDA only) as set up by aejion/4Diffusion @ 627d0cd. The
package's own `OccupancyGrid` keeps a grid per moment, which leaves less to evaluate; this one is what
`four_diffusion.py speed` compares with, and the recordings of the reference are compared with it.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sv4d_ns.field.compositing import RaySamples, sum_before
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.space_time import SpaceTimeField

SAMPLES = 256
"""Steps along the box's diagonal."""
EVERY = 16
"""Training steps between updates."""
WARM_UP = 256
"""Training steps in which an update looks at every cell."""
DECAY = 0.95
THRESHOLD = 0.01
"""Opacity of one step above which a cell counts, unless the mean is lower; also the least opacity of a sample."""
TIMES = 8
EARLY_STOP = 1e-4
"""Transmittance below which a sample is not evaluated."""


def reference_step_length(half_extent: float) -> float:
    """World length of one step, with the reference's rounding of the square root of 3."""
    return 1.732 * 2 * half_extent / SAMPLES


class SharedOccupancyGrid(OccupancyGrid):
    """Cells that hold something at any of `TIMES` moments; `density` is the decaying maximum of opacity per length."""

    def __init__(self, resolution: int = 32, half_extent: float = 1.0) -> None:
        super().__init__(1, resolution, half_extent, THRESHOLD, DECAY)
        self.density.zero_()
        self.step_length = reference_step_length(half_extent)

    @torch.no_grad()
    def refresh(self, field: SpaceTimeField, step: int, generator: torch.Generator | None = None) -> None:
        """Look at the field before training step `step`, if it is one of those that do (every `EVERY`-th)."""
        if step % EVERY:
            return
        cells = self.cells_to_visit(step, generator)
        r = self.resolution
        index = torch.stack([cells // r**2, cells // r % r, cells % r], -1)
        jitter = torch.rand(index.shape, generator=generator).to(index.device)
        x = (index + jitter) * self.cell_size - self.half_extent
        times = torch.linspace(0, 1, TIMES, device=x.device)
        density = torch.stack([field.density(x, time.expand(len(x), 1)) for time in times])
        self.absorb(cells, density)

    def cells_to_visit(self, step: int, generator: torch.Generator | None = None) -> Int[Tensor, " m"]:
        """Flat indices: all in the warm-up, then a quarter at random and up to a quarter of the occupied ones."""
        count, device = self.resolution**3, self.occupied.device
        if step < WARM_UP:
            return torch.arange(count, device=device)
        anywhere = torch.randint(count, (count // 4,), generator=generator).to(device)
        occupied = self.occupied.flatten().nonzero()[:, 0]
        if len(occupied) > count // 4:
            pick = torch.randint(len(occupied), (count // 4,), generator=generator).to(device)
            occupied = occupied[pick]
        return torch.cat([anywhere, occupied])

    def absorb(self, cells: Int[Tensor, " m"], density: Float[Tensor, "k m"]) -> None:
        """Take in the density seen in cells at k moments; of a cell that comes twice the last look counts."""
        opacity = self.opacity().flatten()
        seen = density.amax(0) * self.step_length
        seen = torch.maximum(opacity[cells] * self.decay, seen)
        # an indexed assignment leaves the order of repeated cells open
        last = cells.new_full((len(opacity),), -1)
        last.scatter_reduce_(0, cells, torch.arange(len(cells), device=cells.device), "amax")
        visited = last >= 0
        opacity[visited] = seen[last[visited]]
        self.density.copy_((opacity / self.step_length).view_as(self.density))
        self.occupied.copy_((opacity > self.least_opacity(opacity)).view_as(self.occupied))

    def opacity(self) -> Float[Tensor, "1 r r r"]:
        """The decaying maximum of density times the step's length."""
        return self.density * self.step_length

    def least_opacity(self, opacity: Tensor | None = None) -> float:
        """The lower of `THRESHOLD` and the mean opacity of all cells."""
        return min(float((self.opacity() if opacity is None else opacity).mean()), THRESHOLD)

    def march(
        self, origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], jitter: Float[Tensor, " n"]
    ) -> RaySamples:
        """Steps of equal length from the camera on, each ray shifted by jitter * step; those whose middle lies in an
        occupied cell."""
        step = self.step_length
        farthest = float(origins.norm(dim=-1).max()) + math.sqrt(3) * self.half_extent
        middle = (jitter[:, None] + torch.arange(math.ceil(farthest / step), device=origins.device) + 0.5) * step
        position = origins[:, None] + middle[..., None] * directions[:, None]
        rays, columns = self._holds(position).nonzero(as_tuple=True)
        return RaySamples(rays, middle[rays, columns], step, len(origins))

    def _holds(self, x: Float[Tensor, "n k 3"]) -> Bool[Tensor, "n k"]:
        cell = ((x + self.half_extent) / self.cell_size).floor().long()
        inside = ((cell >= 0) & (cell < self.resolution)).all(-1)
        i, j, k = cell.clamp(0, self.resolution - 1).unbind(-1)
        return self.occupied[0, i, j, k] & inside

    def visible(self, samples: RaySamples, density: Float[Tensor, " m"]) -> Bool[Tensor, " m"]:
        """Samples worth evaluating with gradient: neither behind something opaque nor nearly empty."""
        optical = (density * samples.step).double()
        transmittance = torch.exp(-sum_before(optical, samples.ray_indices))
        return (transmittance >= EARLY_STOP) & (-torch.expm1(-optical) >= self.least_opacity())


def reference_samples(
    field: SpaceTimeField,
    occupancy: SharedOccupancyGrid,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    times: Float[Tensor, "n 1"],
    step: float,
    jitter: Float[Tensor, " n"],
) -> RaySamples:
    """Where the reference looks: once without gradient, and again where that showed something. Its step is its own."""
    samples = occupancy.march(origins, directions, jitter)
    index = samples.ray_indices
    with torch.no_grad():
        x = origins[index] + samples.distances[:, None] * directions[index]
        keep = occupancy.visible(samples, field.density(x, times[index]))
    return RaySamples(index[keep], samples.distances[keep], samples.step, samples.n_rays)
