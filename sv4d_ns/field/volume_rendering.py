"""Rays through the box, packed samples where something may be, and pictures of them. Pure functions.

The world step is fixed. Samples are packed (only those in occupied cells exist), ordered by ray and then by distance;
`compositing.py` adds them up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sv4d_ns.field.compositing import RaySamples, accumulate, composite, sum_before
from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.field.kernels import fused, njit
from sv4d_ns.field.motion import Moments
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.utils.devices import upload
from sv4d_ns.utils.split import run_split
from sv4d_ns.utils.threads import run_in_threads, workers

FAR_DEPTH = 1e3
"""Depth of rays that meet nothing. Large, because viewers composite by depth and a small value would hide the rest."""
OPAQUE_OPTICAL_DEPTH = 7.0
"""A ray whose cached optical depth has passed this value (transmittance 1e-3) is followed three more cells only."""
Bounds = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
"""Distances along rays, world units, before and beyond which nothing is rendered (a crop box, for example)."""
PART_SAMPLES = 4096
"""A thread is not worth its while for fewer samples."""
COLOR_WEIGHT = 1e-4
"""Samples that contribute less than this to their pixel are not coloured."""


@dataclass(frozen=True)
class RenderOutput:
    """n rendered rays and the m samples they are made of."""

    rgb: Float[Tensor, "n 3"]
    alpha: Float[Tensor, " n"]
    depth: Float[Tensor, " n"]
    """Distance along the ray of the visible surface (weighted mean; `FAR_DEPTH` where alpha is below 0.01)."""
    weights: Float[Tensor, " m"]
    samples: RaySamples
    positions: Float[Tensor, "m 3"]
    """Observed (world) positions of the samples."""
    deformation: Float[Tensor, "m 3"]
    density: Float[Tensor, " m"]
    residual: Float[Tensor, " m"] | None
    """What each moment adds to the density's logit, if anything."""

    @property
    def ray_indices(self) -> Int[Tensor, " m"]:
        return self.samples.ray_indices


def intersect_box(
    origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], half_extent: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Distances where rays enter and leave the box [-half_extent, half_extent]^3 (slab method); near >= 0, and
    near >= far for rays that miss it."""
    inverse = 1 / torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    a, b = (-half_extent - origins) * inverse, (half_extent - origins) * inverse
    return torch.minimum(a, b).amax(-1).clamp(min=0), torch.maximum(a, b).amin(-1)


def box_step(half_extent: float, n_samples: int) -> float:
    """World length of one step when the box diagonal is divided into `n_samples` steps."""
    return 2 * half_extent * math.sqrt(3) / n_samples


@njit(nogil=True, cache=True, error_model="numpy")
def _march_kernel(  # type: ignore[no-untyped-def]
    origins, directions, near, far, jitter, bin_low, bin_high, occupied, density, half_extent, step, limit, extra,
    counts, starts, distances, write, first, last
):  # fmt: skip
    resolution = occupied.shape[1]
    scale = resolution / (2 * half_extent)
    for ray in range(first, last):
        count = 0
        optical = 0.0
        opaque_steps = 0
        low, high = bin_low[ray], bin_high[ray]
        k = 0
        while True:
            distance = near[ray] + (k + jitter[ray]) * step
            k += 1
            if distance >= far[ray]:
                break
            i = int((origins[ray, 0] + distance * directions[ray, 0] + half_extent) * scale)
            j = int((origins[ray, 1] + distance * directions[ray, 1] + half_extent) * scale)
            m = int((origins[ray, 2] + distance * directions[ray, 2] + half_extent) * scale)
            i = min(max(i, 0), resolution - 1)
            j = min(max(j, 0), resolution - 1)
            m = min(max(m, 0), resolution - 1)
            if not (occupied[low, i, j, m] or occupied[high, i, j, m]):
                continue
            if optical > limit:
                opaque_steps += 1
                if opaque_steps > extra:
                    break
            optical += min(density[low, i, j, m], density[high, i, j, m]) * step
            if write:
                distances[starts[ray] + count] = distance
            count += 1
        counts[ray] = count


def march(
    occupancy: OccupancyGrid,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    times: Float[Tensor, "n 1"],
    step: float,
    jitter: Float[Tensor, " n"],
    bounds: Bounds | None = None,
) -> RaySamples:
    """Samples every `step` from where each ray enters the box, shifted by jitter * step, in occupied cells only.

    A ray stops three cells after the cached density has made it opaque. `marcher` says which of three equal ways.
    """
    way = {"numba": _march_fused, "nerfacc": _march_nerfacc, "torch": _march_torch}[marcher(origins)]
    with torch.no_grad():
        near, far = intersect_box(origins, directions, occupancy.half_extent)
        if bounds is not None:
            near, far = torch.maximum(near, bounds[0]), torch.minimum(far, bounds[1])
        low, high = occupancy.bins_around(times[:, 0])
        extra = math.ceil(3 * occupancy.cell_size / step)
        return way(occupancy, origins, directions, near, far, low, high, step, jitter, extra)


def marcher(origins: Tensor) -> Literal["numba", "nerfacc", "torch"]:
    """How `march` walks these rays: a compiled loop on the CPU; on CUDA torch over all candidate steps, or for
    pictures nerfacc's traversal where nerfacc's extension can be used.

    Rays whose gradients are asked for are a training step's: there torch waits for the device once, nerfacc three
    times (twice inside its own code). Pictures are many more rays, for which torch's candidates take memory.
    """
    if fused("numba", origins):
        return "numba"
    pictures = origins.device.type == "cuda" and not torch.is_grad_enabled()
    return "nerfacc" if pictures and nerfacc_works() else "torch"


@lru_cache(maxsize=1)
def nerfacc_works() -> bool:
    """Whether nerfacc and its CUDA extension (compiled at its first use) are there."""
    try:
        from nerfacc.cuda._backend import _C  # its Python part imports without it
    except Exception:  # whatever its build raises: IndexError where there is a compiler and no card
        return False
    return _C is not None


def _march_fused(occupancy, origins, directions, near, far, low, high, step, jitter, extra):  # type: ignore[no-untyped-def]
    n = origins.shape[0]
    arrays = [a.detach().contiguous().numpy() for a in (origins, directions, near, far, jitter, low, high)]
    arrays += [occupancy.occupied.numpy(), occupancy.density.numpy()]
    counts = np.zeros(n, np.int64)
    starts = np.zeros(n, np.int64)

    def run(distances: np.ndarray, write: bool) -> None:
        def task(first: int):  # type: ignore[no-untyped-def]
            last = min(first + 1024, n)
            arguments = (*arrays, occupancy.half_extent, step, OPAQUE_OPTICAL_DEPTH, extra)
            return lambda: _march_kernel(*arguments, counts, starts, distances, write, first, last)  # type: ignore[call-arg]

        run_in_threads([task(first) for first in range(0, n, 1024)])

    run(np.empty(0, np.float32), False)
    starts[1:] = np.cumsum(counts)[:-1]
    distances = np.empty(int(counts.sum()), np.float32)
    run(distances, True)
    rays = torch.from_numpy(np.repeat(np.arange(n), counts))
    return RaySamples(rays, torch.from_numpy(distances), step, n)


def _march_torch(occupancy, origins, directions, near, far, low, high, step, jitter, extra):  # type: ignore[no-untyped-def]
    # as many as the box's diagonal takes: to ask the rays for their longest would wait for the device
    n_steps = math.ceil(2 * occupancy.half_extent * math.sqrt(3) / step) + 1
    k = torch.arange(n_steps, device=origins.device)
    distance = near[:, None] + (k + jitter[:, None]) * step
    position = origins[:, None] + distance[..., None] * directions[:, None]
    cell = ((position + occupancy.half_extent) / occupancy.cell_size).long().clamp(0, occupancy.resolution - 1)
    i, j, m = cell.unbind(-1)
    low, high = low[:, None].expand_as(i), high[:, None].expand_as(i)
    keep = (occupancy.occupied[low, i, j, m] | occupancy.occupied[high, i, j, m]) & (distance < far[:, None])
    depth = torch.minimum(occupancy.density[low, i, j, m], occupancy.density[high, i, j, m]) * step * keep
    opaque = keep & (depth.cumsum(1) - depth > OPAQUE_OPTICAL_DEPTH)
    keep = keep & (opaque.cumsum(1) <= extra)
    rays, columns = keep.nonzero(as_tuple=True)
    return RaySamples(rays, distance[rays, columns], step, origins.shape[0])


def _march_nerfacc(occupancy, origins, directions, near, far, low, high, step, jitter, extra):  # type: ignore[no-untyped-def]
    from nerfacc.grid import traverse_grids

    # nerfacc knows one grid: those of all moments lie side by side along x, and each ray goes through its own
    e, layers = occupancy.half_extent, _layers(occupancy.occupied)
    box = upload(torch.tensor([[-e, -e, -e, (2 * len(layers) - 1) * e, e, e]]), origins.device)
    moved = torch.stack([origins[:, 0] + (low + high) * (2 * e), origins[:, 1], origins[:, 2]], -1)
    # its samples lie half a step into their intervals
    start = near + (jitter - 0.5) * step
    # 0.5.2 returns (intervals, samples), later ones a third value
    _, samples, *_ = traverse_grids(moved, directions, layers.flatten(0, 1)[None], box, start, far, step, 0.0)
    ray, distance = samples.ray_indices, samples.vals
    keep = (distance >= near[ray]) & (distance < far[ray])
    keep &= _before_opaque(occupancy, origins, directions, low, high, ray, distance, step, extra)
    kept = keep.nonzero()[:, 0]
    return RaySamples(ray[kept], distance[kept], step, origins.shape[0])


def _layers(occupied: Bool[Tensor, "k r r r"]) -> Bool[Tensor, "l r r r"]:
    """Of k moments, the cells occupied at each and, between two of them, at either: l = 2k - 1. A ray between the
    moments `low` and `high` (equal, or neighbours) finds its own at low + high."""
    layers = occupied.new_empty(2 * len(occupied) - 1, *occupied.shape[1:])
    layers[::2] = occupied
    layers[1::2] = occupied[:-1] | occupied[1:]
    return layers


def _before_opaque(occupancy, origins, directions, low, high, ray, distance, step, extra):  # type: ignore[no-untyped-def]
    """Which packed samples come before their ray has been opaque for `extra` of them."""
    position = origins[ray] + distance[:, None] * directions[ray]
    cell = ((position + occupancy.half_extent) / occupancy.cell_size).long().clamp(0, occupancy.resolution - 1)
    i, j, m = cell.unbind(-1)
    depth = torch.minimum(occupancy.density[low[ray], i, j, m], occupancy.density[high[ray], i, j, m]) * step
    opaque = (sum_before(depth.double(), ray) > OPAQUE_OPTICAL_DEPTH).double()
    return sum_before(opaque, ray) + opaque <= extra


def colours(
    field: DeformableField, geometry: Float[Tensor, "m g"], weights: Float[Tensor, " m"], samples: RaySamples
) -> Float[Tensor, "n 3"]:
    """Sums of the samples' colours along each ray, without a background; of those that count (`COLOR_WEIGHT`).

    On a CPU only these are coloured. A GPU would be waited for to find them, which costs more than colouring all.
    """
    rays, counts = samples.ray_indices, weights.detach() > COLOR_WEIGHT
    if weights.device.type == "cpu":
        colored = counts.nonzero()[:, 0]
        rays, geometry, weights = rays[colored], geometry[colored], weights[colored]
    else:
        weights = weights * counts
    color = field.color_from_geometry(geometry)
    return color.new_zeros(samples.n_rays, 3).index_add(0, rays, weights[:, None] * color)


def render_rays(
    field: DeformableField,
    occupancy: OccupancyGrid,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    times: Float[Tensor, "n 1"],
    n_samples: int = 128,
    background: Float[Tensor, " 3"] | None = None,
    jitter: Float[Tensor, " n"] | None = None,
    bounds: Bounds | None = None,
    moments: Moments = None,
) -> RenderOutput:
    """Render rays (unit directions, times in [0, 1]).

    `n_samples` divides the box diagonal; only samples in occupied cells are evaluated, so the real count is far
    lower. `background` (default white) fills what alpha leaves; an [n, 3] tensor gives each ray its own. `jitter` in
    [0, 1) shifts each ray's samples (training: uniform random); None centres them (deterministic rendering). Nothing
    outside `bounds` is rendered. `moments` are all the rays' times, where the caller knows them.
    """
    if jitter is None:
        jitter = origins.new_full((origins.shape[0],), 0.5)
    step = box_step(occupancy.half_extent, n_samples)
    samples = march(occupancy, origins, directions, times, step, jitter, bounds)
    rays, distances = samples.ray_indices, samples.distances
    positions = origins[rays] + distances[:, None] * directions[rays]
    at = times[rays]

    def composited(part: RaySamples, rows: slice) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: _composited(field, part, positions[rows], at[rows], moments)

    parts = [composited(part, rows) for part, rows in _parts(samples)]
    rgb, sums, weights, deformation, density, *residual = run_split(parts, field.parameters())
    alpha = sums[:, 0]
    fill = background if background is not None else rgb.new_ones(3)
    return RenderOutput(
        rgb=rgb + (1 - alpha[:, None]) * fill,
        alpha=alpha,
        depth=_depth(sums),
        weights=weights,
        samples=samples,
        positions=positions.detach(),
        deformation=deformation,
        density=density,
        residual=residual[0] if residual else None,
    )


def _composited(
    field: DeformableField, samples: RaySamples, x: Float[Tensor, "m 3"], t: Float[Tensor, "m 1"], moments: Moments
) -> tuple[Tensor, ...]:
    """Of each ray: its colour without a background, and alpha and alpha times depth; of each sample: weight,
    deformation, density, and what the moment adds to the density's logit where that is open."""
    queried = field.sample(x, t, moments)
    weights, sums = composite(queried.density, samples)
    rgb = colours(field, queried.geometry, weights, samples)
    residual = () if queried.residual is None else (queried.residual,)
    return rgb, sums, weights, queried.deformation, queried.density, *residual


def _parts(samples: RaySamples) -> list[tuple[RaySamples, slice]]:
    """The samples of a CPU's batch in parts of whole rays for its threads, and which rows they are."""
    count, rays = len(samples.distances), samples.ray_indices
    parts = min(workers(), count // PART_SAMPLES) if samples.distances.device.type == "cpu" else 1
    if parts <= 1:
        return [(samples, slice(0, count))]
    middles = rays[[count * number // parts for number in range(1, parts)]].unique_consecutive()
    rows = torch.searchsorted(rays, middles)
    middles, rows = middles[rows > 0], rows[rows > 0]  # a ray of very many samples is not cut, and no part is empty
    ray_edges, row_edges = [0, *middles.tolist(), samples.n_rays], [0, *rows.tolist(), count]
    made = []
    for (first, last), (begin, end) in zip(pairwise(ray_edges), pairwise(row_edges), strict=True):
        part = RaySamples(rays[begin:end] - first, samples.distances[begin:end], samples.step, last - first)
        made.append((part, slice(begin, end)))
    return made


@torch.no_grad()
def render_depth(
    field: DeformableField,
    occupancy: OccupancyGrid,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    times: Float[Tensor, "n 1"],
    n_samples: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Alpha and depth of rays as `render_rays` has them, without gradients and without the cost of colours."""
    step = box_step(occupancy.half_extent, n_samples)
    samples = march(occupancy, origins, directions, times, step, torch.full_like(times[:, 0], 0.5))
    rays, distances = samples.ray_indices, samples.distances
    density = field.density(origins[rays] + distances[:, None] * directions[rays], times[rays])
    sums = composite(density, samples)[1]
    return sums[:, 0], _depth(sums)


def _depth(sums: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    alpha, weighted = sums.unbind(-1)
    return torch.where(alpha > 0.01, weighted / alpha.clamp(min=0.01), torch.full_like(alpha, FAR_DEPTH))


@torch.no_grad()
def render_rays_chunked(
    field: DeformableField,
    occupancy: OccupancyGrid,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    times: Float[Tensor, "n 1"],
    n_samples: int = 192,
    background: Float[Tensor, " 3"] | None = None,
    chunk: int = 8192,
    bounds: Bounds | None = None,
) -> dict[str, Tensor]:
    """Whole images without gradients: "rgb" [n, 3], "alpha" [n], "depth" [n], and the size of the visible
    deformation, "motion" [n] (world units)."""
    parts: dict[str, list[Tensor]] = {"rgb": [], "alpha": [], "depth": [], "motion": []}
    for start in range(0, origins.shape[0], chunk):
        piece = slice(start, start + chunk)
        within = None if bounds is None else (bounds[0][piece], bounds[1][piece])
        out = render_rays(
            field, occupancy, origins[piece], directions[piece], times[piece], n_samples, background, bounds=within
        )
        motion = accumulate(out.weights, out.deformation.norm(dim=-1, keepdim=True), out.samples)[:, 0]
        for name, value in (("rgb", out.rgb), ("alpha", out.alpha), ("depth", out.depth), ("motion", motion)):
            parts[name].append(value)
    return {name: torch.cat(values) for name, values in parts.items()}
