"""One step of 4Diffusion's optimisation, without nerfstudio: what is rendered, what is asked of it.

The nerfstudio pipeline and `benchmarks/four_diffusion.py` both call this. Everything drawn follows from (seed, step),
so a resumed run goes on as the undisturbed one would have.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from sv4d_ns.diffusion.fourdm.guidance import sds_loss
from sv4d_ns.distillation import losses
from sv4d_ns.distillation.anchor import anchor_target
from sv4d_ns.distillation.cameras import VIEWS, DrawnViews, draw_views, draw_window
from sv4d_ns.distillation.priors import ViewPrior
from sv4d_ns.distillation.rendering import Rays, Rendered, RenderSettings, grid_rays, render_together
from sv4d_ns.distillation.schedules import REFERENCE_NOISE, LossRamps, NoiseLevels, reference_step, render_size
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.space_time import SpaceTimeField
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.metrics.images import padded_ssim
from sv4d_ns.metrics.lpips import MeanPerceptual
from sv4d_ns.utils import randomness
from sv4d_ns.utils.images import resize_rgba
from sv4d_ns.views.grid import ViewGrid

REFERENCE_PICTURE = 256
"""Pixels a side of the reference's largest renders."""


@dataclass(frozen=True)
class Anchor:
    """One camera's video that the field is to match."""

    targets: Float[Tensor, "t h w 3"]
    """On white."""
    plan: ViewPlan
    """A single novel view: the anchor's camera."""

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.targets.shape[1]


def make_anchor(grid: ViewGrid, view: int, size: int, device: torch.device | str) -> Anchor:
    """A view of a grid (0 the input) as an anchor of `size` pixels a side."""
    pictures: UInt8[np.ndarray, "t s s 4"] = grid.input_frames if view == 0 else grid.novel_views[:, view - 1]
    targets = torch.stack([anchor_target(picture)[0] for picture in resize_rgba(pictures, size)])
    azimuth = (0.0, *grid.plan.azimuths_deg)[view]
    elevation = grid.plan.absolute_elevations_deg[view]
    plan = ViewPlan((azimuth,), (0.0,), elevation, grid.plan.radius, grid.plan.fov_deg)
    return Anchor(targets.to(device), plan)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a step draws and how its terms weigh."""

    total_steps: int
    """Length of the run; the schedule of the reference's 35,000 steps is passed in as many."""
    first_step: int = 0
    """Step of the reference's run at which the schedule starts."""
    frames_per_step: int | None = None
    """Consecutive frames of a step; None takes the model's window."""
    seed: int = 0
    weights: LossRamps = field(default_factory=LossRamps)
    noise: NoiseLevels = REFERENCE_NOISE
    render: RenderSettings = field(default_factory=RenderSettings)


@dataclass(frozen=True)
class Draw:
    """What a step's distillation is of."""

    frames: list[int]
    views: DrawnViews
    noise_step: int
    seed: int
    size: int
    """Pixels along the side of the renders."""
    rays: Rays


class Objective:
    """The terms of a training step.

    Args:
        space: the field that is optimised.
        occupancy: where it is looked at.
        prior: the model behind score distillation; None leaves that term (and the opacity terms) out.
        anchor: the view to match; None leaves that term out.
        num_frames: of the clip.
        lpips: see `metrics.lpips.reference_lpips`; None leaves it out of the anchor.
    """

    def __init__(
        self,
        space: SpaceTimeField,
        occupancy: OccupancyGrid,
        prior: ViewPrior | None,
        anchor: Anchor | None,
        num_frames: int,
        config: ObjectiveConfig,
        lpips: MeanPerceptual | None = None,
    ) -> None:
        self.field, self.occupancy, self.prior, self.anchor = space, occupancy, prior, anchor
        self.num_frames, self.config, self.lpips = num_frames, config, lpips
        self.device = space.aabb.device
        self.anchor_psnr = torch.zeros((), device=self.device)
        """Of the last step's anchor, dB; not fetched here, because that would wait for the device."""

    def terms(self, step: int) -> dict[str, Float[Tensor, ""]]:
        """Every weighted term that is switched on at a step; their sum is what the step minimises."""
        place = reference_step(step, self.config.total_steps, self.config.first_step)
        weights = self.config.weights.at(place)
        rng = randomness.generator(self.config.seed, step, 10)
        draw = None if self.prior is None else self._draw(self.prior, place, rng)
        frame = 0 if self.anchor is None else int(rng.integers(self.num_frames))
        asked = [] if draw is None else [(draw.rays, draw.seed)]
        if self.anchor is not None:
            time = torch.tensor([frame]) / max(self.num_frames - 1, 1)
            rays = grid_rays(self.anchor.plan, time, self.anchor.size, self.device)
            asked.append((rays, int(rng.integers(2**31))))
        if not asked:
            return {}
        settings = replace(self.config.render, z_variance=weights["z_variance"] > 0)
        rendered = render_together(self.field, self.occupancy, asked, settings)
        terms: dict[str, Tensor] = {}
        if self.prior is not None and draw is not None:
            terms |= self._distillation(self.prior, draw, rendered[0])
        if self.anchor is not None:
            terms |= self._anchor(self.anchor, frame, rendered[-1])
        return {name: weights[name] * value for name, value in terms.items() if weights[name]}

    def _draw(self, prior: ViewPrior, place: float, rng: np.random.Generator) -> Draw:
        """V views of a window of frames, and how they are noised."""
        length = self.config.frames_per_step or prior.num_frames
        frames = draw_window(rng, self.num_frames, length)
        views = draw_views(rng, VIEWS, prior.highest_elevation_deg).raised(prior.base_elevation_deg)
        low, high = self.config.noise.at(place)
        noise_step = int(rng.integers(low, high + 1))
        seed = int(rng.integers(2**31))
        size = max(round(render_size(place) * prior.image_size / REFERENCE_PICTURE), 8)
        times = torch.tensor(frames, dtype=torch.float32) / max(self.num_frames - 1, 1)
        rays = grid_rays(views.plan(prior.radius, prior.fov_deg), times, size, self.device)
        return Draw(frames, views, noise_step, seed, size, rays)

    def _distillation(self, prior: ViewPrior, draw: Draw, rendered: Rendered) -> dict[str, Float[Tensor, ""]]:
        """Score distillation on V views of a window, and what the same renders say of opacity and orientation."""
        generator = torch.Generator().manual_seed(draw.seed)
        latents = prior.encode(self._pictures(rendered, draw.size, prior), generator)
        target = prior.target(latents, draw.frames, draw.views, draw.noise_step, generator)
        met = (rendered.alpha > 0).sum().clamp(min=1)
        return {
            "sds": sds_loss(latents, target),
            "orientation": rendered.orientation / met,
            "sparsity": losses.sparsity(rendered.alpha),
            "opaque": losses.opaque(rendered.alpha),
            "z_variance": losses.z_variance(rendered.z_variance, rendered.alpha),
        }

    def _pictures(self, rendered: Rendered, size: int, prior: ViewPrior) -> Float[Tensor, "fv c s s"]:
        values = torch.cat([rendered.rgb, rendered.alpha[:, None]], -1)[:, : prior.channels]
        images = values.reshape(-1, size, size, prior.channels).movedim(-1, 1)
        if size == prior.image_size:
            return images
        target = (prior.image_size, prior.image_size)
        return functional.interpolate(images, target, mode="bilinear", align_corners=False)

    def _anchor(self, anchor: Anchor, frame: int, rendered: Rendered) -> dict[str, Float[Tensor, ""]]:
        """One random frame of the anchor's video, whole."""
        picture = rendered.rgb.reshape(anchor.size, anchor.size, 3).movedim(-1, 0)[None]
        target = anchor.targets[frame].movedim(-1, 0)[None]
        error = (picture.detach() - target).square().mean().clamp(min=1e-10)
        self.anchor_psnr = -10 * error.log10()
        terms = {"ssim": 1 - padded_ssim(picture, target), "pixels": (picture - target).square().mean()}
        if self.lpips is not None:
            terms["lpips"] = self.lpips(picture, target)
        return terms
