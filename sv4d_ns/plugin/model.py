"""The nerfstudio model of sv4d: a deformable field, fitted to the losses of `fitting`.

Only configuration is imported at the top; nerfstudio imports this file for every ns-* command.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import tyro
from torch import Tensor

from sv4d_ns.fitting.settings import LossWeights
from sv4d_ns.plugin.base_model import FieldModel, FieldModelConfig
from sv4d_ns.utils.progress import say

if TYPE_CHECKING:
    from sv4d_ns.fitting.scene_flow import SceneFlow
    from sv4d_ns.fitting.schedule import Window
    from sv4d_ns.metrics.lpips import Perceptual
    from sv4d_ns.views.grid import ViewGrid


@dataclass
class SV4DModelConfig(FieldModelConfig):
    """The field's schedule and losses; its sizes are the defaults of `DeformableFieldConfig`."""

    _target: type = field(default_factory=lambda: SV4DModel)
    schedule_steps: tyro.conf.Suppress[int] = 0
    """Length of the schedule (static phase, growing frame window) in training steps. Filled in: the run's
    --max-num-iterations."""
    encoding: Literal["auto", "numba", "tinycudann"] = "auto"
    """Who evaluates the canonical hash grid. numba is the compiled loop on a CPU and plain torch on a GPU; tinycudann
    stands for tiny-cuda-nn's kernels on a GPU, and what they trained opens on a CPU too. auto takes these on a GPU
    where tiny-cuda-nn is installed, else numba; the choice is then part of the run's configuration."""
    occupancy_every: int = 4
    losses: LossWeights = field(default_factory=LossWeights)
    """Weights of the losses."""
    seed: int = 0
    """Seed of the points the smoothness losses look at."""


class SV4DModel(FieldModel):
    """The deformable field, its schedule and its losses."""

    config: SV4DModelConfig

    def populate_modules(self) -> None:
        """Make the field, the occupancy grid and the schedule."""
        from sv4d_ns.fitting.schedule import ScheduleConfig

        super().populate_modules()
        self.schedule = ScheduleConfig()
        self._flow: SceneFlow | None = None
        self._perceptual: tuple[Perceptual | None, str] | None = None
        self.step = 0

    def make_field(self) -> tuple[Any, Any]:
        """A deformable field and a moment of occupancy for every frame."""
        from sv4d_ns.field.clip import clip_field

        return clip_field(self.num_frames, self.canonical_frame, self.config.encoding)

    def fraction(self, step: int) -> float:
        """Where `step` is in the schedule, 0..1."""
        return min(step / max(self.config.schedule_steps, 1), 1.0)

    def frame_window(self, step: int) -> "Window":
        """Frames in use at `step` (progressive frame sampling)."""
        from sv4d_ns.fitting.schedule import frame_order, frame_window

        order = frame_order(self._flow, self.num_frames, self.canonical_frame)
        return frame_window(self.fraction(step), order, self.schedule)

    def before_step(self, step: int) -> None:
        """Bring the field's schedule, the motion's flow and the occupancy grid to a step."""
        from sv4d_ns.fitting.schedule import apply_schedule

        self.step = step
        total, every = max(self.config.schedule_steps, 1), self.config.occupancy_every
        apply_schedule(self.field, self.occupancy, self._flow, self.schedule, step, total, every)

    def carve(self, grid: "ViewGrid") -> None:
        """Bound the object by the visual hull of a grid's silhouettes."""
        from sv4d_ns.fitting.train_views import hull_views, surface_flow

        views = self.views_to_fit(grid)
        self.occupancy.carve(hull_views(views))
        if self.config.losses.scene_flow:
            self._flow = surface_flow(views, self.occupancy.half_extent, self.canonical_frame)
        # other frames are to be explained by motion, not by matter the canonical frame has no room for
        self.field.confine(self.occupancy.hull[self.canonical_frame])

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The weighted losses of a training step."""
        from sv4d_ns.fitting.objective import loss_terms

        return loss_terms(
            self.field,
            self.occupancy,
            self._flow,
            outputs["rendered"],
            batch["batch"],
            self.config.losses,
            self.config.seed,
            self.step,
            self._perceptual_loss(),
        )

    def _perceptual_loss(self) -> "Perceptual | None":
        """LPIPS, if its network is at hand; looked for at the first training step, and said aloud."""
        from sv4d_ns.metrics.lpips import perceptual_network

        if not self.config.losses.perceptual:
            return None
        if self._perceptual is None:
            self._perceptual = perceptual_network(self.device)
            say(self._perceptual[1])
        return self._perceptual[0]
