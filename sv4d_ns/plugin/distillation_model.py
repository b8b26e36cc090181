"""The nerfstudio model of 4Diffusion: the space-time field and its empty-space grid.

Only configuration is imported at the top; nerfstudio imports this file for every ns-* command.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.models.base_model import Model
from torch import Tensor
from torch.nn import Parameter

from sv4d_ns.fitting.settings import LossWeights
from sv4d_ns.plugin.model import SV4DModel, SV4DModelConfig

if TYPE_CHECKING:
    from sv4d_ns.distillation.rendering import RenderSettings
    from sv4d_ns.fitting.schedule import Window
    from sv4d_ns.views.grid import ViewGrid


@dataclass
class FourDiffusionModelConfig(SV4DModelConfig):
    """The field, what bounds it, and how it is rendered in training."""

    _target: type = field(default_factory=lambda: FourDiffusionModel)
    prompt: str | None = None
    """What the video shows, for 4DM; may be left out. `--prompt` is short for it."""
    field_size: Literal["auto", "small", "reference"] = "auto"
    """Hash grids of 8 levels to resolution 128 (small, for a CPU) or 16 levels to 4096 (reference, 28 million
    parameters); auto takes the one for the device, which is then part of the run's configuration."""
    carve: bool = True
    """Bound the object by the visual hull of the views' silhouettes (not in the reference)."""
    train_samples: int = 0
    """Steps along the box's diagonal in training, of which those in occupied space are evaluated; 0 takes 256, as the
    reference, for the reference field and 128 for the small one."""
    chunk_rays: int = 0
    """Rays whose intermediate results are kept at once; more are rendered a second time when gradients arrive. 0 takes
    16,384 for the reference field and 131,072 for the small one."""
    orientation_samples: int = 4096
    """Samples of a chunk at which normals are taken for the orientation loss."""
    encoding: tyro.conf.Suppress[Literal["auto", "numba", "tinycudann"]] = "numba"
    """Unused: the space-time field has a hash grid of its own."""
    losses: tyro.conf.Suppress[LossWeights] = field(default_factory=LossWeights)
    """Unused: the losses are the pipeline's."""


class FourDiffusionModel(SV4DModel):
    """Renders the space-time field."""

    config: FourDiffusionModelConfig
    field: Any  # a SpaceTimeField, where SV4DModel has a DeformableField
    occupancy: Any

    def populate_modules(self) -> None:
        """Make the field and its empty-space grid."""
        from dataclasses import replace

        from sv4d_ns.field.occupancy import OccupancyGrid
        from sv4d_ns.field.space_time import SpaceTimeField

        Model.populate_modules(self)
        torch.set_flush_denormal(True)
        self.num_frames: int = self.kwargs["metadata"]["num_frames"]
        self.canonical_frame: int = self.kwargs["metadata"]["canonical_frame"]
        small = self.is_small
        canonical_time = self.canonical_frame / max(self.num_frames - 1, 1)
        self.field = SpaceTimeField(replace(field_config(small), canonical_time=canonical_time))
        self.occupancy = OccupancyGrid(self.num_frames)
        self._pictures_without_time = 0

    @property
    def is_small(self) -> bool:
        """Whether the field is the one for a CPU."""
        return self.config.field_size != "reference"

    def render_settings(self) -> "RenderSettings":
        """How training renders."""
        from sv4d_ns.distillation.rendering import RenderSettings

        samples, rays = (128, 1 << 17) if self.is_small else (256, 1 << 14)
        config = self.config
        return RenderSettings(config.train_samples or samples, config.chunk_rays or rays, config.orientation_samples)

    def frame_window(self, step: int) -> "Window":
        """All frames."""
        from sv4d_ns.fitting.schedule import Window

        return Window(0, self.num_frames - 1)

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """The field's parameters in groups, each with a learning rate of its own."""
        return self.field.parameter_groups()

    def _before_step(self, step: int) -> None:
        if step % self.config.occupancy_every == 0:
            self.occupancy.update(self.field, step // self.config.occupancy_every % self.num_frames)

    def carve(self, grid: "ViewGrid") -> None:
        """Bound the object by the silhouettes of a grid; those of an input whose camera is a guess do not count."""
        from sv4d_ns.fitting.train_views import hull_views, train_views
        from sv4d_ns.synthesis.fourdm import KNOWN_POSE

        if not self.config.carve:
            return
        views = train_views(grid, self.device, self.kwargs["metadata"].get("leave_out", True))
        self.occupancy.carve(hull_views(views if grid.provenance.get(KNOWN_POSE, True) else views[1:]))

    def get_outputs(self, ray_bundle: RayBundle | Cameras) -> dict[str, Any]:
        """Render rays on white: rgb, accumulation, depth (world units) and normals in [0, 1]."""
        outputs = super().get_outputs(ray_bundle)
        outputs.pop("motion", None)  # the field does not say which point goes where
        return outputs

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The losses are the pipeline's (`objective.Objective`): they need whole pictures."""
        raise NotImplementedError("the pipeline makes the losses of 4diffusion")


def field_config(small: bool) -> Any:
    """`SpaceTimeFieldConfig` for this package's world: the object's box, the density blob of the reference's frame."""
    from dataclasses import replace

    from sv4d_ns.diffusion.fourdm.frame import WORLD_SCALE
    from sv4d_ns.field.space_time import SpaceTimeFieldConfig
    from sv4d_ns.geometry.cameras import OBJECT_BOX

    reference = SpaceTimeFieldConfig().scaled(WORLD_SCALE)
    config = replace(reference, half_extent=OBJECT_BOX)
    if small:
        config = replace(
            config, levels=8, log2_table_size=16, base_resolution=8, growth=(128 / 8) ** (1 / 7), hidden_width=32
        )
    return config
