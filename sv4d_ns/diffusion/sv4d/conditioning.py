"""What the network is told: the input frames, the cameras, and the views already known.

Source: Stability-AI/generative-models, `GeneralConditioner` with the embedders of `sv4d2.yaml`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

CLIP_SIZE = 224
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class GridCondition:
    """Everything one window is conditioned on, for one sample or for the CFG batch [uncond, cond].

    Attributes:
        embeddings: image embedding of every input frame.
        latents: latents of the input frame of every image, in (b t v) order.
        cameras: camera vector of every image, in (b t v) order.
        references: latents of the known views of the window's first frame; zeros where unknown.
        sigma_dims: how many leading entries of `cameras` belong to the input frames' noise level.
    """

    embeddings: Float[Tensor, "b t d"]
    latents: Float[Tensor, "btv c h w"]
    cameras: Float[Tensor, "btv p"]
    references: Float[Tensor, "bv c h w"]
    sigma_dims: int

    def unconditional(self) -> "GridCondition":
        """The same with everything but the camera angles set to zero, as the reference does."""
        cameras = self.cameras.clone()
        cameras[:, : self.sigma_dims] = 0
        return replace(
            self,
            embeddings=torch.zeros_like(self.embeddings),
            latents=torch.zeros_like(self.latents),
            cameras=cameras,
            references=torch.zeros_like(self.references),
        )

    def with_unconditional(self) -> "GridCondition":
        """The CFG batch [uncond, cond]."""
        other = self.unconditional()
        return replace(
            self,
            embeddings=torch.cat([other.embeddings, self.embeddings]),
            latents=torch.cat([other.latents, self.latents]),
            cameras=torch.cat([other.cameras, self.cameras]),
            references=torch.cat([other.references, self.references]),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> "GridCondition":
        """Moved and cast."""
        return replace(
            self,
            embeddings=self.embeddings.to(device, dtype),
            latents=self.latents.to(device, dtype),
            cameras=self.cameras.to(device, dtype),
            references=self.references.to(device, dtype),
        )


def camera_angles(
    azimuths_deg: Sequence[float], elevations_deg: Sequence[float]
) -> tuple[Float[Tensor, "v"], Float[Tensor, "v"]]:
    """(polar, azimuth) in radians, float64, from degrees relative to the input view.

    Both are in [0, 2 pi); an elevation of 0 is a polar angle of pi/2.
    """
    azimuth = torch.deg2rad(torch.tensor(list(azimuths_deg), dtype=torch.float64)) % (2 * math.pi)
    elevation = torch.deg2rad(torch.tensor(list(elevations_deg), dtype=torch.float64))
    return (math.pi / 2 - elevation) % (2 * math.pi), azimuth


def camera_vectors(
    polar: Float[Tensor, "v"], azimuth: Float[Tensor, "v"], sigma: float, dims: Sequence[int]
) -> Float[Tensor, "v p"]:
    """Sinusoids of the input frames' noise level and of both angles, concatenated, float32.

    Args:
        polar: polar angles of the views in radians.
        azimuth: azimuths of the views in radians.
        sigma: noise level of the input frames' latents, 1e-5 in the released models.
        dims: sizes of the three parts, (256, 512, 512) in the released models.
    """
    parts = [torch.full_like(polar, sigma), polar, azimuth]
    return torch.cat([sinusoid(part, dim) for part, dim in zip(parts, dims, strict=True)], dim=-1)


def sinusoid(values: Float[Tensor, "n"], dim: int) -> Float[Tensor, "n dim"]:
    """[cos | sin] of the values at `dim`/2 frequencies from 1 down to about 1/10000, float32."""
    return get_timestep_embedding(values.float(), dim, flip_sin_to_cos=True, downscale_freq_shift=0)


def clip_pixels(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 224 224"]:
    """Images in [-1, 1] as the image tower expects them: blurred, resized and normalised like the reference (kornia).

    The blur is a Gaussian of sigma (factor - 1)/2 along each axis that shrinks; the resize is bicubic with aligned
    corners.
    """
    blurred = _blur_for(images.float(), CLIP_SIZE)
    resized = F.interpolate(blurred, (CLIP_SIZE, CLIP_SIZE), mode="bicubic", align_corners=True)
    mean = torch.tensor(CLIP_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(CLIP_STD, device=images.device)[:, None, None]
    return ((resized + 1) / 2 - mean) / std


def _blur_for(images: Float[Tensor, "n c h w"], size: int) -> Float[Tensor, "n c h w"]:
    """Gaussian blur against aliasing, where an axis shrinks to `size`."""
    factors = [length / size for length in images.shape[-2:]]
    if max(factors) <= 1:
        return images
    kernels = [_gaussian(max((factor - 1) / 2, 0.001), images.device) for factor in factors]
    pads = [len(kernel) // 2 for kernel in kernels]
    channels = images.shape[1]
    padded = F.pad(images, (pads[1], pads[1], pads[0], pads[0]), mode="reflect")
    across = F.conv2d(padded, kernels[1].expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(across, kernels[0][:, None].expand(channels, 1, -1, 1), groups=channels)


def _gaussian(sigma: float, device: torch.device) -> Float[Tensor, "k"]:
    width = int(max(4 * sigma, 3))
    width += 1 - width % 2
    distance = torch.arange(width, device=device, dtype=torch.float32) - width // 2
    weights = torch.exp(-(distance**2) / (2 * sigma**2))
    return weights / weights.sum()


def embed_images(encoder: ModelMixin | CLIPVisionModelWithProjection, images: Tensor) -> Float[Tensor, "t d"]:
    """Image embeddings of [t, c, h, w] in [-1, 1], given on the device on which the encoder runs.

    The one place that tells encoders apart: CLIP sees the colours, resized to its own size; any other encoder sees all
    channels and prepares them itself.
    """
    if isinstance(encoder, CLIPVisionModelWithProjection):
        images = clip_pixels(images[:, :3])
    return encoder(images.to(encoder.dtype)).image_embeds
