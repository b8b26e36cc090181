"""The multi-view video models that 4D score distillation can ask what it should be seeing.

`ViewPrior` is all the objective knows of them: latents of renders in, the latents the model would rather see out.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sv4d_ns.diffusion.fourdm import conditioning as fourdm
from sv4d_ns.diffusion.fourdm import guidance
from sv4d_ns.diffusion.fourdm.frame import DISTANCE, FIELD_OF_VIEW, WORLD_SCALE
from sv4d_ns.diffusion.sv4d.conditioning import GridCondition, camera_angles, camera_vectors, embed_images
from sv4d_ns.diffusion.sv4d.guidance import Guidance, guide
from sv4d_ns.diffusion.sv4d.preconditioning import denoised, scaled
from sv4d_ns.distillation.cameras import DrawnViews
from sv4d_ns.distillation.schedules import ONE_STEP_NOISE, REFERENCE_NOISE, NoiseLevels
from sv4d_ns.utils.devices import upload

if TYPE_CHECKING:
    from sv4d_ns.diffusion.bundled.pipeline import BundledVideoPipeline
    from sv4d_ns.diffusion.fourdm.pipeline import FourDMPipeline
    from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline

CONDITION_CHUNK = 8
"""Input frames that are encoded at once."""
WINDOW_FRAMES = 8
"""Frames the bundled model is asked for at once."""


class ViewPrior(Protocol):
    """A model of what V views of f frames of an object look like, given its video."""

    num_frames: int
    """Of a window."""
    image_size: int
    """Pixels along the side of the pictures it knows."""
    channels: int
    """3: RGB on white; 4: and alpha."""
    radius: float
    """Of the cameras of the pictures it knows, world units."""
    fov_deg: float
    base_elevation_deg: float
    """Elevation in this package's world of what the model takes for the horizon."""
    highest_elevation_deg: float
    """Views are drawn at elevations up to this above the base."""
    noise: NoiseLevels
    """At which it is asked."""

    def encode(self, images: Float[Tensor, "n c s s"], generator: torch.Generator) -> Float[Tensor, "n d i j"]:
        """Latents of images in [0, 1], with gradient."""
        ...

    def target(
        self,
        latents: Float[Tensor, "fv d i j"],
        frames: Sequence[int],
        views: DrawnViews,
        noise_step: int,
        generator: torch.Generator,
    ) -> Float[Tensor, "fv d i j"]:
        """What the model sees behind the noised latents, in (f v) order; without gradient.

        Args:
            frames: numbers of the f frames in the video.
            views: their cameras in this package's world (azimuths relative to the input view).
            noise_step: 0..999, how much noise, on the schedule of `guidance.alphas_cumprod`.
            generator: of the noise, on the CPU.
        """
        ...


def unit_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise drawn on the CPU, so that it is the same on every device."""
    return upload(torch.randn(like.shape, generator=generator), like.device)


class FourDMPrior:
    """4DM. Its views are placed around the object's own front, `front_deg` from the input camera.

    The conditions of all frames are encoded once; the text and the image encoder are not kept.

    Args:
        pipeline: the model.
        frames: the matted input frames.
        prompt: may be empty.
        front_deg: azimuth of 4DM's front view relative to this package's input view.
    """

    channels = 3
    radius, fov_deg = DISTANCE * WORLD_SCALE, FIELD_OF_VIEW
    base_elevation_deg, highest_elevation_deg = 0.0, 5.0
    noise = REFERENCE_NOISE

    def __init__(
        self, pipeline: "FourDMPipeline", frames: UInt8[np.ndarray, "t s s 4"], prompt: str, front_deg: float
    ) -> None:
        self.front_deg = front_deg
        self.num_frames, self.image_size = pipeline.config.num_frames, pipeline.config.image_size
        parts = [
            pipeline.encode_frames(frames[start : start + CONDITION_CHUNK])
            for start in range(0, len(frames), CONDITION_CHUNK)
        ]
        self.condition = fourdm.FourDMCondition(
            text=pipeline.encode_prompt(prompt),
            negative_text=pipeline.encode_prompt(fourdm.NEGATIVE_PROMPT),
            image_tokens=torch.cat([tokens for tokens, _, _ in parts]),
            no_image_tokens=parts[0][1],
            image_latents=torch.cat([latents for _, _, latents in parts]),
        )
        # constant from here on, and as large as the network in half precision: whoever made the pipeline may drop it
        self.pipeline = copy(pipeline)
        self.pipeline.image_encoder = self.pipeline.text_encoder = None
        self.alphas = guidance.alphas_cumprod()

    def encode(self, images: Float[Tensor, "n c s s"], generator: torch.Generator) -> Float[Tensor, "n d i j"]:
        """A sample of the autoencoder's posterior, as in the reference."""
        return self.pipeline.encode_images(images, generator)

    def target(
        self,
        latents: Float[Tensor, "fv d i j"],
        frames: Sequence[int],
        views: DrawnViews,
        noise_step: int,
        generator: torch.Generator,
    ) -> Float[Tensor, "fv d i j"]:
        """x0 with guidance 5 and a fifth of the added contrast taken back (see `guidance`)."""
        from sv4d_ns.diffusion.fourdm.pipeline import view_cameras

        latents = latents.detach()
        azimuths = [azimuth - self.front_deg for azimuth in views.azimuths_deg]
        cameras = fourdm.flat_cameras(view_cameras(azimuths, views.elevation_deg)).to(latents.device)
        rows = fourdm.network_rows(self.condition.frames(list(frames)), cameras)
        alpha = float(self.alphas[noise_step])
        noisy = guidance.add_noise(latents, unit_noise(latents, generator), alpha)
        return guidance.reconstruction_target(
            noisy, *guidance.predict_noise(self.pipeline.unet, noisy, noise_step, rows), alpha
        )


class _SigmaPrior:
    """A model in 4DM's place that was trained for the noise process x + sigma n, whose sigma is read off 4DM's schedule
    at the same ratio of signal and noise. It knows cameras relative to the input's."""

    def __init__(
        self, frames: UInt8[np.ndarray, "t s s 4"], size: int, radius: float, fov_deg: float, input_elevation_deg: float
    ) -> None:
        from sv4d_ns.utils.images import resize_rgba

        self.frames, self.image_size = resize_rgba(frames, size), size
        self.radius, self.fov_deg, self.base_elevation_deg = radius, fov_deg, input_elevation_deg
        self.alphas = guidance.alphas_cumprod()

    @torch.no_grad()
    def target(
        self,
        latents: Float[Tensor, "fv d i j"],
        frames: Sequence[int],
        views: DrawnViews,
        noise_step: int,
        generator: torch.Generator,
    ) -> Float[Tensor, "fv d i j"]:
        """The denoised latents."""
        alpha = float(self.alphas[noise_step])
        sigma = ((1 - alpha) / alpha) ** 0.5
        noisy = latents.detach() + sigma * unit_noise(latents, generator)
        return self._denoise(noisy, sigma, list(frames), views.raised(-self.base_elevation_deg))

    def _denoise(self, noisy: Tensor, sigma: float, frames: list[int], views: DrawnViews) -> Tensor:
        """What the model sees behind noisy latents; the cameras are relative to the input's."""
        raise NotImplementedError


class SV4DPrior(_SigmaPrior):
    """An SV4D model: joint views and frames of a video, with the guidance it samples with.

    Args:
        pipeline: the model.
        frames: the matted input frames, at the model's size.
        radius, fov_deg: cameras it was trained with.
        input_elevation_deg: of the input view; the model knows elevations relative to it.
    """

    highest_elevation_deg = 10.0

    def __init__(
        self,
        pipeline: "StableVideo4D2Pipeline",
        frames: UInt8[np.ndarray, "t s s 4"],
        radius: float,
        fov_deg: float,
        input_elevation_deg: float,
    ) -> None:
        from sv4d_ns.synthesis.base import to_model_space

        config: Any = pipeline.config
        super().__init__(frames, config.image_size, radius, fov_deg, input_elevation_deg)
        self.pipeline, self.num_frames = pipeline, config.num_frames
        self.channels = pipeline.vae.config.in_channels
        self.noise = ONE_STEP_NOISE if config.num_inference_steps == 1 else REFERENCE_NOISE
        video = to_model_space(self.frames, self.channels).to(pipeline.device)
        with torch.no_grad():
            self.embeddings = embed_images(pipeline.image_encoder, video * 2 - 1)
            self.video_latents = pipeline.encode_images(video) * config.conditioning_scaling_factor

    def encode(self, images: Float[Tensor, "n c s s"], generator: torch.Generator) -> Float[Tensor, "n d i j"]:
        """Latents; this autoencoder is deterministic."""
        vae = self.pipeline.vae
        latents = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
        return latents * vae.config.scaling_factor

    def _denoise(self, noisy: Tensor, sigma: float, frames: list[int], views: DrawnViews) -> Tensor:
        # the network was trained on views in ascending azimuth, and has convolutions along them
        order = np.argsort(np.asarray(views.azimuths_deg) % 360)
        ordered = replace(views, azimuths_deg=tuple(views.azimuths_deg[view] for view in order))
        count = len(order)
        seen = scaled(noisy.unflatten(0, (-1, count))[:, order].flatten(0, 1), sigma)
        output = self._guided(seen, sigma, self._condition(frames, ordered), len(frames), count)
        return denoised(seen, output, sigma).unflatten(0, (-1, count))[:, np.argsort(order)].flatten(0, 1)

    def _guided(self, seen: Tensor, sigma: float, condition: GridCondition, frames: int, views: int) -> Tensor:
        """The network's output, guided as when the model samples."""
        guidance = Guidance.from_config(self.pipeline.config.guidance)
        batch = condition.with_unconditional() if guidance.needs_unconditional else condition
        given = seen.to(self.pipeline.unet.dtype)
        output = self.pipeline.unet(
            torch.cat([given.repeat(len(batch.latents) // len(given), 1, 1, 1), batch.latents], 1),
            0.25 * float(np.log(sigma)),
            batch.embeddings,
            batch.cameras,
            batch.references,
            return_dict=False,
        )[0].float()
        if not guidance.needs_unconditional:
            return output
        unconditional, conditional = output.chunk(2)
        return guide(unconditional, conditional, guidance.scales(frames, views).flatten().to(output.device))

    def _condition(self, frames: list[int], views: DrawnViews) -> GridCondition:
        count = len(views.azimuths_deg)
        polar, azimuth = camera_angles(views.azimuths_deg, (views.elevation_deg,) * count)
        config: Any = self.pipeline.config
        cameras = camera_vectors(polar, azimuth, config.conditioning_sigma, config.camera_dims)
        latents = self.video_latents[frames]
        condition = GridCondition(
            embeddings=self.embeddings[frames][None],
            latents=latents.repeat_interleave(count, 0),
            cameras=cameras.repeat(len(frames), 1),
            references=torch.zeros_like(latents[:1]).repeat(count, 1, 1, 1),
            sigma_dims=config.camera_dims[0],
        )
        return condition.to(latents.device, self.pipeline.unet.dtype)


class BundledPrior(_SigmaPrior):
    """The bundled model: its latents are pictures, its answers renders of one volume a moment.
    Arguments as of
       `SV4DPrior`."""

    channels, highest_elevation_deg = 4, 30.0
    num_frames, noise = WINDOW_FRAMES, ONE_STEP_NOISE

    def __init__(
        self,
        pipeline: "BundledVideoPipeline",
        frames: UInt8[np.ndarray, "t s s 4"],
        radius: float,
        fov_deg: float,
        input_elevation_deg: float,
    ) -> None:
        super().__init__(frames, pipeline.denoiser.config.image_size, radius, fov_deg, input_elevation_deg)
        self.pipeline = pipeline

    def encode(self, images: Float[Tensor, "n c s s"], generator: torch.Generator) -> Float[Tensor, "n c s s"]:
        """Pictures in [-1, 1]."""
        return images * 2 - 1

    def _denoise(self, noisy: Tensor, sigma: float, frames: list[int], views: DrawnViews) -> Tensor:
        """Renders of the volumes that the model predicts from the noised pictures."""
        count = len(views.azimuths_deg)
        pictures = self.pipeline.denoise_views(
            self.frames[frames], noisy.unflatten(0, (-1, count)), sigma,
            views.azimuths_deg, (views.elevation_deg,) * count, self.base_elevation_deg,
            radius=self.radius, fov_deg=self.fov_deg,
        )  # fmt: skip
        return pictures.flatten(0, 1)
