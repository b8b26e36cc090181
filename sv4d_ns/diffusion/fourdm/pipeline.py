"""From a video of one object to the same moments seen from four sides: the 4DM sampler.

Source: aejion/4Diffusion @ 627d0cd, `scripts/demo.py` (with its two oversights put right: the order of the image
tokens, and frames that are cut off at the end of a video). The four views are 90 degrees apart around the object's own
front, wherever the input camera stood.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sv4d_ns.diffusion.fourdm.conditioning import (
    SAMPLING_NEGATIVE_PROMPT,
    FourDMCondition,
    TokenOrder,
    composite,
    flat_cameras,
    network_rows,
)
from sv4d_ns.diffusion.fourdm.guidance import GUIDANCE_SCALE, add_noise, guided, predict_noise
from sv4d_ns.diffusion.fourdm.motion_module import MAX_FRAMES
from sv4d_ns.diffusion.fourdm.unet import FourDMUNet
from sv4d_ns.geometry.cameras import look_at_cameras
from sv4d_ns.utils.errors import InputError

VIEW_AZIMUTHS_DEG = (0.0, 90.0, 180.0, 270.0)
"""Of the sampled views, from the object's own front (+x), counter-clockwise seen from above."""
SAMPLING_STEPS = 100
ENCODE_CHUNK = 8
"""Images the autoencoder takes at once."""


class FourDMPipeline(DiffusionPipeline):
    """4DM with the encoders of ImageDream.

    Args:
        vae: autoencoder of Stable Diffusion 2.1.
        text_encoder: OpenCLIP ViT-H/14's text half.
        tokenizer: its tokenizer.
        image_encoder: CLIP ViT-H/14's image half, of which the second-last hidden states are used.
        feature_extractor: its preprocessing.
        unet: the network.
        scheduler: see `guidance.ddim_scheduler`.
        num_frames: f the model was trained for; the window length for long videos.
        image_size: height and width in pixels.
    """

    model_cpu_offload_seq: Any = "text_encoder->image_encoder->unet->vae"

    # set by register_modules and register_to_config; untyped because diffusers adds their attributes at run time
    vae: Any
    text_encoder: Any
    tokenizer: Any
    image_encoder: Any
    feature_extractor: Any
    unet: Any
    scheduler: Any
    config: Any

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        image_encoder: Any,
        feature_extractor: Any,
        unet: FourDMUNet,
        scheduler: DDIMScheduler,
        num_frames: int = 8,
        image_size: int = 256,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            unet=unet,
            scheduler=scheduler,
        )
        self.register_to_config(num_frames=num_frames, image_size=image_size)

    # -------------------------------------------------------------------------------------------------- conditions

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Float[Tensor, "s d"]:
        """Tokens of a prompt, float32; the empty prompt is allowed.

        Raises:
            InputError: for a prompt longer than the encoder's context (the reference fails there, too).
        """
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt").input_ids
        if ids.shape[1] > length:
            raise InputError(f"--prompt is {ids.shape[1]} tokens long; the text encoder takes {length}: shorten it.")
        return self.text_encoder(ids.to(self._execution_device))[0][0].float()

    @torch.no_grad()
    def encode_frames(
        self, frames: UInt8[np.ndarray, "t h w 4"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "t k d"], Float[Tensor, "k d"], Float[Tensor, "t c i j"]]:
        """Image tokens of matted input frames, those of "no image", and the frames' scaled latents; all float32.

        Args:
            frames: straight-alpha RGBA of any size, put on white; resized to `image_size` for the latents, and by the
                feature extractor to the image encoder's size for the tokens.
            generator: of the autoencoder's posterior sample; None takes its mean.
        """
        device, dtype = self._execution_device, self.unet.dtype
        pictures = composite(frames)
        pixels = self.feature_extractor(images=list(pictures), return_tensors="pt").pixel_values
        hidden = self.image_encoder(
            pixels.to(device, self.image_encoder.dtype), output_hidden_states=True
        ).hidden_states[-2]
        tokens = self.unet.image_tokens(hidden.to(dtype)).float()
        nothing = self.unet.image_tokens(torch.zeros_like(hidden[:1]).to(dtype)).float()[0]
        images = torch.from_numpy(pictures).movedim(-1, 1).to(device) / 255.0
        return tokens, nothing, self.encode_images(images, generator)

    def condition(
        self,
        frames: UInt8[np.ndarray, "t h w 4"],
        prompt: str = "",
        negative_prompt: str = SAMPLING_NEGATIVE_PROMPT,
        generator: torch.Generator | None = None,
    ) -> FourDMCondition:
        """Everything the network is told; arguments as in `__call__` and `encode_frames`."""
        tokens, nothing, latents = self.encode_frames(frames, generator)
        return FourDMCondition(
            self.encode_prompt(prompt), self.encode_prompt(negative_prompt), tokens, nothing, latents
        )

    def encode_images(
        self, images: Float[Tensor, "n 3 h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n c i j"]:
        """Scaled latents of images in [0, 1] of any size, float32, with gradient.

        Args:
            generator: of the posterior sample, on the CPU; None takes the mean.
        """
        size = self.config.image_size
        resized = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        chunks = []
        for chunk in resized.split(ENCODE_CHUNK):
            # rendered a second time when the gradient arrives: the autoencoder's features of all images at once are
            # larger than everything else together
            moments = checkpoint(self._moments, chunk, use_reentrant=False) if chunk.requires_grad else None
            mean, deviation = self._moments(chunk) if moments is None else moments
            noise = torch.zeros(()) if generator is None else torch.randn(mean.shape, generator=generator)
            chunks.append(mean + deviation * noise.to(mean.device))
        return torch.cat(chunks) * self.vae.config.scaling_factor

    def _moments(self, images: Float[Tensor, "n 3 h w"]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's posterior, float32."""
        posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode_latents(self, latents: Float[Tensor, "n c i j"]) -> Float[Tensor, "n 3 h w"]:
        """Images in [0, 1], float32."""
        unscaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = torch.cat([self.vae.decode(chunk).sample.float() for chunk in unscaled.split(ENCODE_CHUNK)])
        return ((images + 1) / 2).clamp(0, 1)

    # ---------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(
        self,
        frames: UInt8[np.ndarray, "t h w 4"],
        prompt: str = "",
        negative_prompt: str = SAMPLING_NEGATIVE_PROMPT,
        num_inference_steps: int = SAMPLING_STEPS,
        guidance_scale: float = GUIDANCE_SCALE,
        generator: torch.Generator | None = None,
        token_order: TokenOrder = TokenOrder.FRAME,
        callback_on_step_end: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "f v 3 h w"]:
        """The four views of one window of a matted video, in [0, 1]; a longer video is thinned as in the reference.

        Raises:
            InputError: for an empty video, or one of the wrong form.
        """
        if frames.ndim != 4 or frames.shape[-1] != 4 or frames.dtype != np.uint8 or not len(frames):
            raise InputError(f"frames must be 8-bit RGBA [t, h, w, 4], got {frames.dtype} {frames.shape}.")
        if len(frames) > self.config.num_frames:
            frames = frames[spread_frames(len(frames), self.config.num_frames)]
        condition = self.condition(frames, prompt, negative_prompt, generator)
        latents = self.sample(
            condition,
            self.noise(condition, generator),
            num_inference_steps,
            guidance_scale,
            token_order,
            on_step=callback_on_step_end,
        )
        images = self.decode_latents(latents)
        self.maybe_free_model_hooks()
        return images.unflatten(0, (condition.num_frames, len(VIEW_AZIMUTHS_DEG)))

    def noise(self, condition: FourDMCondition, generator: torch.Generator | None) -> Float[Tensor, "fv c i j"]:
        """Unit noise of every image of a window; a CPU generator gives the same on every device."""
        shape = (condition.num_frames * len(VIEW_AZIMUTHS_DEG), *condition.image_latents.shape[1:])
        return randn_tensor(shape, generator=generator, device=condition.image_latents.device, dtype=torch.float32)

    @torch.no_grad()
    def sample(
        self,
        condition: FourDMCondition,
        noise: Float[Tensor, "fv c i j"],
        num_inference_steps: int = SAMPLING_STEPS,
        guidance_scale: float = GUIDANCE_SCALE,
        token_order: TokenOrder = TokenOrder.FRAME,
        known: Float[Tensor, "k c i j"] | None = None,
        start: Float[Tensor, "fv c i j"] | None = None,
        strength: float = 1.0,
        on_step: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "fv c i j"]:
        """Denoise latents in (f v) order with DDIM (eta 0); deterministic given the noise.

        Args:
            known: latents of the first images, where an earlier window made them: they replace what is sampled,
                at every step at its noise level (our own way of joining windows; the reference has none).
            start: clean latents to noise to the level of `strength`, for SDEdit.
            strength: share of the schedule that is run, in (0, 1].
            on_step: called with the number of steps done.

        Raises:
            InputError: more frames than the model's table of time positions has.
        """
        if condition.num_frames > MAX_FRAMES:
            raise InputError(f"A window has at most {MAX_FRAMES} frames, not {condition.num_frames}.")
        device = noise.device
        cameras = flat_cameras(view_cameras(VIEW_AZIMUTHS_DEG)).to(device)
        rows = network_rows(condition, cameras, token_order)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps[num_inference_steps - steps_to_run(num_inference_steps, strength) :]
        alpha_bar = self.scheduler.alphas_cumprod
        latents = noise if start is None else add_noise(start, noise, float(alpha_bar[timesteps[0]]))
        for done, timestep in enumerate(timesteps, start=1):
            if known is not None:
                level = float(alpha_bar[timestep])
                latents = torch.cat([add_noise(known, noise[: len(known)], level), latents[len(known) :]])
            unconditional, conditional = predict_noise(self.unet, latents, int(timestep), rows)
            prediction = guided(unconditional, conditional, guidance_scale)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            if on_step is not None:
                on_step(done)
        return latents if known is None else torch.cat([known, latents[len(known) :]])


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """Denoising steps of a run from the noise level of `strength`; at least 1."""
    return max(1, round(num_inference_steps * strength))


def view_cameras(azimuths_deg: Sequence[float], elevation_deg: float = 0.0) -> Float[Tensor, "v 4 4"]:
    """Camera-to-world matrices at distance 1 (the network knows directions only)."""
    azimuths = np.asarray(azimuths_deg, dtype=np.float64)
    return torch.from_numpy(look_at_cameras(azimuths, np.full(len(azimuths), elevation_deg), radius=1.0)).float()


def spread_frames(total: int, count: int = 8) -> list[int]:
    """The frames the reference takes of a video: int(total / count * i). The last ones are never used."""
    return [int(total / count * i) for i in range(count)]
