"""What both methods' nerfstudio models are: a field of one clip, its empty-space grid, and pictures of them.

Only configuration is imported at the top; nerfstudio imports this file for every ns-* command.
"""

from abc import abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.models.base_model import Model, ModelConfig
from torch import Tensor
from torch.nn import Parameter

from sv4d_ns.plugin.help import without_flags

if TYPE_CHECKING:
    from sv4d_ns.field.volume_rendering import RenderOutput
    from sv4d_ns.fitting.schedule import Window
    from sv4d_ns.fitting.train_views import TrainView
    from sv4d_ns.plugin.render_outputs import GridVisibility
    from sv4d_ns.views.grid import ViewGrid

DYNAMIC_VIDEO_FPS = 24.0
"""Frame rate ns-render writes; cameras without a time advance by one such frame from picture to picture."""


@without_flags("collider_params", "loss_coefficients")
@dataclass
class FieldModelConfig(ModelConfig):
    """How a field is rendered, whatever it is fitted to."""

    _target: type = field(default_factory=lambda: FieldModel)
    enable_collider: bool = False
    """Rays are cut at the object's box, so nerfstudio's near and far planes are not used."""
    eval_num_rays_per_chunk: int = 16384
    """Rays rendered at once outside training."""
    train_samples: int = 128
    """Steps along the box's diagonal in training; only those in occupied space are evaluated."""
    render_samples: int = 192
    """The same for pictures."""
    occupancy_every: int = 2
    """Training steps between updates of the occupancy grid (one moment each)."""


class FieldModel(Model):
    """Renders a field of one clip; the occupancy grid keeps one moment for every frame."""

    config: FieldModelConfig
    field: Any
    occupancy: Any
    clip_duration: float = 1.0
    """Seconds the clip lasts; set by the pipeline, used to play cameras that have no time."""
    views: "GridVisibility | None" = None
    """What the field was fitted to, for the pictures that compare with it; set by the pipeline."""
    shown_channels: Callable[[], set[str]] | None = None
    """Channels a picture is to be made with at once, set by the viewer; others are made when they are asked for."""

    def populate_modules(self) -> None:
        """Make the field and the occupancy grid."""
        super().populate_modules()
        # subnormal second moments of rarely touched grid entries would slow Adam down
        torch.set_flush_denormal(True)
        self.num_frames: int = self.kwargs["metadata"]["num_frames"]
        self.canonical_frame: int = self.kwargs["metadata"]["canonical_frame"]
        self.field, self.occupancy = self.make_field()
        self._pictures_without_time = 0

    @abstractmethod
    def make_field(self) -> tuple[Any, Any]:
        """A field at its start and its occupancy grid."""

    @abstractmethod
    def before_step(self, step: int) -> None:
        """Bring schedules and occupancy grid to a training step."""

    @abstractmethod
    def frame_window(self, step: int) -> "Window":
        """Frames in use at a training step."""

    @abstractmethod
    def carve(self, grid: "ViewGrid") -> None:
        """Bound the object by the visual hull of a grid's silhouettes."""

    @property
    def samples(self) -> int:
        """Steps along the box's diagonal in training."""
        return self.config.train_samples

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """The field's parameters in groups, each with a learning rate of its own."""
        return self.field.parameter_groups()

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Advance schedules and occupancy grid before every step."""
        return [TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], self.before_step)]

    def views_to_fit(self, grid: "ViewGrid") -> "list[TrainView]":
        """The views of a grid that the field is fitted to, on this model's device."""
        from sv4d_ns.fitting.train_views import train_views

        return train_views(grid, self.device, self.kwargs["metadata"].get("leave_out", True))

    def get_outputs(self, ray_bundle: RayBundle | Cameras) -> dict[str, Any]:
        """Render rays.

        In training: `rendered`, what `render_rays` gives for rays of the batch sampler. Else, on white: rgb,
        accumulation, depth (world units), normals in [0, 1] and, of a field that tells, motion (world units); rays
        without a time are rendered at the first frame.
        """
        assert isinstance(ray_bundle, RayBundle)
        if self.training:
            return {"rendered": self._render_training_rays(ray_bundle)}
        return self._render_picture(ray_bundle)

    def _render_picture(self, ray_bundle: RayBundle) -> dict[str, Any]:
        from sv4d_ns.field.visibility import surface_normals
        from sv4d_ns.plugin.render_outputs import flat_rays, render_flat

        shape = ray_bundle.origins.shape[:-1]
        rays = flat_rays(ray_bundle)
        out = render_flat(self, rays)
        points = rays.origins + out["depth"][:, None] * rays.directions
        normals = surface_normals(self.field, points, out["alpha"], rays.times)
        outputs = {
            "rgb": out["rgb"],
            "accumulation": out["alpha"][:, None],
            "depth": out["depth"][:, None],
            "normals": 0.5 + 0.5 * normals,
            "motion": out["motion"][:, None],
        }
        return {name: value.reshape(*shape, -1) for name, value in outputs.items()}

    def _render_training_rays(self, ray_bundle: RayBundle) -> "RenderOutput":
        from sv4d_ns.field.volume_rendering import render_rays

        assert ray_bundle.times is not None
        moments: Any = ray_bundle.metadata["moments"]
        return render_rays(
            self.field,
            self.occupancy,
            ray_bundle.origins,
            ray_bundle.directions,
            ray_bundle.times,
            self.samples,
            background=ray_bundle.metadata["background"],
            jitter=ray_bundle.metadata["jitter"][:, 0],
            moments=moments,
        )

    @torch.no_grad()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> Any:
        """One picture, its channels by name (`render_outputs.camera_channels`).

        Only what lies in `obb_box` is shown. Cameras without a time are played: each is one 24th of a second after the
        last, in a loop. nerfstudio's
        `ns-render interpolate` and camera paths saved without `render_time` make such cameras.
        """
        from sv4d_ns.plugin.render_outputs import camera_channels

        if camera.times is None:
            elapsed = self._pictures_without_time / DYNAMIC_VIDEO_FPS
            self._pictures_without_time += 1
            time = elapsed % self.clip_duration / self.clip_duration
            camera = copy(camera)  # the caller's keeps to be one without a time
            camera.times = torch.full_like(camera.fx[..., :1], time)
        rays = camera.generate_rays(camera_indices=0, keep_shape=True, obb_box=obb_box)
        outputs = camera_channels(self, rays.to(self.device))
        for name in self.shown_channels() if self.shown_channels is not None else ():
            if name in outputs:
                outputs[name]
        return outputs

    def get_rgba_image(self, outputs: dict[str, Tensor], output_name: str = "rgb") -> Tensor:
        """Straight-alpha RGBA of a rendered picture (nerfstudio's own assumes a black background)."""
        from nerfstudio.model_components import renderers

        alpha = outputs["accumulation"].clamp(0, 1)
        behind = renderers.BACKGROUND_COLOR_OVERRIDE
        background = alpha.new_ones(3) if behind is None else behind.to(alpha)
        colour = (outputs[output_name] - (1 - alpha) * background) / alpha.clamp(min=1e-3)
        return torch.cat([torch.where(alpha > 2e-3, colour.clamp(0, 1), torch.ones_like(colour)), alpha], -1)

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        """PSNR of a training step's rays."""
        error = (outputs["rendered"].rgb - batch["batch"].rgb).square().mean()
        return {"psnr": -10 * error.clamp(min=1e-10).log10()}

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """PSNR, SSIM and LPIPS of a picture against an image of the grid, both on white, and the pair side by side.

        The input view's images are real; all others are the diffusion model's, so this measures the fit, not truth.
        """
        from sv4d_ns.evaluation.scores import nerfstudio_metrics

        truth, made = batch["image"].to(self.device)[..., :3], outputs["rgb"]
        metrics = nerfstudio_metrics(made, truth)
        images = {"img": torch.cat([truth, made], dim=1), "accumulation": outputs["accumulation"]}
        return metrics, images
