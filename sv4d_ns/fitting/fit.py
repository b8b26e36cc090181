"""A field fitted to a view grid, without nerfstudio around it: what `ns-train sv4d` does in stage 1."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sv4d_ns.field.clip import clip_field
from sv4d_ns.field.volume_rendering import render_rays
from sv4d_ns.fitting.batch_sampler import BatchConfig, BatchSampler
from sv4d_ns.fitting.learning_rates import field_optimizer, set_rates
from sv4d_ns.fitting.objective import loss_terms
from sv4d_ns.fitting.schedule import ScheduleConfig, apply_schedule
from sv4d_ns.fitting.settings import LossWeights
from sv4d_ns.fitting.train_views import hull_views, largest_silhouette, surface_flow, train_views, with_normals
from sv4d_ns.metrics.lpips import vgg_distance
from sv4d_ns.views.grid import ViewGrid


@dataclass(frozen=True)
class FitOptions:
    """How a grid is fitted; defaults are those of `ns-train sv4d`."""

    steps: int = 2400
    """Length of the schedule."""
    rays: int = 1536
    """Single rays of a step, beside its patches."""
    samples: int = 128
    """Steps along the box's diagonal."""
    losses: LossWeights = field(default_factory=LossWeights)
    """Weights of the losses; `normal` counts where normals are given, `perceptual` needs VGG16's weights on this
    machine."""
    leave_out: bool = True
    """Whether views that contradict all others are left out."""
    visibility_every: int = 30
    """Steps between updates of the views' visibility; 0 for none."""
    occupancy_every: int = 4
    """Steps between updates of the occupancy grid."""
    seed: int = 0


class GridFit:
    """A field and everything that is learned with it, on its way through the schedule.

    Args:
        grid: the views.
        options: how they are fitted.
        device: where.
        encoding: who evaluates the hash grid (`DeformableFieldConfig.encoding_backend`).
        normals: of every view, the input first, in world space [t, h, w, 3] (`views.normals.estimated_normals`).

    Raises:
        InputError: the perceptual loss is asked for, and its network is not on this machine or damaged.
    """

    def __init__(
        self,
        grid: ViewGrid,
        options: FitOptions,
        device: torch.device | str = "cpu",
        encoding: Literal["numba", "tinycudann"] = "numba",
        normals: Sequence[np.ndarray] | None = None,
    ) -> None:
        torch.manual_seed(options.seed)
        torch.set_flush_denormal(True)  # subnormal moments of rarely touched grid entries would slow Adam down
        self.options, self.device, self.step = options, device, 0
        self.evaluated = 0
        """Points of the field that the last step looked at along its rays."""
        self.canonical = largest_silhouette(grid)
        untrained, occupancy = clip_field(grid.num_frames, self.canonical, encoding)
        self.field, self.occupancy = untrained.to(device), occupancy.to(device)
        self.optimizer = field_optimizer(self.field)
        self.perceptual = vgg_distance(device) if options.losses.perceptual else None
        self.use_grid(grid, normals)

    def use_grid(self, grid: ViewGrid, normals: Sequence[np.ndarray] | None = None) -> None:
        """Fit another grid of the same cameras from now on, as stage 2 does; `normals` as above, of its views."""
        options = self.options
        views = train_views(grid, self.device, options.leave_out)
        if normals is not None:
            views = with_normals(views, normals)
        self.occupancy.carve(hull_views(views))
        self.field.confine(self.occupancy.hull[self.canonical])
        half_extent = self.occupancy.half_extent
        self.flow = surface_flow(views, half_extent, self.canonical) if options.losses.scene_flow else None
        self.sampler = BatchSampler(views, BatchConfig(rays=options.rays), ScheduleConfig(), options.seed)

    def run(self, until: int | None = None, on_step: Callable[[int, int], None] | None = None) -> "GridFit":
        """Go on up to a step of the schedule (its end by default); returns itself.

        Args:
            on_step: called with (steps done, steps of the schedule).
        """
        for _ in range(self.step, self.options.steps if until is None else until):
            self.take_step()
            if on_step is not None:
                on_step(self.step, self.options.steps)
        return self

    def take_step(self) -> dict[str, Tensor]:
        """One optimisation step; returns its losses by name."""
        options, step = self.options, self.step
        set_rates(self.optimizer, step, options.steps)
        window = apply_schedule(
            self.field, self.occupancy, self.flow, ScheduleConfig(), step, options.steps, options.occupancy_every
        )
        if options.visibility_every and len(window) > 1 and step % options.visibility_every == 0:
            frame = window.in_turn(step // options.visibility_every)
            self.sampler.update_visibility(self.field, self.occupancy, frame)
        batch = self.sampler.draw(step, window, self.canonical)
        rendered = render_rays(
            self.field, self.occupancy, batch.origins, batch.directions, batch.times, options.samples,
            background=batch.background, jitter=batch.jitter, moments=batch.moments,
        )  # fmt: skip
        terms = loss_terms(
            self.field, self.occupancy, self.flow, rendered, batch, options.losses, options.seed, step, self.perceptual
        )
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        self.step += 1
        self.evaluated = len(rendered.weights)
        return terms

    def copy(self, **changes: object) -> "GridFit":
        """An independent fit at the same step, with some options changed."""
        self.optimizer.zero_grad(set_to_none=True)
        other = copy.deepcopy(self)
        other.options = replace(other.options, **changes)  # type: ignore[arg-type]
        return other
