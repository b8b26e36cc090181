"""One optimisation step of the 4D field, without nerfstudio: which pixels are drawn and what is asked of their rays.

The nerfstudio data manager and model are wired to this file, and so is `benchmarks/field_fit.py`; both fit alike.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sv4d_ns.field.deformable import DeformableField
from sv4d_ns.field.occupancy import DISTANCE_REACH, HullView, OccupancyGrid
from sv4d_ns.field.visibility import angular_weight, view_weights
from sv4d_ns.field.volume_rendering import RenderOutput, transmittance
from sv4d_ns.fitting import batch_sampler as sampling
from sv4d_ns.fitting import losses
from sv4d_ns.fitting.batch_sampler import PixelSampler, ScheduleConfig, Window
from sv4d_ns.fitting.losses import LossWeights
from sv4d_ns.fitting.scene_flow import SceneFlow
from sv4d_ns.geometry.rays import pixel_rays
from sv4d_ns.metrics.lpips import Perceptual
from sv4d_ns.views.grid import ViewGrid

INPUT_VIEW = 0

REGULARISED_POINTS = 384
"""Surface points a step's smoothness terms look at."""
NEIGHBOUR_SCALE = 0.02
"""Standard deviation of the offsets of those terms, world units (about one cell of a 64^3 grid)."""
BAND = 0.08
"""How far from a hull's surface the deformation is registered and kept rigid, world units."""
BAND_POINTS = 512
"""Points of that band a step looks at in each of its frames."""
FLOW_POINTS = 1024
"""Followed surface points a new frame's start looks at in a step, and half as many of a batch's frames."""
FLOW_VIEWS = 3
"""Trusted views it takes to follow points of the surface in space."""
BESIDE = 0.025
"""Half a frame of a 21-frame clip. The motion grids so far beside a step's frames get a gradient of zero, so that Adam
moves them on by what it remembers; without it the motion learns about 1.7 times slower than its rate was meant for."""
RIGIDITY_BESIDE_FLOW = 0.3
"""Share of rigidity's weights where followed points say how matter moves: all of it blurs thin limbs, and without any
the motion follows bodies less well."""


@dataclass(frozen=True)
class BatchConfig:
    """What a step draws."""

    rays: int = 1536
    """Single rays, in addition to the patches."""
    patches: int = 4
    """Square patches for the structural loss; the first is of the input view while that alone is trusted."""
    patch_side: int = 16
    input_share: float = 0.5
    """Share of the single rays that look through the input camera, while it is the only view to be trusted."""
    frames_per_step: int = 4
    """As many as SV4D draws, and views."""
    orthogonal: bool = True
    """Whether the views of a step are a base view and those nearest to quarter turns from it; else four by chance."""


@dataclass(frozen=True)
class TrainView:
    """One camera's video as the optimisation reads it."""

    number: int
    """Its place in the grid; 0 is the input."""
    azimuth_deg: float
    c2w: Float[Tensor, "4 4"]
    focal: float
    rgb: Float[Tensor, "t h w 3"]
    """sRGB on white, [0, 1]."""
    alpha: Float[Tensor, "t h w"]
    confidence: Float[Tensor, "t h w"]
    """How far a pixel is believed, 0..1: 1 in the input view, else the grid's own confidence."""
    weight: Float[Tensor, "t h w"]
    """How much a pixel counts: confidence times visibility (by angle alone until the surface is known)."""
    normals: Float[Tensor, "t h w 3"] | None
    """Estimated unit normals in world space, zero where unknown."""
    trusted: bool
    """Believed like the input: in full weight, and its silhouette as it is."""
    vote: float
    """Share of the votes it takes to carve a point this view sees as empty (1 = its word alone suffices)."""


@dataclass(frozen=True)
class Batch:
    """n rays and their targets: the single rays first, then the patches, row by row."""

    origins: Float[Tensor, "n 3"]
    directions: Float[Tensor, "n 3"]
    times: Float[Tensor, "n 1"]
    rgb: Float[Tensor, "n 3"]
    """On `background`."""
    alpha: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    background: Float[Tensor, " 3"]
    """A new colour in every step: on a fixed one, an object of that colour might as well be transparent."""
    jitter: Float[Tensor, " n"]
    normals: Float[Tensor, "n 3"] | None
    """Estimated unit normals in world space, zero where unknown; None where there is no estimator."""
    view: Int[Tensor, " n"]
    """Number of each ray's view in the grid; 0 is the input."""
    agreeing: bool
    """Whether all views are trusted: pictures of one object."""
    frames: tuple[int, ...]
    """The frames drawn, of `n_frames`."""
    n_frames: int
    rays: int
    patches: int
    patch_side: int


def largest_silhouette(grid: ViewGrid) -> int:
    """The frame in which the input view sees most of the object: the canonical frame.

    What is hidden in the canonical frame cannot appear in another one (motion moves matter, it makes none), so the
    frame with the object spread out is the better start than the first one. Our choice; SV4D starts at the first.
    """
    return int(grid.input_frames[..., 3].astype(np.int64).sum((1, 2)).argmax())


AGREEMENT = 0.98
"""Share of every silhouette that the hull of the others must be able to show for views to count as true pictures:
1.00 for rendered truth, 0.78 for the worst view of the embedded model's samples."""


OUTLIERS = 4
"""One view in so many novel ones may be left out because it contradicts all others."""


@lru_cache(maxsize=2)
def agreeing_views(grid: ViewGrid, leave_out: bool = True) -> frozenset[int]:
    """Numbers of the views (0 is the input) that are pictures of one object, judged by their silhouettes alone; empty
    if there is no telling.

    All of them as a rule, or (with `leave_out`) all but one in `OUTLIERS`: those that contradict the others most are
    left out, if the rest then agrees. Views whose generator itself doubts them (a grid with confidence) do not count as
    such. Our own decision: imported true views deserve the trust of the input view, and nobody should have to say so.
    """
    if grid.confidence is not None:
        return frozenset()
    c2w = torch.from_numpy(grid.plan.c2w()).float()
    pictures = [grid.input_frames, *grid.novel_views.swapaxes(0, 1)]
    silhouettes = [
        HullView(torch.from_numpy(rgba[..., 3] / np.float32(255)), camera, grid.plan.focal_px(rgba.shape[2]))
        for rgba, camera in zip(pictures, c2w, strict=True)
    ]
    occupancy, rest = OccupancyGrid(grid.num_frames), _showing_views(grid)
    for _ in range(1 + (grid.num_views // OUTLIERS if leave_out else 0)):
        shares = occupancy.agreement([silhouettes[number] for number in rest]).tolist()
        if min(shares) >= AGREEMENT:
            return frozenset(rest)
        worst = min(range(len(rest)), key=lambda place: shares[place] if rest[place] != INPUT_VIEW else math.inf)
        del rest[worst]
    return frozenset()


def _showing_views(grid: ViewGrid) -> list[int]:
    """The input view and those in which the object is to be seen in at least one frame."""
    return [INPUT_VIEW, *(1 + view for view in range(grid.num_views) if grid.novel_views[:, view, ..., 3].any())]


def views_to_fit(grid: ViewGrid, leave_out: bool = True) -> list[int]:
    """Numbers of the views the field is fitted to: those that show the object and, if there are such, agree."""
    return sorted(agreeing_views(grid, leave_out)) or _showing_views(grid)


def train_views(grid: ViewGrid, device: torch.device | str, leave_out: bool = True) -> list[TrainView]:
    """The views a grid is fitted to, the input first and in full weight, with confidence (if known) in the weights.

    Views that agree with each other (`agreeing_views`) are trusted like the input, and with `leave_out` those that
    contradict them are not among the result.
    """
    c2w = torch.from_numpy(grid.plan.c2w()).float().to(device)
    azimuths = (0.0, *grid.plan.azimuths_deg)
    agreeing = agreeing_views(grid, leave_out)
    views = []
    for number in views_to_fit(grid, leave_out):
        is_input = number == INPUT_VIEW
        trusted = is_input or number in agreeing
        rgba = grid.input_frames if is_input else np.ascontiguousarray(grid.novel_views[:, number - 1])
        values = torch.from_numpy(rgba).to(device).float() / 255.0
        alpha = values[..., 3]
        confidence = torch.ones_like(alpha)
        if grid.confidence is not None and not is_input:
            confidence = torch.from_numpy(grid.confidence[:, number - 1]).to(device).float() / 255.0
        trust = 1.0 if trusted else angular_weight(c2w[number, :3, 3], c2w[INPUT_VIEW, :3, 3])
        views.append(
            TrainView(
                number=number,
                azimuth_deg=azimuths[number],
                c2w=c2w[number],
                focal=grid.plan.focal_px(rgba.shape[2]),
                rgb=values[..., :3] * alpha[..., None] + 1.0 - alpha[..., None],
                alpha=alpha,
                confidence=confidence,
                weight=confidence * trust,
                normals=None,
                trusted=trusted,
                # generated silhouettes wander: it takes two of them to carve, a trusted one alone may
                vote=1.0 if trusted else 0.5,
            )
        )
    return views


def hull_views(views: list[TrainView]) -> list[HullView]:
    """What the occupancy grid carves its visual hull from: the silhouettes, generated ones with their gaps closed.

    Views on one ring see a slice of the object in the same row of pixels, so a seam the generator leaves in that row
    would be carved by all of them together.
    """
    return [
        HullView(view.alpha if view.vote >= 1 else closed(view.alpha), view.c2w, view.focal, view.vote)
        for view in views
    ]


def surface_flow(views: list[TrainView], half_extent: float) -> SceneFlow | None:
    """How the surface moves from frame to frame by the optical flow of the trusted views; None if they are too few.

    Generated views that contradict each other have no surface in common that could be followed.
    """
    trusted = [view for view in views if view.trusted]
    return SceneFlow(trusted, half_extent) if len(trusted) >= FLOW_VIEWS else None


def closed(alpha: Float[Tensor, "t h w"], radius: int = 3) -> Float[Tensor, "t h w"]:
    """Morphological closing: gaps up to 2 * `radius` pixels wide are filled, the outline stays."""
    # a border wide enough that dilation does not end at the picture's edge
    padded = functional.pad(alpha[:, None], [2 * radius] * 4)
    grown = functional.max_pool2d(padded, 2 * radius + 1, stride=1)
    return -functional.max_pool2d(-grown, 2 * radius + 1, stride=1)[:, 0]


class BatchSampler:
    """Draws the rays of a step: its batch follows from (seed, step) and the weights of the views."""

    def __init__(self, views: list[TrainView], config: BatchConfig, schedule: ScheduleConfig, seed: int) -> None:
        self.views, self.config, self.schedule, self.seed = views, config, schedule, seed
        self.agreeing = all(view.trusted for view in views)
        self.azimuths = [view.azimuth_deg for view in views]
        self.pixels = [PixelSampler(view.alpha) for view in views]
        self.visibility: dict[int, Tensor] = {}
        """What `update_visibility` found last for each frame, [v, s, s]; what a resumed run has to be given."""

    def draw(self, step: int, window: Window, canonical: int) -> Batch:
        """The batch of a step whose frames lie in `window`; orthogonal views, most pixels near the object."""
        config = self.config
        rng = sampling.generator(self.seed, step)
        frames = sampling.sample_frames(rng, config.frames_per_step, window, canonical, self.schedule)
        turn = self._draw_views(rng)
        from_input = 0 if self.agreeing else int(config.rays * config.input_share)
        view = np.concatenate([np.full(from_input, INPUT_VIEW), np.resize(turn, config.rays - from_input)])
        frame = rng.choice(frames, config.rays)
        row, column = np.empty(config.rays, np.int64), np.empty(config.rays, np.int64)
        for number in np.unique(view):
            at = view == number
            row[at], column[at] = self.pixels[number].draw(rng, frame[at])
        patches = self._draw_patches(rng, frames, turn)
        view, frame, row, column = (
            np.concatenate([single, patch]) for single, patch in zip((view, frame, row, column), patches, strict=True)
        )
        return self._gather(step, view, frame, row, column, tuple(sorted(set(frames.tolist()))))

    def update_visibility(self, field: DeformableField, occupancy: OccupancyGrid, frame: int) -> None:
        """Weight the generated pixels of a frame by what the field's surface says of their visibility.

        Done for one frame now and then, not for every ray: the surface moves slowly.
        """
        generated = [view for view in self.views if not view.trusted]
        if not generated:
            return
        size, time = generated[0].rgb.shape[2], frame / max(generated[0].rgb.shape[0] - 1, 1)
        cameras = torch.stack([view.c2w for view in generated])
        half_width = size / 2 / generated[0].focal
        maps = view_weights(field, occupancy, self.views[INPUT_VIEW].c2w, cameras, half_width, size, time)
        self.use_visibility(frame, maps)

    def use_visibility(self, frame: int, maps: Float[Tensor, "v s s"]) -> None:
        """Weight the generated pixels of a frame by maps of their visibility, in [0, 1]."""
        generated = [view for view in self.views if not view.trusted]
        self.visibility[frame] = maps
        size = generated[0].rgb.shape[2]
        full = functional.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        for view, visibility in zip(generated, full, strict=True):
            view.weight[frame] = view.confidence[frame] * visibility

    def _draw_views(self, rng: np.random.Generator) -> list[int]:
        base = int(rng.integers(len(self.views)))
        if self.config.orthogonal:
            return sampling.orthogonal_views(self.azimuths, base)
        return rng.choice(len(self.views), min(4, len(self.views)), replace=False).tolist()

    def _draw_patches(
        self, rng: np.random.Generator, frames: Int[np.ndarray, " f"], turn: list[int]
    ) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
        count, side = self.config.patches, self.config.patch_side
        first = rng.choice(turn, 1) if self.views[-1].trusted else [INPUT_VIEW]
        views = np.concatenate([first, rng.choice(turn, max(count - 1, 0))])[:count].astype(np.int64)
        chosen = rng.choice(frames, count)
        pairs = zip(views, chosen, strict=True)
        drawn = [self.pixels[view].draw_patches(rng, np.array([frame]), side) for view, frame in pairs]
        rows = np.concatenate([rows.reshape(-1) for rows, _ in drawn] or [np.empty(0, np.int64)])
        columns = np.concatenate([columns.reshape(-1) for _, columns in drawn] or [np.empty(0, np.int64)])
        return np.repeat(views, side * side), np.repeat(chosen, side * side), rows, columns

    def _gather(
        self,
        step: int,
        view: Int[np.ndarray, " n"],
        frame: Int[np.ndarray, " n"],
        row: Int[np.ndarray, " n"],
        column: Int[np.ndarray, " n"],
        frames: tuple[int, ...],
    ) -> Batch:
        count, first = len(view), self.views[0]
        device = first.rgb.device
        rgb = torch.empty(count, 3, device=device)
        alpha, weight, focal = (torch.empty(count, device=device) for _ in range(3))
        c2w, size = torch.empty(count, 4, 4, device=device), torch.empty(count, 2, device=device)
        normals = None if all(view.normals is None for view in self.views) else torch.zeros_like(rgb)
        for number in np.unique(view):
            source = self.views[number]
            at = torch.from_numpy(np.flatnonzero(view == number)).to(device)
            index = tuple(torch.from_numpy(values[view == number]).to(device) for values in (frame, row, column))
            rgb[at], alpha[at], weight[at] = source.rgb[index], source.alpha[index], source.weight[index]
            c2w[at], focal[at] = source.c2w, source.focal
            if normals is not None and source.normals is not None:
                normals[at] = source.normals[index]
            size[at] = torch.tensor([source.rgb.shape[2], source.rgb.shape[1]], device=device).float()
        xy = torch.from_numpy(np.stack([column, row], -1)).to(device).float() + 0.5
        origins, directions = pixel_rays(xy, c2w, focal, size)
        background = sampling.uniform(self.seed, step, (3,), stream=4).to(device)
        times = torch.from_numpy(frame / max(first.rgb.shape[0] - 1, 1)).to(device).float()
        return Batch(
            origins=origins,
            directions=directions,
            times=times[:, None],
            # the views are on white: exchange it behind the object
            rgb=rgb + (1.0 - alpha[:, None]) * (background - 1.0),
            alpha=alpha,
            weight=weight,
            background=background,
            jitter=sampling.uniform(self.seed, step, (count,), stream=1).to(device),
            normals=normals,
            view=torch.from_numpy(np.array([source.number for source in self.views])[view]).to(device),
            agreeing=self.agreeing,
            frames=frames,
            n_frames=first.rgb.shape[0],
            rays=self.config.rays,
            patches=self.config.patches,
            patch_side=self.config.patch_side,
        )


def advance(
    field: DeformableField,
    occupancy: OccupancyGrid,
    flow: SceneFlow | None,
    schedule: ScheduleConfig,
    step: int,
    total_steps: int,
    occupancy_every: int,
) -> Window:
    """Bring field and occupancy grid to `step` of `total_steps` and return the frames in use there.

    Frames new to the window start from their neighbour's motion, and every `occupancy_every` steps the occupancy grid
    looks at one of the window's moments. Follows from the step alone, so a resumed run
    continues as it would have.
    """
    frames = occupancy.bins
    canonical = occupancy.nearest_bin(field.config.canonical_time)
    fraction = min(step / total_steps, 1.0)
    window = sampling.frame_window(fraction, frames, canonical, schedule)
    if step > 0:
        before = sampling.frame_window(min((step - 1) / total_steps, 1.0), frames, canonical, schedule)
        for admitted in sampling.admissions(before, window, canonical):
            admit(field, occupancy, flow, admitted, step)
    if fraction >= schedule.residual_from and field.density_residual is not None:
        field.open_residual()
    if step % occupancy_every == 0:
        frame = window.first + step // occupancy_every % len(window)
        occupancy.update(field, frame, torch.Generator().manual_seed(step))
    return window


@dataclass(frozen=True)
class _Start:
    """How a new frame's motion is found before its pixels are asked."""

    steps: int
    rigidity: float
    """Weights of rigidity and of landing on the canonical hull; that of the surface's flow is 1."""
    landing: float


BY_HULL = _Start(steps=60, rigidity=30.0, landing=1.0)
"""The hulls alone say where matter went: rigid, or every limb goes to the nearest one."""
BY_FLOW = _Start(steps=100, rigidity=0.03, landing=0.01)
"""Followed points say it; hulls and rigidity fill in what nobody could follow."""
REGISTRATION_RATE = 0.02
"""Adam's rate of those steps, in grid cells."""


def admit(
    field: DeformableField, occupancy: OccupancyGrid, flow: SceneFlow | None, frame: sampling.Admission, seed: int
) -> None:
    """Start a new frame's motion: its neighbour's, moved as the hulls' middles did, then registered to its own hull and
    to where the views' optical flow says its surface came from.

    Costs about a second, once per frame. Pixels could not do this: they pull on what already overlaps them.
    """
    shift = occupancy.centroid(frame.new) - occupancy.centroid(frame.known)
    if not field.admit(frame.new, frame.known, shift):
        return
    start = BY_HULL if flow is None else BY_FLOW
    parameter = field.motion.keyframes[frame.new]
    optimizer = torch.optim.Adam([parameter], lr=REGISTRATION_RATE, betas=(0.9, 0.99), eps=1e-15)
    for number in range(start.steps):
        rng = sampling.generator(seed, number, 5)
        band = _draw_band(occupancy, [frame.new], rng)
        if band is None:
            return
        optimizer.param_groups[0]["lr"] = REGISTRATION_RATE * (1 - number / start.steps)
        landing, rigidity = _band_losses(field, occupancy, band)
        loss = start.landing * landing + start.rigidity * rigidity
        if flow is not None:
            loss = loss + _flow_loss(field, occupancy, flow, frame, FLOW_POINTS, rng)
        parameter.grad = torch.autograd.grad(loss, parameter)[0]
        optimizer.step()
    parameter.grad = None


def _flow_loss(
    field: DeformableField,
    occupancy: OccupancyGrid,
    flow: SceneFlow,
    frame: sampling.Admission,
    points: int,
    rng: np.random.Generator,
) -> Tensor:
    """What followed points of `frame.new` owe: to come from where they came from in `frame.known`."""
    known, new = flow.matches(frame.known, frame.new).draw(points, rng)
    if not len(new):
        return new.sum()  # nothing could be followed: nothing is owed
    last = max(occupancy.bins - 1, 1)
    with torch.no_grad():
        origin = known + field.deformation(known, torch.full_like(known[:, :1], frame.known / last))
    moved = field.deformation(new, torch.full_like(new[:, :1], frame.new / last))
    return losses.scene_flow(new + moved, origin, occupancy.cell_size)


@dataclass(frozen=True)
class _Band:
    """Points around the hulls of some moments."""

    x: Tensor
    t: Tensor
    distance: Tensor
    offset: Tensor


def _draw_band(occupancy: OccupancyGrid, bins: list[int], rng: np.random.Generator) -> _Band | None:
    points, times, distances = [], [], []
    for k in bins:
        x = occupancy.draw_points(occupancy.band(k, BAND), BAND_POINTS, rng)
        if not len(x):
            continue
        points.append(x)
        times.append(torch.full_like(x[:, :1], k / max(occupancy.bins - 1, 1)))
        distances.append(occupancy.distance_at(x, k))
    if not points:
        return None
    x = torch.cat(points)
    offset = torch.from_numpy(2 * NEIGHBOUR_SCALE * rng.normal(size=x.shape)).to(x)
    return _Band(x, torch.cat(times), torch.cat(distances), offset)


def _band_losses(field: DeformableField, occupancy: OccupancyGrid, band: _Band) -> tuple[Tensor, Tensor]:
    """Registration and rigidity of the deformation at a band's points."""
    canonical = occupancy.nearest_bin(field.config.canonical_time)
    moved = field.deformation(torch.cat([band.x, band.x + band.offset]), torch.cat([band.t, band.t]))
    here, neighbour = moved.chunk(2)
    landed = occupancy.distance_at(band.x + here, canonical)
    landing = losses.registration(landed, band.distance, occupancy.cell_size, DISTANCE_REACH)
    return landing, losses.deformation_rigidity(here, neighbour, band.offset)


def loss_terms(
    field: DeformableField,
    occupancy: OccupancyGrid,
    flow: SceneFlow | None,
    rendered: RenderOutput,
    batch: Batch,
    weights: LossWeights,
    seed: int,
    step: int,
    perceptual: Perceptual | None = None,
) -> dict[str, Tensor]:
    """Every loss that is switched on, times its weight; their sum is what a step minimises.

    Args:
        perceptual: LPIPS, where it is at hand.
    """
    if flow is not None:
        weights = replace(
            weights,
            deformation_rigidity=RIGIDITY_BESIDE_FLOW * weights.deformation_rigidity,
            band_rigidity=RIGIDITY_BESIDE_FLOW * weights.band_rigidity,
        )
    terms = {
        "photometric": losses.photometric(rendered.rgb, batch.rgb, batch.weight),
        "mask": losses.mask(rendered.alpha, batch.alpha, batch.weight),
    }
    if batch.patches:
        terms.update(_patch_terms(field, rendered, batch, weights, perceptual))
    if weights.sparsity and not batch.agreeing:
        terms["sparsity"] = _sparsity(field, rendered, batch)
    if weights.distortion:
        terms["distortion"] = losses.distortion(rendered.weights, rendered.samples)
    if weights.density_residual and rendered.residual is not None:
        terms["density_residual"] = losses.density_residual(rendered.residual)
    terms.update(_surface_terms(field, rendered, batch, weights, seed, step))
    terms.update(_band_terms(field, occupancy, batch, weights, seed, step))
    if flow is not None and weights.scene_flow:
        terms.update(_flow_terms(field, occupancy, flow, batch, seed, step))
    return {name: getattr(weights, name) * value for name, value in terms.items()}


def _sparsity(field: DeformableField, rendered: RenderOutput, batch: Batch) -> Tensor:
    """What the object owes for matter that the batch's rays see.

    Only what a view sees is asked to go, so that something can object: from sides that no view sees (between the legs,
    under the belly) a body would be eaten up to its shell.
    """
    n_rays = int((batch.alpha > 0.5).sum())
    if not n_rays:
        return rendered.density.new_zeros(())
    step = rendered.samples.step
    opened = transmittance(rendered.density.detach() * step, rendered.samples)
    return losses.sparsity(rendered.density, opened, step, n_rays, field.config.max_density)


def _patch_terms(
    field: DeformableField,
    rendered: RenderOutput,
    batch: Batch,
    weights: LossWeights,
    perceptual: Perceptual | None,
) -> dict[str, Tensor]:
    """What is asked of the batch's patches: how they look, and how smooth the surface in them is."""
    side = batch.patch_side

    def patches(values: Tensor) -> Tensor:
        return values[batch.rays :].reshape(batch.patches, side, side, *values.shape[1:])

    made, target, per_patch = patches(rendered.rgb), patches(batch.rgb), patches(batch.weight).mean((1, 2))
    terms = {}
    if weights.structure:
        terms["structure"] = losses.dssim(made, target, per_patch)
    if weights.perceptual and perceptual is not None:
        terms["perceptual"] = losses.perceptual(perceptual, made, target, per_patch)
    seen = (patches(rendered.alpha.detach()) > 0.5) & (patches(batch.alpha) > 0.5)
    has_estimate = bool(weights.normal) and batch.normals is not None
    if not (has_estimate or weights.bilateral_normal) or not bool(seen.any()):
        return terms
    surface = batch.origins + rendered.depth.detach()[:, None] * batch.directions
    normals = torch.zeros_like(made)
    normals[seen] = field.normals(patches(surface)[seen], patches(batch.times)[seen])
    if has_estimate:
        assert batch.normals is not None
        estimated = patches(batch.normals)[seen]
        terms["normal"] = losses.normal(normals[seen], estimated, patches(batch.weight)[seen])
    if weights.bilateral_normal:
        terms["bilateral_normal"] = losses.bilateral_normal(normals, target, seen)
    return terms


def _surface_terms(
    field: DeformableField, rendered: RenderOutput, batch: Batch, weights: LossWeights, seed: int, step: int
) -> dict[str, Tensor]:
    """Smoothness of surface and motion at points that are seen in this step."""
    seen = (rendered.weights.detach() > 0.02).nonzero()[:, 0]
    if not len(seen):
        return {}
    rng = sampling.generator(seed, step, 2)
    pick = seen[torch.from_numpy(rng.integers(0, len(seen), REGULARISED_POINTS)).to(seen.device)]
    x, moved = rendered.positions[pick], rendered.deformation[pick]
    t = batch.times[rendered.ray_indices[pick]]
    offset = torch.from_numpy(NEIGHBOUR_SCALE * rng.normal(size=x.shape)).to(x)
    terms = {}
    if weights.normal_smoothness:
        terms["normal_smoothness"] = losses.normal_smoothness(field, (x + moved).detach(), 0.5 * offset)
    if not moved.requires_grad:  # the static phase does not evaluate the deformation
        return terms
    if weights.deformation:
        terms["deformation"] = losses.deformation_magnitude(rendered.deformation, rendered.weights)
    if weights.deformation_rigidity:
        beside = torch.cat([t.unique() - BESIDE, t.unique() + BESIDE])[:, None]
        places = torch.cat([x + 2 * offset, x.new_zeros(len(beside), 3)])
        neighbour = field.deformation(places, torch.cat([t, beside]))[: len(x)]
        terms["deformation_rigidity"] = losses.deformation_rigidity(moved, neighbour, 2 * offset)
    return terms


def _band_terms(
    field: DeformableField, occupancy: OccupancyGrid, batch: Batch, weights: LossWeights, seed: int, step: int
) -> dict[str, Tensor]:
    """What the deformation owes around the hulls of the batch's frames, rendered or not."""
    canonical = occupancy.nearest_bin(field.config.canonical_time)
    bins = {frame: occupancy.nearest_bin(frame / max(batch.n_frames - 1, 1)) for frame in batch.frames}
    moving = [frame for frame, k in bins.items() if k != canonical]
    if not weights.registration or not moving:
        return {}
    band = _draw_band(occupancy, [bins[frame] for frame in moving], sampling.generator(seed, step, 3))
    if band is None:
        return {}
    landing, rigidity = _band_losses(field, occupancy, band)
    return {"registration": landing, "band_rigidity": rigidity}


def _flow_terms(
    field: DeformableField, occupancy: OccupancyGrid, flow: SceneFlow, batch: Batch, seed: int, step: int
) -> dict[str, Tensor]:
    """What the batch's frames owe to the surface's flow from their neighbours nearer to the canonical frame."""
    canonical = round(field.config.canonical_time * max(batch.n_frames - 1, 1))
    pairs = [
        sampling.Admission(frame, frame - (1 if frame > canonical else -1))
        for frame in batch.frames
        if frame != canonical
    ]
    if not pairs:
        return {}
    rng = sampling.generator(seed, step, 7)
    owed = [_flow_loss(field, occupancy, flow, pair, FLOW_POINTS // 2, rng) for pair in pairs]
    return {"scene_flow": torch.stack(owed).mean()}
