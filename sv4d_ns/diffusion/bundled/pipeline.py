"""The bundled model as a diffusers pipeline: a video of one view in, any views at all moments out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sv4d_ns.diffusion.bundled.completing import completed
from sv4d_ns.diffusion.bundled.frustum import Frustum, pixel_directions, relative_poses
from sv4d_ns.diffusion.bundled.network import TIME_REACH, VolumeDenoiser
from sv4d_ns.diffusion.bundled.pictures import continued, premultiplied
from sv4d_ns.diffusion.bundled.recolouring import in_colours_of_the_input
from sv4d_ns.diffusion.bundled.rendering import Volume, render_rays
from sv4d_ns.geometry.cameras import CAMERA_RADIUS, FIELD_OF_VIEW_DEG, look_at_cameras
from sv4d_ns.utils.devices import upload

STATE_AZIMUTHS = (72.0, 144.0, 216.0, 288.0)
"""Cameras of the noised views, relative to the input; which pictures are asked for in the end does not matter."""
FRAMES_AT_ONCE = 46
"""Frames that go through the network at once, those that its attention only looks at counted."""


@dataclass
class BundledPipelineOutput(BaseOutput):
    """What the pipeline made.

    Attributes:
        frames: RGBA pictures, [t][v] as PIL images, or [t, v, h, w, 4] (np) or [t, v, 4, h, w] (pt) in [0, 1],
            straight alpha.
        volumes: what they are renders of, one moment after the other, in the input camera's frustum.
    """

    frames: Any
    volumes: Volume


class BundledVideoPipeline(DiffusionPipeline):
    """Multi-view video by denoising volumes.

    Sampling is that of multistep consistency models (arXiv 2303.01469, algorithm 1): the network predicts a clean
    volume from noised views, its pictures are noised again to a lower level, and so on. One step gives the mean of all
    plausible volumes, several give one of them. The noise is the same in all frames.

    Args:
        denoiser: the network.
        num_inference_steps: of a call that names none.
        sigma_max: first noise level, under which views say nothing.
        sigma_min: last noise level, from two steps on.
    """

    model_cpu_offload_seq: Any = "denoiser"
    _callback_tensor_inputs = ("views",)

    # set by register_modules and register_to_config; untyped because diffusers adds their attributes at run time
    denoiser: Any
    config: Any

    def __init__(
        self,
        denoiser: VolumeDenoiser,
        num_inference_steps: int = 3,
        sigma_max: float = 40.0,
        sigma_min: float = 1.5,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser)
        self.register_to_config(num_inference_steps=num_inference_steps, sigma_max=sigma_max, sigma_min=sigma_min)

    def sigmas(self, num_inference_steps: int, strength: float = 1.0) -> list[float]:
        """Noise levels of the steps, falling geometrically from `strength` of sigma_max's logarithmic range."""
        low, high = self.config.sigma_min, self.config.sigma_max
        first = float(low * (high / low) ** strength)
        return list(np.geomspace(first, min(low, first), num_inference_steps)) if num_inference_steps > 1 else [first]

    @torch.no_grad()
    def __call__(
        self,
        video: UInt8[np.ndarray, "t p p 4"] | Sequence[Image.Image],
        azimuths_deg: Sequence[float],
        elevations_deg: Sequence[float],
        input_elevation_deg: float = 0.0,
        *,
        size: int | None = None,
        radius: float = CAMERA_RADIUS,
        fov_deg: float = FIELD_OF_VIEW_DEG,
        num_inference_steps: int | None = None,
        initial_views: UInt8[np.ndarray, "t v p p 4"] | None = None,
        strength: float = 1.0,
        recolour: bool = True,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("views",),
    ) -> "BundledPipelineOutput | tuple[Any, Volume]":
        """Views of a video.

        Args:
            video: square frames with straight alpha, 8 bit or PIL; their own size is that of the colours taken from
                them.
            azimuths_deg: of the views asked for, relative to the input view.
            elevations_deg: likewise.
            input_elevation_deg: of the input view above the horizon.
            size: pixels per side of the views; the network's by default.
            radius: distance of all cameras from the middle of the scene, world units.
            fov_deg: of all cameras.
            num_inference_steps: noise levels; the pipeline's by default.
            initial_views: pictures from the cameras asked for that noise is added to (SDEdit); None starts from noise.
            strength: how much noise is added to them, as a share of the logarithmic range, (0, 1].
            recolour: show hidden sides in the colours that the input shows (`in_colours_of_the_input`), not as the
                network paints them.
            generator: of the noise.
            output_type: "np", "pt", "pil", or "latent" for the volumes alone.
            return_dict: a `BundledPipelineOutput`, else a tuple.
            callback_on_step_end: called as `f(pipeline, step, sigma, tensors)`; the tensors it returns go on.
            callback_on_step_end_tensor_inputs: which tensors it is given.

        Raises:
            ValueError: the inputs do not fit together.
        """
        frames = _as_array(video)
        self.check_inputs(frames, azimuths_deg, elevations_deg, initial_views, strength, output_type)
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` may only name {self._callback_tensor_inputs}.")
        device = self._execution_device
        frustum = Frustum(radius, fov_deg)
        elevations = input_elevation_deg + np.array([0.0, *elevations_deg])
        c2w = look_at_cameras(np.array([0.0, *azimuths_deg]), elevations, radius)
        asked = _poses(c2w[1:], c2w[0])
        state_poses = asked if initial_views is not None else self._state_poses(input_elevation_deg, frustum, c2w)
        side = self.denoiser.config.image_size
        small = upload(_resized(premultiplied(frames), side), device)
        image = upload(continued(frames), device).movedim(-1, 1)
        views = torch.zeros(len(frames), len(state_poses), 4, side, side, device=device)
        if initial_views is not None:
            views = to_diffusion_space(upload(_resized(premultiplied(initial_views), side), device))
        sigmas = self.sigmas(num_inference_steps or self.config.num_inference_steps, strength)
        for step, sigma in enumerate(self.progress_bar(sigmas)):
            noise = upload(torch.randn(views.shape[1:], generator=generator), device)
            volumes = self._denoise(
                small, image, input_elevation_deg, views + sigma * noise, sigma, state_poses, frustum
            )
            if step + 1 < len(sigmas):
                views = to_diffusion_space(render_views(volumes, state_poses, side, frustum))
            if callback_on_step_end is not None:
                tensors = {"views": views} if "views" in callback_on_step_end_tensor_inputs else {}
                views = callback_on_step_end(self, step, sigma, tensors).get("views", views)
        if recolour:
            volumes = in_colours_of_the_input(volumes, frustum)
        made = None if output_type == "latent" else self._pictures(volumes, asked, size or side, frustum, output_type)
        self.maybe_free_model_hooks()
        return BundledPipelineOutput(frames=made, volumes=volumes) if return_dict else (made, volumes)

    @torch.no_grad()
    def denoise_views(
        self,
        video: UInt8[np.ndarray, "t p p 4"],
        noised: Float[Tensor, "t v 4 s s"],
        sigma: float,
        azimuths_deg: Sequence[float],
        elevations_deg: Sequence[float],
        input_elevation_deg: float = 0.0,
        *,
        radius: float = CAMERA_RADIUS,
        fov_deg: float = FIELD_OF_VIEW_DEG,
    ) -> Float[Tensor, "t v 4 s s"]:
        """The clean views (RGB on white and alpha in [-1, 1]) predicted from noised ones at one noise level.

        Hidden sides are recoloured. Args as in a call; `noised` are views in that space plus noise of standard
        deviation `sigma`.
        """
        frustum, device = Frustum(radius, fov_deg), self._execution_device
        elevations = input_elevation_deg + np.array([0.0, *elevations_deg])
        c2w = look_at_cameras(np.array([0.0, *azimuths_deg]), elevations, radius)
        poses = _poses(c2w[1:], c2w[0])
        side = self.denoiser.config.image_size
        frames = upload(_resized(premultiplied(video), side), device)
        image = upload(continued(video), device).movedim(-1, 1)
        volumes = self._denoise(frames, image, input_elevation_deg, upload(noised, device), sigma, poses, frustum)
        volumes = in_colours_of_the_input(volumes, frustum)
        return to_diffusion_space(render_views(volumes, poses, side, frustum))

    def check_inputs(
        self,
        frames: np.ndarray,
        azimuths_deg: Sequence[float],
        elevations_deg: Sequence[float],
        initial_views: np.ndarray | None,
        strength: float,
        output_type: str,
    ) -> None:
        """Raise ValueError for inputs that do not fit together."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 4 or frames.shape[1] != frames.shape[2]:
            raise ValueError(f"`video` must be square 8-bit RGBA frames, not {frames.dtype} of shape {frames.shape}.")
        if len(azimuths_deg) != len(elevations_deg) or not azimuths_deg:
            raise ValueError("`azimuths_deg` and `elevations_deg` must be of the same length, at least 1.")
        if initial_views is not None and initial_views.shape[:2] != (len(frames), len(azimuths_deg)):
            raise ValueError(
                f"`initial_views` must hold {len(frames)} frames of {len(azimuths_deg)} views, not "
                f"{initial_views.shape[:2]}."
            )
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must be above 0 and at most 1, not {strength}.")
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"`output_type` must be np, pt, pil or latent, not {output_type}.")

    def _state_poses(
        self, input_elevation_deg: float, frustum: Frustum, c2w: Float[np.ndarray, "v+1 4 4"]
    ) -> Float[Tensor, "n 4 4"]:
        elevations = np.full(len(STATE_AZIMUTHS), input_elevation_deg)
        state = look_at_cameras(np.array(STATE_AZIMUTHS), elevations, frustum.radius)
        return _poses(state, c2w[0])

    def _denoise(
        self,
        frames: Float[Tensor, "t 4 s s"],
        image: Float[Tensor, "t 3 p p"],
        elevation_deg: float,
        noised: Float[Tensor, "t v 4 s s"],
        sigma: float,
        poses: Float[Tensor, "v 4 4"],
        frustum: Frustum,
    ) -> Volume:
        """The volumes predicted from noised views, completed to the input's silhouettes, in windows as wide as
        attention along time reaches: a window's outer frames are only looked at, so a clip that fits into one is not
        cut."""
        told = torch.full((1,), elevation_deg, device=frames.device)
        levels = torch.full((1, noised.shape[1]), sigma, device=frames.device)
        to_camera = upload(torch.linalg.inv(poses), frames.device)[None]
        reach = TIME_REACH * len(self.denoiser.blocks)
        moments = len(frames) if len(frames) <= FRAMES_AT_ONCE else max(FRAMES_AT_ONCE - 2 * reach, 1)
        parts = []
        for first in range(0, len(frames), moments):
            last = min(first + moments, len(frames))
            begin, end = max(first - reach, 0), min(last + reach, len(frames))
            with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.denoiser.dtype == torch.float32):
                logits = self.denoiser(
                    frames[None, begin:end], told, torch.ones_like(told), noised[None, begin:end], levels,
                    torch.ones_like(levels, dtype=torch.bool), to_camera, frustum,
                )  # fmt: skip
            volume = self.denoiser.volume(logits, image[begin:end])
            parts.append(completed(volume[first - begin : last - begin], frames[first:last, 3], frustum))
        return Volume.join(parts)

    def _pictures(
        self, volumes: Volume, poses: Float[Tensor, "v 4 4"], size: int, frustum: Frustum, output_type: str
    ) -> Any:
        rgba = torch.stack([straight(moment) for moment in render_views(volumes, poses, size, frustum)])
        if output_type == "pt":
            return rgba.cpu()
        array = rgba.movedim(2, -1).cpu().numpy()
        if output_type == "np":
            return array
        return [[Image.fromarray((view * 255).round().astype(np.uint8), "RGBA") for view in moment] for moment in array]


def _as_array(video: Any) -> np.ndarray:
    if isinstance(video, np.ndarray):
        return video
    return np.stack([np.asarray(frame.convert("RGBA")) for frame in video])


def _poses(c2w: Float[np.ndarray, "v 4 4"], input_c2w: Float[np.ndarray, "4 4"]) -> Float[Tensor, "v 4 4"]:
    """`relative_poses` as float32, on the CPU: a GPU would be waited for to invert them."""
    return torch.from_numpy(relative_poses(c2w, input_c2w)).float()


def _resized(rgba: Float[np.ndarray, "*batch p p 4"], size: int) -> Float[Tensor, "*batch 4 s s"]:
    """Premultiplied pictures at the network's size."""
    values = torch.from_numpy(rgba).movedim(-1, -3)
    if values.shape[-1] == size:
        return values
    flat = values.flatten(0, -4)
    small = F.interpolate(flat, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.reshape(*values.shape[:-2], size, size)


def render_views(
    volumes: Volume, poses: Float[Tensor, "v 4 4"], size: int, frustum: Frustum
) -> Float[Tensor, "n v 4 p p"]:
    """Premultiplied RGBA of every moment from cameras whose `poses` lead to the input camera's coordinates."""
    device = volumes.density.device
    rays = upload(pixel_directions(size, frustum.fov_deg).astype(np.float32), device).reshape(-1, 3)
    moments = len(volumes.density)
    views = []
    for pose in upload(poses, device):
        directions = (rays @ pose[:3, :3].T).expand(moments, -1, 3)
        origins = pose[:3, 3].expand(moments, len(rays), 3)
        views.append(render_rays(volumes, origins, directions, frustum))
    return torch.stack(views, 1).transpose(2, 3).unflatten(-1, (size, size))


def to_diffusion_space(premultiplied_rgba: Float[Tensor, "*batch 4 s s"]) -> Float[Tensor, "*batch 4 s s"]:
    """RGB on white and alpha in [-1, 1]."""
    rgb, alpha = premultiplied_rgba.split([3, 1], dim=-3)
    return torch.cat([rgb + 1.0 - alpha, alpha], dim=-3) * 2.0 - 1.0


def straight(premultiplied_rgba: Float[Tensor, "*batch 4 s s"]) -> Float[Tensor, "*batch 4 s s"]:
    """Colour divided by alpha, white where nothing is."""
    rgb, alpha = premultiplied_rgba.split([3, 1], dim=-3)
    colour = torch.where(alpha > 1e-3, rgb / alpha.clamp(min=1e-3), 1.0)
    return torch.cat([colour, alpha], dim=-3).clamp(0, 1)
