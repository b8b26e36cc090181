"""Fit a view grid with the field alone, as `ns-train sv4d` does without nerfstudio around it; for the other scripts."""

import copy
import time
from dataclasses import dataclass, field, replace

import torch

from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.volume_rendering import render_rays
from sv4d_ns.fitting.batch_sampler import BatchConfig, BatchSampler
from sv4d_ns.fitting.objective import loss_terms
from sv4d_ns.fitting.schedule import ScheduleConfig, advance
from sv4d_ns.fitting.settings import LossWeights
from sv4d_ns.fitting.train_views import hull_views, largest_silhouette, surface_flow, train_views
from sv4d_ns.plugin.optimizers import LEARNING_RATES, DecaySchedulerConfig, decay_factor
from sv4d_ns.views.grid import ViewGrid

SAMPLES, OCCUPANCY_EVERY = 128, 2
"""The model's defaults."""


@dataclass(frozen=True)
class FitOptions:
    """How a grid is fitted."""

    steps: int
    """Length of the schedule."""
    rays: int = 1024
    losses: LossWeights = field(default_factory=LossWeights)
    leave_out: bool = True
    visibility_every: int = 10


class GridFit:
    """A field and everything that is learned with it, on its way through the schedule."""

    def __init__(self, grid: ViewGrid, options: FitOptions) -> None:
        torch.manual_seed(0)
        torch.set_flush_denormal(True)
        self.options, self.step, self.cpu_s = options, 0, 0.0
        self.canonical = largest_silhouette(grid)
        canonical_time = self.canonical / max(grid.num_frames - 1, 1)
        self.field = DeformableField(DeformableFieldConfig(keyframes=grid.num_frames, canonical_time=canonical_time))
        self.occupancy = OccupancyGrid(grid.num_frames)
        groups = self.field.parameter_groups()
        self.optimizer = torch.optim.Adam(
            [{"params": values, "rate": LEARNING_RATES[name]} for name, values in groups.items()],
            betas=(0.9, 0.99),
            eps=1e-15,
            fused=True,
        )
        self.use_grid(grid)

    def use_grid(self, grid: ViewGrid) -> None:
        """Fit another grid of the same cameras from now on, as stage 2 does."""
        views = train_views(grid, "cpu", self.options.leave_out)
        self.occupancy.carve(hull_views(views))
        self.field.confine(self.occupancy.hull[self.canonical])
        scene_flow = self.options.losses.scene_flow
        self.flow = surface_flow(views, self.occupancy.half_extent) if scene_flow else None
        batch = BatchConfig(rays=self.options.rays)
        self.sampler = BatchSampler(views, batch, ScheduleConfig(), 0)

    def run(self, until: int) -> "GridFit":
        """Go on up to a step of the schedule; returns itself."""
        started, options = time.process_time(), self.options
        decay = DecaySchedulerConfig(max_steps=options.steps)
        for step in range(self.step, until):
            for group in self.optimizer.param_groups:
                group["lr"] = group["rate"] * decay_factor(decay, step)
            window = advance(
                self.field, self.occupancy, self.flow, ScheduleConfig(), step, options.steps, OCCUPANCY_EVERY
            )
            if options.visibility_every and len(window) > 1 and step % options.visibility_every == 0:
                frame = window.first + step // options.visibility_every % len(window)
                self.sampler.update_visibility(self.field, self.occupancy, frame)
            batch = self.sampler.draw(step, window, self.canonical)
            out = render_rays(self.field, self.occupancy, batch.origins, batch.directions, batch.times, SAMPLES,
                              background=batch.background, jitter=batch.jitter)  # fmt: skip
            terms = loss_terms(self.field, self.occupancy, self.flow, out, batch, options.losses, 0, step)
            self.optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            self.optimizer.step()
        self.step, self.cpu_s = until, self.cpu_s + time.process_time() - started
        return self

    def copy(self, **changes: object) -> "GridFit":
        """An independent fit at the same step, with some options changed."""
        self.optimizer.zero_grad(set_to_none=True)
        other = copy.deepcopy(self)
        other.options = replace(other.options, **changes)  # type: ignore[arg-type]
        return other
