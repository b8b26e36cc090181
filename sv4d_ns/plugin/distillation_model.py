"""The nerfstudio model of 4Diffusion: the space-time field and its empty-space grid.

Only configuration is imported at the top; nerfstudio imports this file for every ns-* command.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from sv4d_ns.plugin.base_model import FieldModel, FieldModelConfig

if TYPE_CHECKING:
    from sv4d_ns.distillation.rendering import RenderSettings
    from sv4d_ns.fitting.schedule import Window
    from sv4d_ns.views.grid import ViewGrid


@dataclass
class FourDiffusionModelConfig(FieldModelConfig):
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


class FourDiffusionModel(FieldModel):
    """Renders the space-time field."""

    config: FourDiffusionModelConfig

    def make_field(self) -> tuple[Any, Any]:
        """A space-time field and a moment of occupancy for every frame."""
        from dataclasses import replace

        from sv4d_ns.field.occupancy import OccupancyGrid
        from sv4d_ns.field.space_time import SpaceTimeField

        canonical_time = self.canonical_frame / max(self.num_frames - 1, 1)
        field = SpaceTimeField(replace(field_config(self.is_small), canonical_time=canonical_time))
        return field, OccupancyGrid(self.num_frames)

    @property
    def is_small(self) -> bool:
        """Whether the field is the one for a CPU."""
        return self.config.field_size != "reference"

    def render_settings(self) -> "RenderSettings":
        """How training renders."""
        from sv4d_ns.distillation.rendering import RenderSettings

        rays = self.config.chunk_rays or (1 << 17 if self.is_small else 1 << 14)
        return RenderSettings(self.samples, rays, self.config.orientation_samples)

    @property
    def samples(self) -> int:
        """Steps along the box's diagonal in training, of the warm-up's rays and of distillation's pictures."""
        return self.config.train_samples or (128 if self.is_small else 256)

    def frame_window(self, step: int) -> "Window":
        """All frames."""
        from sv4d_ns.fitting.schedule import Window

        return Window.whole(self.num_frames)

    def before_step(self, step: int) -> None:
        """Look at one more moment of the empty space."""
        if step % self.config.occupancy_every == 0:
            self.occupancy.update(self.field, step // self.config.occupancy_every % self.num_frames)

    def carve(self, grid: "ViewGrid") -> None:
        """Bound the object by the silhouettes of a grid; those of an input whose camera is a guess do not count."""
        from sv4d_ns.fitting.train_views import hull_views
        from sv4d_ns.synthesis.fourdm import KNOWN_POSE

        if not self.config.carve:
            return
        views = self.views_to_fit(grid)
        self.occupancy.carve(hull_views(views if grid.provenance.get(KNOWN_POSE, True) else views[1:]))

    def _render_picture(self, ray_bundle: RayBundle) -> dict[str, Any]:
        outputs = super()._render_picture(ray_bundle)
        outputs.pop("motion")  # the field does not say which point goes where
        return outputs

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The losses of the warm-up, which fits the views' rays; distillation's are `objective.Objective`'s, which
        renders whole pictures of this field."""
        from sv4d_ns.distillation.warm_start import view_losses

        return view_losses(outputs["rendered"], batch["batch"])


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
