"""From one video of an object to the same moments seen from other cameras: the SV4D 2.0 sampler.

Source: Stability-AI/generative-models, `simple_video_sample_4d2.py` and `sv4d_helpers.py`; the preconditioning is that
of diffusers' EulerDiscreteScheduler with v-prediction and continuous time steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from sv4d_ns.diffusion.lora import LoraLoader
from sv4d_ns.diffusion.memory import Chunks
from sv4d_ns.diffusion.sv4d.conditioning import GridCondition, camera_angles, camera_vectors, embed_images
from sv4d_ns.diffusion.sv4d.guidance import Guidance, guide
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.utils.devices import upload
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.images import over_white

OWN_COMPONENTS = "sv4d_ns.diffusion.sv4d.small_components"
OLDER_NAMES = ("sv4d_ns.diffusion.unet", "sv4d_ns.diffusion.embedded.modules")
"""Modules that pipelines saved by earlier versions name (utils/moved.py)."""
OUTPUT_TYPES = ("pt", "np", "pil", "latent")
Generators = torch.Generator | list[torch.Generator]
# JSON types, which is what diffusers compares a saved pipeline with
RELEASED_CAMERA_DIMS = [256, 512, 512]
RELEASED_GUIDANCE = {"kind": "linear", "scale": 2.0, "min_scale": 1.0}


def released_scheduler() -> EulerDiscreteScheduler:
    """The sampler of the released models: sigma 0.002 to 700 on Karras' schedule, v-prediction, ln(sigma)/4 as time."""
    return EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        beta_schedule="scaled_linear",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )


@dataclass
class StableVideo4D2PipelineOutput(BaseOutput):
    """What a call made.

    Attributes:
        frames: [t, v, c, h, w] in [0, 1] ("pt"), [t, v, h, w, c] in [0, 1] ("np"), a list of pictures for each frame
            ("pil"), or latents [t, v, c, h, w] ("latent").
    """

    frames: Tensor | np.ndarray | list[list[PIL.Image.Image]]


class StableVideo4D2Pipeline(DiffusionPipeline, LoraLoader):
    r"""Makes V novel views of T frames of a video of one object.

    Everything that belongs to a trained model is part of the saved configuration, so that a model folder describes
    itself. The defaults are those of the released 4-view model.

    Args:
        vae: autoencoder; `config.in_channels` 3 (RGB on white) or 4 (RGB on white, and alpha).
        image_encoder: CLIP image tower, or a model with `forward(images in [-1, 1]).image_embeds`.
        unet: the network.
        scheduler: see `released_scheduler`.
        num_frames: T the model was trained for; the window length for long videos.
        num_views: V the model was trained for.
        image_size: height and width in pixels the model was trained for.
        num_inference_steps: default number of denoising steps.
        guidance: default `Guidance`, as `Guidance.to_config` gives it.
        camera_dims: sizes of the three parts of the camera vector (input noise level, polar angle, azimuth).
        conditioning_sigma: noise level the input frames' latents are said to have.
        conditioning_scaling_factor: factor of the conditioning latents (the denoised ones use the autoencoder's).

    Example:
        ```py
        >>> import torch
        >>> from sv4d_ns.diffusion_training.config import ModelConfig, SamplingConfig
        >>> from sv4d_ns.diffusion_training.starts import open_start
        >>> pipeline = open_start("scratch", ModelConfig(), SamplingConfig(), seed=0)  # an untrained small one
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> video = torch.ones(2, 4, 64, 64)  # two frames, RGB on white and alpha
        >>> video[:, :, 24:40, 28:36] = torch.tensor([0.8, 0.3, 0.1, 1.0])[:, None, None]
        >>> video[:, 3] = (video[:, 2] < 0.5).float()
        >>> generator = torch.Generator("cpu").manual_seed(0)
        >>> views = pipeline(video, azimuths_deg=[90, 180], elevations_deg=[0, 0], generator=generator).frames
        >>> tuple(views.shape)  # [t, v, c, h, w]
        (2, 2, 4, 64, 64)

        ```
    """

    model_cpu_offload_seq: Any = "image_encoder->unet->vae"
    _callback_tensor_inputs = ("latents",)

    # set by register_modules and register_to_config; untyped because diffusers adds their attributes at run time
    vae: Any
    image_encoder: Any
    unet: Any
    scheduler: Any
    config: Any

    def __init__(
        self,
        vae: ModelMixin,
        image_encoder: ModelMixin | CLIPVisionModelWithProjection,
        unet: MultiViewVideoUNet,
        scheduler: EulerDiscreteScheduler,
        num_frames: int = 12,
        num_views: int = 4,
        image_size: int = 576,
        num_inference_steps: int = 50,
        guidance: dict = RELEASED_GUIDANCE,
        camera_dims: list = RELEASED_CAMERA_DIMS,
        conditioning_sigma: float = 1e-5,
        conditioning_scaling_factor: float = 1.0,
    ):
        super().__init__()
        self._vae_chunks = Chunks("images in the autoencoder")
        self._interrupt = False
        self.register_modules(vae=vae, image_encoder=image_encoder, unet=unet, scheduler=scheduler)
        self.register_to_config(
            num_frames=num_frames,
            num_views=num_views,
            image_size=image_size,
            num_inference_steps=num_inference_steps,
            guidance=Guidance.from_config(guidance).to_config(),
            camera_dims=list(camera_dims),
            conditioning_sigma=conditioning_sigma,
            conditioning_scaling_factor=conditioning_scaling_factor,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[Any], **kwargs: Any
    ) -> "StableVideo4D2Pipeline":
        """A saved pipeline; only safetensors weights are read. Arguments as in diffusers."""
        # diffusers finds component classes only in modules that are imported already
        for module in (OWN_COMPONENTS, *OLDER_NAMES):
            import_module(module)
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_official(
        cls,
        checkpoint: str | PathLike[str] = "sv4d2.safetensors",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "StableVideo4D2Pipeline":
        """A released SV4D 2.0 file, from the hub or from disk.

        Args:
            checkpoint: "sv4d2.safetensors", "sv4d2_8views.safetensors", a local file, or a repository of the hub.
            device: where the weights go.
            dtype: of the network and the image encoder (also as `torch_dtype`); float16 by default.
            kwargs: the other arguments of `official.load_official_pipeline` and `official.open_official`
                (`filename`, `variant`, `revision`, `model`, `sha256`, ...).

        Raises:
            InputError: when the file cannot be had, is damaged, or is not one of the released ones.
        """
        from sv4d_ns.diffusion.weights.official import load_official_pipeline  # it builds on this module

        return load_official_pipeline(device, checkpoint, dtype, **kwargs)

    def steps_to_run(self, num_inference_steps: int | None = None, strength: float = 1.0) -> int:
        """How many denoising steps a call with these arguments makes; at least 1."""
        steps = num_inference_steps or self.config.num_inference_steps
        return max(1, round(steps * strength))

    @property
    def interrupt(self) -> bool:
        """Set to True (by a callback, say) to leave out the remaining denoising steps of the running call."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the running or the last call."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        video: Float[Tensor, "t c h w"] | Sequence[PIL.Image.Image],
        azimuths_deg: Sequence[float],
        elevations_deg: Sequence[float],
        reference_views: Float[Tensor, "v c h w"] | Sequence[PIL.Image.Image] | None = None,
        initial_views: Float[Tensor, "t v c h w"] | None = None,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        min_guidance_scale: float | None = None,
        max_guidance_scale: float | None = None,
        guidance: Guidance | None = None,
        generator: Generators | None = None,
        latents: Float[Tensor, "t v c h w"] | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int = 8,
        reference_known: Sequence[bool] | None = None,
    ) -> StableVideo4D2PipelineOutput | tuple[Tensor | np.ndarray | list[list[PIL.Image.Image]]]:
        """Generate the views of one window.

        Args:
            video: input frames in [0, 1]; channels as the autoencoder has them (3: RGB on white; 4: and alpha); or
                pictures, whose transparent parts are put on white.
            azimuths_deg: azimuth of each view relative to the input view, degrees.
            elevations_deg: elevation of each view relative to the input view, degrees.
            reference_views: what the views of the first frame look like, in [0, 1], where an earlier window or call
                made them.
            initial_views: images to start from, in [0, 1], for a `strength` below 1 (SDEdit).
            strength: share of the noise schedule that is run, in (0, 1]; 1 starts from pure noise (plus
                `initial_views` where given).
            num_inference_steps: steps of the whole schedule; the model's own number by default.
            min_guidance_scale: smallest scale of the guidance's shape, instead of its own.
            max_guidance_scale: largest scale, likewise.
            guidance: the model's own by default.
            generator: of the noise, or a list with one for each image in (t v) order; a CPU generator gives the same
                noise on every device.
            latents: unit noise to use instead of drawing it.
            output_type: "pt", "np", "pil" or "latent".
            return_dict: a `StableVideo4D2PipelineOutput`, or a tuple of one.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; may return a dict with
                replaced tensors, and may set `pipeline.interrupt`.
            callback_on_step_end_tensor_inputs: names of the tensors handed to the callback: "latents" [t*v, c, h, w].
            decode_chunk_size: images the autoencoder takes at once; fewer from then on where memory runs out.
            reference_known: which of the reference views are to be looked at; all by default.

        Raises:
            InputError: when an argument has the wrong shape or range.
        """
        channels = self.vae.config.in_channels
        video = _as_tensor(video, channels)
        reference_views = None if reference_views is None else _as_tensor(reference_views, channels)
        self.check_inputs(
            video, azimuths_deg, elevations_deg, reference_views, initial_views, strength, num_inference_steps,
            output_type, callback_on_step_end_tensor_inputs, decode_chunk_size, reference_known,
        )  # fmt: skip
        frames, views = len(video), len(azimuths_deg)
        guidance = guidance or Guidance.from_config(self.config.guidance)
        guidance = guidance.between(min_guidance_scale, max_guidance_scale)
        condition = self.encode_condition(
            video, azimuths_deg, elevations_deg, reference_views, decode_chunk_size, reference_known
        )
        start = None
        if initial_views is not None:
            start = self.encode_images(initial_views.flatten(0, 1), decode_chunk_size) * self.vae.config.scaling_factor
        self.maybe_free_model_hooks()  # the encoders are not needed while the network runs

        noise = self._prepare_noise(condition.latents.shape, (frames, views), generator, latents)
        result = self.denoise(
            condition,
            noise,
            guidance.scales(frames, views).flatten() if guidance.needs_unconditional else None,
            num_inference_steps or self.config.num_inference_steps,
            start=start,
            strength=strength,
            callback=callback_on_step_end,
            callback_tensors=callback_on_step_end_tensor_inputs,
        )
        if output_type != "latent":
            result = self.decode_latents(result, decode_chunk_size)
        result = result.unflatten(0, (frames, views))
        self.maybe_free_model_hooks()
        output = _as_type(result, output_type)
        return StableVideo4D2PipelineOutput(frames=output) if return_dict else (output,)

    def denoise(
        self,
        condition: GridCondition,
        noise: Float[Tensor, "tv c h w"],
        scales: Float[Tensor, "tv"] | None,
        num_inference_steps: int,
        start: Float[Tensor, "tv c h w"] | None = None,
        strength: float = 1.0,
        callback: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_tensors: Sequence[str] = ("latents",),
    ) -> Float[Tensor, "tv c h w"]:
        """Run the sampler on latents; deterministic given the noise.

        Args:
            condition: of one sample.
            noise: unit Gaussian noise, float32.
            scales: guidance scale per image, or None for the conditional prediction alone.
            num_inference_steps: steps of the whole schedule.
            start: clean latents to noise, in the scale the network denoises; None starts from noise alone.
            strength: share of the schedule to run.
            callback: `callback_on_step_end` of `__call__`.
            callback_tensors: `callback_on_step_end_tensor_inputs` of `__call__`.
        """
        device, dtype = self._execution_device, self.unet.dtype
        batch = condition if scales is None else condition.with_unconditional()
        batch = batch.to(device, dtype)
        scales = None if scales is None else scales.to(device)

        # on the CPU: on another device diffusers would wait for every single level
        self.scheduler.set_timesteps(num_inference_steps)
        begin = num_inference_steps - self.steps_to_run(num_inference_steps, strength)
        self.scheduler.set_begin_index(begin)
        if start is None:
            latents = noise * self.scheduler.init_noise_sigma
        else:
            latents = start.float() + noise * self.scheduler.sigmas[begin].to(device)

        self._interrupt = False
        self._num_timesteps = num_inference_steps - begin
        with self.progress_bar(total=self._num_timesteps) as bar:
            for step, timestep in enumerate(upload(self.scheduler.timesteps[begin:], device)):
                if self._interrupt:
                    break
                prediction = self._predict(latents, timestep, batch, scales)
                # float32 latents: the scheduler returns the type of the prediction
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
                if callback is not None:
                    given = {"latents": latents} if "latents" in callback_tensors else {}
                    latents = (callback(self, step, timestep, given) or {}).get("latents", latents)
                bar.update()
        return latents

    def _predict(
        self, latents: Float[Tensor, "tv c h w"], timestep: Tensor, batch: GridCondition, scales: Tensor | None
    ) -> Float[Tensor, "tv c h w"]:
        """The guided network output, float32."""
        scaled = self.scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
        if scales is not None:
            scaled = torch.cat([scaled, scaled])
        prediction = self.unet(
            torch.cat([scaled, batch.latents], dim=1),
            timestep,
            batch.embeddings,
            batch.cameras,
            batch.references,
            return_dict=False,
        )[0].float()
        if scales is None:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return guide(unconditional, conditional, scales)

    def encode_condition(
        self,
        video: Float[Tensor, "t c h w"],
        azimuths_deg: Sequence[float],
        elevations_deg: Sequence[float],
        reference_views: Float[Tensor, "v c h w"] | None = None,
        chunk_size: int = 8,
        reference_known: Sequence[bool] | None = None,
    ) -> GridCondition:
        """Everything the network is told about one window; arguments as in `__call__`."""
        frames, views = len(video), len(azimuths_deg)
        device = self._execution_device
        polar, azimuth = camera_angles(azimuths_deg, elevations_deg)
        cameras = camera_vectors(polar, azimuth, self.config.conditioning_sigma, self.config.camera_dims)
        embeddings = embed_images(self.image_encoder, video.to(device) * 2 - 1)
        factor = self.config.conditioning_scaling_factor
        latents = self.encode_images(video, chunk_size) * factor
        self._check_latent_size(video, latents)
        if reference_views is None:
            references = latents.new_zeros(views, *latents.shape[1:])
        else:
            references = self.encode_images(reference_views, chunk_size) * factor
            if reference_known is not None:
                # a view that is not known is masked as all are in a first window: latents of zero
                references = references * torch.tensor(reference_known, device=references.device)[:, None, None, None]
        return GridCondition(
            embeddings=embeddings[None],
            latents=latents.repeat_interleave(views, dim=0),
            cameras=cameras.repeat(frames, 1).to(device),
            references=references,
            sigma_dims=self.config.camera_dims[0],
        )

    def encode_images(self, images: Float[Tensor, "n c h w"], chunk_size: int = 8) -> Float[Tensor, "n d i j"]:
        """Unscaled latents (posterior means) of images in [0, 1]."""
        device, dtype = self._execution_device, self.vae.dtype

        def encode(start: int, stop: int) -> Tensor:
            pixels = (images[start:stop].to(device) * 2 - 1).to(dtype)
            return self.vae.encode(pixels).latent_dist.mode().float()

        return self._vae_chunks.run(encode, len(images), chunk_size)

    def decode_latents(self, latents: Float[Tensor, "n d i j"], chunk_size: int = 8) -> Float[Tensor, "n c h w"]:
        """Images in [0, 1] from denoised latents."""
        unscaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)

        def decode(start: int, stop: int) -> Tensor:
            return self.vae.decode(unscaled[start:stop]).sample.float()

        return self._vae_chunks.run(decode, len(unscaled), chunk_size).add_(1).div_(2).clamp_(0, 1)

    def check_inputs(
        self,
        video: Tensor,
        azimuths_deg: Sequence[float],
        elevations_deg: Sequence[float],
        reference_views: Tensor | None,
        initial_views: Tensor | None,
        strength: float,
        num_inference_steps: int | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        decode_chunk_size: int,
        reference_known: Sequence[bool] | None = None,
    ) -> None:
        """Raise InputError, naming the argument, for anything `__call__` cannot use."""
        channels = self.vae.config.in_channels
        if video.ndim != 4 or video.shape[0] < 1 or video.shape[1] != channels:
            raise InputError(f"video must be [frames, {channels}, height, width] in [0, 1], got {tuple(video.shape)}.")
        if len(azimuths_deg) != len(elevations_deg) or len(azimuths_deg) < 1:
            raise InputError(
                f"azimuths_deg and elevations_deg must name the same views, at least one; they have "
                f"{len(azimuths_deg)} and {len(elevations_deg)} entries."
            )
        frames, views, size = len(video), len(azimuths_deg), tuple(video.shape[1:])
        if reference_views is not None and tuple(reference_views.shape) != (views, *size):
            raise InputError(f"reference_views must be {(views, *size)}, got {tuple(reference_views.shape)}.")
        if reference_known is not None and (reference_views is None or len(reference_known) != views):
            raise InputError(f"reference_known must say for each of {views} reference_views whether it is known.")
        if initial_views is not None and tuple(initial_views.shape) != (frames, views, *size):
            raise InputError(f"initial_views must be {(frames, views, *size)}, got {tuple(initial_views.shape)}.")
        for name, images in (("video", video), ("reference_views", reference_views), ("initial_views", initial_views)):
            if images is not None and not (images.min() >= 0 and images.max() <= 1):
                raise InputError(f"{name} must be in [0, 1] without NaN; divide 8-bit images by 255.")
        if not 0 < strength <= 1:
            raise InputError(f"strength must be above 0 and at most 1, got {strength}.")
        if strength < 1 and initial_views is None:
            raise InputError("strength below 1 needs initial_views to start from; give them or leave strength at 1.")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise InputError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got '{output_type}'.")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise InputError(f"callback_on_step_end_tensor_inputs may only name {self._callback_tensor_inputs}.")
        if decode_chunk_size < 1:
            raise InputError(f"decode_chunk_size must be at least 1, got {decode_chunk_size}.")

    def _check_latent_size(self, video: Tensor, latents: Tensor) -> None:
        """The image must divide into latents, and the latents must halve once per level of the network."""
        halvings = 2 ** (len(self.unet.config.block_out_channels) - 1)
        height, width = video.shape[-2:]
        rows, columns = latents.shape[-2:]
        if height % rows or width % columns or rows % halvings or columns % halvings:
            multiple = halvings * -(-height // rows)
            raise InputError(f"video is {height}x{width} pixels; both sides must be multiples of {multiple}.")

    def _prepare_noise(
        self, shape: torch.Size, grid: tuple[int, int], generator: Generators | None, given: Tensor | None
    ) -> Float[Tensor, "tv c h w"]:
        """Unit noise for every image: the given one, or drawn in (t v) order."""
        shape = torch.Size([shape[0], self.unet.config.out_channels, *shape[2:]])
        if isinstance(generator, list) and len(generator) not in (1, shape[0]):
            raise InputError(f"generator has {len(generator)} entries; give one, or one for each of {shape[0]} images.")
        if given is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(given.shape) != (*grid, *shape[1:]):
            raise InputError(f"latents must be unit noise of shape {(*grid, *shape[1:])}, got {tuple(given.shape)}.")
        return given.flatten(0, 1).to(self._execution_device, torch.float32)


def _as_tensor(images: Tensor | Sequence[PIL.Image.Image], channels: int) -> Float[Tensor, "n c h w"]:
    """Pictures as the autoencoder reads them; tensors as they are."""
    if isinstance(images, Tensor):
        return images
    if not images:
        raise InputError("video must hold at least one picture.")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise InputError(f"pictures of one video must have one size, not {', '.join(map(str, sorted(sizes)))}.")
    rgba = np.stack([np.asarray(image.convert("RGBA")) for image in images])
    values = np.concatenate([over_white(rgba), rgba[..., 3:]], axis=-1)[..., :channels]
    return torch.from_numpy(values).movedim(-1, 1).float() / 255


def _as_type(frames: Float[Tensor, "t v c h w"], output_type: str) -> Tensor | np.ndarray | list[list[PIL.Image.Image]]:
    """A call's result as `output_type` asks."""
    if output_type in ("pt", "latent"):
        return frames
    array = frames.permute(0, 1, 3, 4, 2).cpu().numpy()
    return array if output_type == "np" else [VaeImageProcessor.numpy_to_pil(views) for views in array]
