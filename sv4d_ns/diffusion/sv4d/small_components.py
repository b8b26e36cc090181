"""What a model of `sv4d train` from scratch has beside its UNet: a linear patch autoencoder and an image encoder."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PointDistribution:
    """The "posterior" of an autoencoder without noise: one point."""

    latents: Tensor

    def mode(self) -> Tensor:
        """The latents."""
        return self.latents

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The latents."""
        return self.latents


@dataclass
class PatchEncoderOutput(BaseOutput):
    """As diffusers' AutoencoderKLOutput."""

    latent_dist: PointDistribution


@dataclass
class PatchDecoderOutput(BaseOutput):
    """Pictures [n, c, h, w] in about [-1, 1]."""

    sample: Tensor


@dataclass
class ImageEncoderOutput(BaseOutput):
    """One vector an image, [t, d]."""

    image_embeds: Tensor


class PatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Patches of an image projected on the principal components of training patches; linear both ways.

    Called like diffusers' AutoencoderKL. The components' amplitudes are between those of pixels (power 0) and whitened
    ones (power 1) with `EQUALISATION`, and their common scale makes training latents unit variance over all channels,
    so `scaling_factor` is 1. This autoencoder is our own design: it costs nothing to run or to train.

    Args:
        in_channels: 4, RGB on white and alpha.
        latent_channels: number of components kept.
        patch_size: pixels per side of a patch; latents are that much smaller than the image.
        scaling_factor: of the denoised latents, as in AutoencoderKL.
    """

    EQUALISATION = 0.5
    config: Any  # untyped because diffusers adds its attributes at run time

    @register_to_config
    def __init__(
        self, in_channels: int = 4, latent_channels: int = 24, patch_size: int = 4, scaling_factor: float = 1.0
    ):
        super().__init__()
        pixels = in_channels * patch_size**2
        self.mean = nn.Parameter(torch.zeros(pixels), requires_grad=False)
        self.components = nn.Parameter(torch.eye(latent_channels, pixels), requires_grad=False)
        self.amplitudes = nn.Parameter(torch.ones(latent_channels), requires_grad=False)

    def patches(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n p i j"]:
        """All pixels of a patch as channels."""
        return F.pixel_unshuffle(images, self.config.patch_size)

    @apply_forward_hook
    def encode(self, x: Float[Tensor, "n c h w"]) -> PatchEncoderOutput:
        """Latents of images in [-1, 1], [n, latent_channels, h / patch_size, w / patch_size]."""
        centred = self.patches(x) - self.mean[:, None, None]
        weight = self.components / self.amplitudes[:, None]
        return PatchEncoderOutput(latent_dist=PointDistribution(F.conv2d(centred, weight[:, :, None, None])))

    @apply_forward_hook
    def decode(self, z: Float[Tensor, "n d i j"]) -> PatchDecoderOutput:
        """Images from latents, the inverse of `encode` inside the kept components."""
        weight = (self.components * self.amplitudes[:, None]).T
        pixels = F.conv2d(z, weight[:, :, None, None]) + self.mean[:, None, None]
        return PatchDecoderOutput(sample=F.pixel_shuffle(pixels, self.config.patch_size))

    @torch.no_grad()
    def fit(self, images: Float[Tensor, "n c h w"]) -> float:
        """Set the components from training images in [-1, 1]; returns their reconstruction PSNR in dB."""
        patches = self.patches(images.double()).permute(0, 2, 3, 1).flatten(0, 2)
        mean = patches.mean(dim=0)
        variances, vectors = torch.linalg.eigh(torch.cov(patches.T, correction=0))
        keep = self.config.latent_channels
        deviations = variances.flip(0)[:keep].clamp(min=1e-12).sqrt()
        components = vectors.flip(1)[:, :keep].T
        # eigenvectors have no sign of their own: fix it, so that a fit does not depend on the linear algebra library
        largest = components.abs().argmax(dim=1, keepdim=True)
        components = components * components.gather(1, largest).sign()
        amplitudes = deviations**self.EQUALISATION
        amplitudes = amplitudes * (deviations / amplitudes).square().mean().sqrt()
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.amplitudes.copy_(amplitudes)
        error = (self.decode(self.encode(images).latent_dist.mode()).sample - images).square().mean()
        return float(10 * torch.log10(4 / error))


class PooledImageEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A vector that says what the whole input frame shows; stands where the released model has CLIP.

    Args:
        in_channels: of the images.
        width: channels of the first layer.
        embedding_dim: size of the vector.
    """

    POOLED = 16

    @register_to_config
    def __init__(self, in_channels: int = 4, width: int = 32, embedding_dim: int = 128):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.proj = nn.Linear(2 * width * (self.POOLED // 4) ** 2, embedding_dim)

    def forward(self, images: Float[Tensor, "t c h w"]) -> ImageEncoderOutput:
        """Embed images in [-1, 1] of any size."""
        x = F.adaptive_avg_pool2d(images, self.POOLED)
        x = F.silu(self.conv2(F.silu(self.conv1(x))))
        return ImageEncoderOutput(image_embeds=self.proj(x.flatten(1)))
