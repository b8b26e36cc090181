"""4D-aware score distillation: what the network would rather see than the renders.

Source: aejion/4Diffusion @ 627d0cd, its guidance in x0-reconstruction form (HiFA's and MVDream's); the 4Diffusion
paper (arXiv 2405.20674) section 3.3 writes it as a difference of images.
"""

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from sv4d_ns.diffusion.fourdm.conditioning import NetworkRows
from sv4d_ns.diffusion.fourdm.unet import FourDMUNet
from sv4d_ns.diffusion.sv4d.guidance import guide

GUIDANCE_SCALE = 5.0
STD_RESCALE = 0.2
BETA_START, BETA_END = 0.00085, 0.012


def ddim_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 2.1 and the sampler of the reference."""
    return DDIMScheduler(
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def alphas_cumprod() -> Float[Tensor, "1000"]:
    """alpha_bar of every step, float64: Stable Diffusion's schedule, accumulated exactly.

    diffusers accumulates in float32, which is 5e-7 off and shows in the gradient.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, 1000, dtype=torch.float64).square()
    return torch.cumprod(1 - betas, dim=0)


@torch.no_grad()
def predict_noise(
    network: FourDMUNet, noisy: Float[Tensor, "fv c h w"], timestep: int, rows: NetworkRows
) -> tuple[Float[Tensor, "fv c h w"], Float[Tensor, "fv c h w"]]:
    """(unconditional, conditional) noise of the images of one window, in (f v) order, float32."""
    views = rows.num_views - 1
    grid = noisy.unflatten(0, (-1, views))
    # the image view's latents come from `rows`; its own prediction is dropped
    sample = torch.cat([grid, torch.zeros_like(grid[:, :1])], dim=1).flatten(0, 1).to(network.dtype)
    times = torch.full((2 * len(sample),), timestep, device=noisy.device)
    noise = network(
        torch.cat([sample, sample]),
        times,
        rows.text,
        rows.image_tokens,
        rows.cameras,
        rows.num_frames,
        rows.num_views,
        rows.image_latents,
    ).float()
    unconditional, conditional = noise.unflatten(0, (-1, rows.num_views))[:, :-1].flatten(0, 1).chunk(2)
    return unconditional, conditional


def guided(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """One guidance scale for all images."""
    return guide(unconditional, conditional, unconditional.new_full((len(unconditional),), scale))


def add_noise(
    latents: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], alpha_bar: float
) -> Float[Tensor, "n c h w"]:
    """sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps."""
    return alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * noise


def reconstruct(
    noisy: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], alpha_bar: float
) -> Float[Tensor, "n c h w"]:
    """Clean latents from noisy ones and the predicted noise."""
    return (noisy - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5


def rescale_std(
    guided_latents: Float[Tensor, "n c h w"], conditional: Float[Tensor, "n c h w"], share: float = STD_RESCALE
) -> Float[Tensor, "n c h w"]:
    """Take back a share of the contrast that guidance adds (one factor for all images).

    x0* = share * s * x0 + (1 - share) * x0 with s the ratio of the standard deviations without and with guidance.
    """
    factor = (conditional.std() + 1e-8) / (guided_latents.std() + 1e-8)
    return share * factor * guided_latents + (1 - share) * guided_latents


def reconstruction_target(
    noisy: Float[Tensor, "n c h w"],
    unconditional: Float[Tensor, "n c h w"],
    conditional: Float[Tensor, "n c h w"],
    alpha_bar: float,
    scale: float = GUIDANCE_SCALE,
    share: float = STD_RESCALE,
) -> Float[Tensor, "n c h w"]:
    """The clean latents the network sees behind the noise; what the renders are pulled towards."""
    wanted = reconstruct(noisy, guided(unconditional, conditional, scale), alpha_bar)
    return rescale_std(wanted, reconstruct(noisy, conditional, alpha_bar), share) if share > 0 else wanted


def sds_loss(latents: Float[Tensor, "n c h w"], target: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """Half the squared distance to the (constant) target per image; its gradient is (latents - target) / n."""
    return 0.5 * (latents - target.detach()).square().sum() / len(latents)
