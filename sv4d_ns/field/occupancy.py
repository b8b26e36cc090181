"""Empty-space skipping: which cells of the box can hold the object, for each of a few moments.

Two sources, both kept in buffers (so they are in the checkpoint and the viewer needs nothing else): the visual hull of
the masks, exact from the first step, and a decaying maximum of the field's own density (Instant-NGP section on
occupancy grids; one grid per moment instead of one for all time, because a moving object sweeps several times its
volume). The cached density also tells the ray marcher where a ray is already opaque.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional

from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.geometry.rays import project
from sv4d_ns.utils.devices import upload
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.split import results_of
from sv4d_ns.utils.threads import workers

DISTANCE_REACH = 0.15
"""Distances to a hull are known up to this, world units."""


@dataclass(frozen=True)
class HullView:
    """One camera's masks over time, for carving."""

    alpha: Float[Tensor, "t h w"]
    """In [0, 1]; frame i at time i / (t - 1)."""
    camera_to_world: Float[Tensor, "4 4"]
    """OpenGL."""
    focal: float
    """Pixels; the principal point is the image centre."""
    vote: float = 1.0
    """A point is carved once the votes of the views whose (dilated) mask misses it reach 1."""


class OccupancyGrid(nn.Module):
    """Occupied cells [bins, r, r, r] over the box and the density seen in them.

    Bin k stands for time k / (bins - 1); a query at time t uses the two bins around t. `hull` is all true until
    `carve`; `density` starts above the threshold, so nothing is skipped before it has been looked at.

    Raises:
        InputError: fewer than 2 cells a side or no bin.
    """

    hull: Tensor
    density: Tensor
    occupied: Tensor
    distance: Tensor

    def __init__(
        self, bins: int, resolution: int = 64, half_extent: float = 0.57, threshold: float = 0.05, decay: float = 0.7
    ) -> None:
        super().__init__()
        if bins < 1 or resolution < 2:
            raise InputError(f"an occupancy grid of {bins} moments and {resolution} cells a side is not possible.")
        self.bins, self.resolution, self.half_extent = bins, resolution, half_extent
        self.threshold, self.decay = threshold, decay
        shape = (bins, resolution, resolution, resolution)
        self.register_buffer("hull", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("density", torch.full(shape, 50 * threshold))
        self.register_buffer("occupied", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("distance", torch.zeros(shape, dtype=torch.float16), persistent=False)
        self._bands: dict[tuple[int, float], Tensor] = {}
        """What `band` found since the last carving."""

    @property
    def cell_size(self) -> float:
        return 2 * self.half_extent / self.resolution

    def cell_centers(self) -> Float[Tensor, "m 3"]:
        """World positions of all cells, in the order of a flattened [r, r, r] grid indexed (x, y, z)."""
        axis = (torch.arange(self.resolution, device=self.hull.device) + 0.5) * self.cell_size - self.half_extent
        return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)

    def bins_around(self, t: Float[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Indices of the bins before and after times in [0, 1] (equal on a bin)."""
        position = t.clamp(0, 1) * (self.bins - 1)
        # Frame times come from a division; a hair above a bin must not drag the next bin in.
        low = (position + 1e-4).floor().long()
        high = (position - 1e-4).ceil().long().clamp(min=0)
        return low, torch.maximum(low, high)

    @torch.no_grad()
    def carve(self, views: Sequence[HullView], margin: float | None = None) -> None:
        """Set `hull` from masks (alpha > 0.05, dilated by `margin` world units, default one cell's half diagonal
        plus a pixel): a cell stays where the votes against it are below 1. Beyond an image's edge the mask continues
        as it is at the edge: empty for a framed object, open where the object is cut off.

        Frames are folded into the bins around them. Weak votes (for generated, inconsistent views) carve only in
        company, and they never empty a ray that meets the mask of a view with a vote of 1 (the input): of such a ray
        the cells with the fewest votes against them stay, or a limb that two generated views have wrong could not be
        seen from the input camera either.
        """
        if not views:
            raise InputError("carving needs at least one view with masks.")
        centers = self.cell_centers()
        frames = views[0].alpha.shape[0]
        weak = torch.zeros(frames, len(centers), device=centers.device)
        empty = torch.zeros(frames, len(centers), dtype=torch.bool, device=centers.device)
        for view in views:
            if view.alpha.shape[0] != frames:
                raise InputError("the views of a grid must have the same number of frames; re-generate the grid.")
            outside = ~self._in_mask(view, centers, margin)
            if view.vote >= 1:
                empty |= outside
            else:
                weak += view.vote * outside
        kept = weak < 1 - 1e-6
        for view in views:
            if view.vote >= 1:
                kept |= self._least_opposed(view, centers, weak.masked_fill(empty, torch.inf))
        # Closed by a cell: between rays whose cells the generated silhouettes left and rays whose cells were only given
        # back, single cells are missing, and one would look into the object there.
        shape = (frames, *self.hull.shape[1:])
        grown = functional.max_pool3d(kept.reshape(shape)[:, None].float(), 3, 1, 1)
        shrunk = -functional.max_pool3d(-grown, 3, 1, 1)
        kept = (shrunk[:, 0] > 0) & ~empty.reshape(shape)
        times = torch.arange(frames, device=centers.device) / max(frames - 1, 1)
        hull = torch.zeros_like(self.hull)
        for low, high, cells in zip(*(b.tolist() for b in self.bins_around(times)), kept, strict=True):
            hull[low] |= cells
            hull[high] |= cells
        # More bins than frames: a bin without a frame of its own takes its neighbours'.
        seen = torch.zeros(self.bins, dtype=torch.bool)
        for bins in self.bins_around(times):
            seen[bins.cpu()] = True
        for k in (~seen).nonzero().flatten().tolist():
            nearest = int((times - k / max(self.bins - 1, 1)).abs().argmin())
            hull[k] = kept[max(nearest - 1, 0) : nearest + 2].any(0)
        self._bands.clear()
        self.hull.copy_(hull)
        self.occupied.copy_(hull)
        for k in range(self.bins):
            self.distance[k] = _signed_distance(hull[k].cpu().numpy(), self.cell_size).to(self.distance)

    @torch.no_grad()
    def agreement(self, views: Sequence[HullView]) -> Float[Tensor, " v"]:
        """Per view, the share of its silhouette that the hull of all *other* views' silhouettes can show: 1 for true
        pictures of one object, well below for pictures that contradict each other. Mean over frames.

        Raises:
            InputError: no views, or views with different numbers of frames.
        """
        centers = self.cell_centers()
        if not views or len({view.alpha.shape[0] for view in views}) > 1:
            raise InputError("the views of a grid must have the same number of frames; re-generate the grid.")
        outside = [~self._in_mask(view, centers, None) for view in views]
        total = torch.stack(outside).sum(0, dtype=torch.uint8) if len(views) < 256 else sum(o.long() for o in outside)
        side = round(0.75 * self.resolution)
        shares = []
        for view, missed in zip(views, outside, strict=True):
            possible = (total - missed.to(total)) == 0
            shown = torch.zeros(len(possible), side * side, device=centers.device)
            shown.index_add_(1, self._pixel(view, centers, side, side), possible.float())
            mask = functional.adaptive_max_pool2d(view.alpha.to(centers)[:, None], side)[:, 0].flatten(1) > 0.5
            covered = ((shown > 0) & mask).sum(1) / mask.sum(1).clamp(min=1)
            shares.append(covered[mask.any(1)].mean() if bool(mask.any()) else covered.new_ones(()))
        return torch.stack(shares)

    def _in_mask(self, view: HullView, centers: Tensor, margin: float | None) -> Tensor:
        """[t, cells]: whether cell centres fall into a view's dilated masks."""
        height, width = view.alpha.shape[1:]
        world = margin if margin is not None else 0.87 * self.cell_size
        distance = float(view.camera_to_world[:3, 3].norm())
        radius = math.ceil(world * view.focal / max(distance - self.half_extent, 1e-3)) + 1
        mask = (view.alpha.to(centers) > 0.05).float()
        # Separable maximum: a square window of (2 radius + 1) pixels.
        mask = functional.max_pool2d(mask[:, None], (2 * radius + 1, 1), 1, (radius, 0))
        mask = functional.max_pool2d(mask, (1, 2 * radius + 1), 1, (0, radius))[:, 0] > 0
        return mask.flatten(1)[:, self._pixel(view, centers, height, width)]

    def _least_opposed(self, view: HullView, centers: Tensor, against: Tensor) -> Tensor:
        """[t, cells]: the cells with the fewest votes on each ray that meets a view's (undilated) mask."""
        # Pixels about as large as cells, so that every ray has cells.
        side = round(0.75 * self.resolution)
        coarse = functional.adaptive_max_pool2d(view.alpha.to(centers)[:, None], side)[:, 0].flatten(1) > 0.5
        pixel = self._pixel(view, centers, side, side)
        index = pixel[None].expand(len(against), -1)
        fewest = torch.full_like(coarse, torch.inf, dtype=against.dtype)
        fewest.scatter_reduce_(1, index, against, "amin")
        return coarse[:, pixel] & (against <= fewest[:, pixel] + 1e-6) & torch.isfinite(against)

    @staticmethod
    def _pixel(view: HullView, centers: Tensor, height: int, width: int) -> Tensor:
        """Flat index of the pixel each centre falls into, at the image's edge for those beyond it."""
        focal = view.focal * width / view.alpha.shape[2]
        uv, _ = project(centers, view.camera_to_world.to(centers), focal, height, width)
        column, row = uv.floor().long().unbind(-1)
        return row.clamp(0, height - 1) * width + column.clamp(0, width - 1)

    @torch.no_grad()
    def update(self, field: DeformableField, bin_index: int, generator: torch.Generator | None = None) -> None:
        """Look at the field in every hull cell of one bin (at a random point of the cell) and refresh the cell.

        density = max(decay * density, seen); a cell is occupied when it or a neighbour holds more than `threshold`,
        so a moving surface always has a free cell to move into.
        """
        cells = self.hull[bin_index].nonzero()
        jitter = upload(torch.rand(cells.shape, generator=generator), cells.device)
        points = (cells + jitter) * self.cell_size - self.half_extent
        moment = bin_index / max(self.bins - 1, 1)
        parts = points.chunk(workers() if points.device.type == "cpu" else 1)
        looks = [partial(field.density, part, torch.full_like(part[:, :1], moment), [moment]) for part in parts]
        seen = torch.cat(results_of(looks))
        density = self.density[bin_index]
        i, j, k = cells.unbind(-1)
        density[i, j, k] = torch.maximum(density[i, j, k] * self.decay, seen)
        grown = (density > self.threshold) & self.hull[bin_index]
        for axis in range(3):  # a 3x3x3 maximum, one axis at a time
            before, after = grown.narrow(axis, 0, self.resolution - 1), grown.narrow(axis, 1, self.resolution - 1)
            wider = grown.clone()
            wider.narrow(axis, 1, self.resolution - 1).logical_or_(before)
            wider.narrow(axis, 0, self.resolution - 1).logical_or_(after)
            grown = wider
        # A moment without any matter would never be looked at again by a ray: keep all of its hull open instead.
        self.occupied[bin_index] = grown & self.hull[bin_index] if bool(grown.any()) else self.hull[bin_index]

    def nearest_bin(self, time: float) -> int:
        """The bin nearest to a time in [0, 1]."""
        return round(time * (self.bins - 1))

    def centroid(self, bin_index: int) -> Float[Tensor, " 3"]:
        """Middle of a bin's hull, world units; the box's middle if there is none."""
        cells = self.hull[bin_index].nonzero()
        if not len(cells):
            return cells.new_zeros(3).float()
        return (cells.float().mean(0) + 0.5) * self.cell_size - self.half_extent

    def band(self, bin_index: int, width: float) -> Int[Tensor, "m 3"]:
        """Cells of a bin whose centre is within `width` of its hull's surface."""
        if (bin_index, width) not in self._bands:  # asked in every step, and the hull stays
            self._bands[bin_index, width] = (self.distance[bin_index].abs() <= width).nonzero()
        return self._bands[bin_index, width]

    def draw_points(self, cells: Int[Tensor, "m 3"], count: int, rng: np.random.Generator) -> Float[Tensor, "n 3"]:
        """`count` world positions, evenly drawn from these cells; none if there are no cells."""
        if not len(cells):
            return cells.new_zeros(0, 3).float()
        pick = upload(rng.integers(0, len(cells), count), cells.device)
        within = upload(rng.random((count, 3), dtype=np.float32), cells.device)
        return (cells[pick] + within) * self.cell_size - self.half_extent

    def distance_at(self, x: Float[Tensor, "n 3"], bin_index: int) -> Float[Tensor, " n"]:
        """Signed distance to a bin's hull, world units, negative inside, trilinear and differentiable in x."""
        # grid_sample wants (x, y, z) for the (last, middle, first) axis
        grid = (x / self.half_extent).flip(-1).reshape(1, -1, 1, 1, 3)
        volume = self.distance[bin_index].float()[None, None]
        return functional.grid_sample(volume, grid, padding_mode="border", align_corners=False).flatten()

    def is_occupied(self, x: Float[Tensor, "n 3"], t: Float[Tensor, "n 1"]) -> Bool[Tensor, " n"]:
        """Whether points may hold the object at their times (false outside the box)."""
        cell = ((x + self.half_extent) / self.cell_size).floor().long()
        inside = ((cell >= 0) & (cell < self.resolution)).all(-1)
        i, j, k = cell.clamp(0, self.resolution - 1).unbind(-1)
        low, high = self.bins_around(t[:, 0])
        return (self.occupied[low, i, j, k] | self.occupied[high, i, j, k]) & inside


def _signed_distance(inside: Bool[np.ndarray, "r r r"], cell: float) -> Float[Tensor, "r r r"]:
    """World units, negative inside, cut off at `DISTANCE_REACH`."""
    field = np.full(inside.shape, DISTANCE_REACH, np.float32)
    if inside.any():
        # only the object's own part of the box: the transform's cost is that of its cells
        margin = math.ceil(DISTANCE_REACH / cell)
        part = tuple(
            slice(max(first - margin, 0), last + margin + 1)
            for first, last in ((axis.min(), axis.max()) for axis in np.nonzero(inside))
        )
        outer, inner = distance_transform_edt(~inside[part]), distance_transform_edt(inside[part])
        # the surface lies between the centres of the cells on either side
        field[part] = np.where(inside[part], 0.5 - inner, outer - 0.5) * cell
    return torch.from_numpy(field.clip(-DISTANCE_REACH, DISTANCE_REACH))
