"""Losses of the bundled model: the volume itself, and pictures rendered from it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from sv4d_ns.diffusion.bundled.frustum import Frustum
from sv4d_ns.diffusion.bundled.network import VolumeDenoiser, VolumeLogits
from sv4d_ns.diffusion.bundled.rendering import render_rays
from sv4d_ns.diffusion_training.bundled.data import Batch
from sv4d_ns.metrics.lpips import Perceptual
from sv4d_ns.utils.devices import upload

CPU = torch.device("cpu")
MOST_NOISE = 40.0
"""Noise under which views say nothing: where sampling begins."""
LOG_SIGMA_MEAN, LOG_SIGMA_STD = 0.8, 1.1
"""Of the natural logarithm of the other samples' noise."""
REFERENCE_SHARE = 0.1
"""Share of samples in which some views are clean references."""
MASKED_SHARE = 0.15
"""Share of samples in which some views are not given at all."""
UNKNOWN_ELEVATION_SHARE = 0.2
"""Share of samples whose elevation is not told."""
SHARED_NOISE_SHARE = 0.7
"""Share of samples whose noise is the same in all frames, as it is when sampling."""
WEIGHTS = {"occupancy": 1.0, "colour": 2.0, "picture": 10.0, "alpha": 1.0}


@dataclass(frozen=True)
class Draws:
    """What is random in a step beside the data."""

    sigma: Float[Tensor, "b v"]
    """Noise level of each view; 0 for clean references."""
    present: Bool[Tensor, "b v"]
    """Views that are given."""
    known: Float[Tensor, " b"]
    """1 where the elevation is told."""
    noise: Float[Tensor, "b t v 4 s s"]
    """Unit normal."""


def draw(seed: int, step: int, shape: tuple[int, ...], most_noise_share: float, device: torch.device = CPU) -> Draws:
    """The draws of a step for views of `shape` (b, t, v, 4, s, s).

    Random numbers depend on (seed, step) alone, noise on the kind of device too: a GPU makes its own, because a CPU
    takes longer for it than the GPU for the rest of the step.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    b, _, v = shape[:3]
    chance = torch.rand(b, 5, generator=generator)
    sigma = torch.exp(LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.randn(b, 1, generator=generator))
    sigma = torch.where(chance[:, :1] < most_noise_share, MOST_NOISE, sigma).expand(b, v)
    picked = torch.rand(b, v, generator=generator) < 0.4
    reference = picked & (chance[:, 1:2] < REFERENCE_SHARE)
    masked = (torch.rand(b, v, generator=generator) < 0.4) & (chance[:, 2:3] < MASKED_SHARE)
    of_noise = noise_generator(generator, device)
    noise = upload(torch.randn(shape, generator=of_noise, device=of_noise.device), device)
    shared = upload(chance[:, 4] < SHARED_NOISE_SHARE, device)[:, None, None, None, None, None]
    return Draws(
        upload(torch.where(reference, 0.0, sigma), device),
        upload(~masked, device),
        upload((chance[:, 3] >= UNKNOWN_ELEVATION_SHARE).float(), device),
        torch.where(shared, noise[:, :1].expand(shape), noise),
    )


def noise_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """What draws noise that is used on a device: on a CPU the given one goes on, elsewhere one of the same seed."""
    return generator if device.type == "cpu" else torch.Generator(device).manual_seed(generator.initial_seed())


@dataclass(frozen=True)
class PatchLoss:
    """How patches are compared."""

    weight: float
    network: Perceptual


def losses(
    model: VolumeDenoiser, batch: Batch, draws: Draws, frustum: Frustum, patches: PatchLoss | None = None
) -> dict[str, Float[Tensor, ""]]:
    """The weighted sum ("loss") and its parts."""
    noised = batch.views + draws.sigma[:, None, :, None, None, None] * draws.noise
    elevation = batch.elevation_deg
    logits = model(
        batch.frames, elevation, draws.known, noised, draws.sigma, draws.present, batch.to_camera, frustum
    )  # fmt: skip
    with torch.autocast(batch.frames.device.type, enabled=False):  # CUDA's refuses the cross-entropy of probabilities
        return _compare(model, logits, batch, frustum, patches)


def _compare(
    model: VolumeDenoiser, logits: VolumeLogits, batch: Batch, frustum: Frustum, patches: PatchLoss | None
) -> dict[str, Float[Tensor, ""]]:
    volume = model.volume(logits, batch.image)
    rendered = render_rays(volume, batch.origins, batch.directions, frustum)
    possible = logits.possible
    parts = {
        "occupancy": F.binary_cross_entropy_with_logits(logits.density[possible], batch.occupancy[possible].float()),
        "colour": _masked_mean((logits.colour - batch.colours).square().mean(1), batch.shell),
        "picture": (_on_white(rendered) - _on_white(batch.pixels)).square().mean(),
        "alpha": F.binary_cross_entropy(rendered[..., 3].clamp(1e-4, 1 - 1e-4), batch.pixels[..., 3]),
    }
    weights = dict(WEIGHTS)
    if patches is not None:
        made = render_rays(volume, batch.patch_origins, batch.patch_directions, frustum)
        parts["perceptual"] = patches.network(_picture(made), _picture(batch.patch_pixels)).mean()
        weights["perceptual"] = patches.weight
    total = sum((weights[name] * value for name, value in parts.items()), torch.zeros((), device=rendered.device))
    return {"loss": total, **parts}


def _masked_mean(values: Float[Tensor, "n i j k"], mask: Bool[Tensor, "n i j k"]) -> Float[Tensor, ""]:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _picture(rgba: Float[Tensor, "n p 4"]) -> Float[Tensor, "n 3 s s"]:
    """A square patch on white, in [0, 1]."""
    side = round(rgba.shape[1] ** 0.5)
    return _on_white(rgba).transpose(1, 2).unflatten(2, (side, side)).clamp(0, 1)


def _on_white(rgba: Float[Tensor, "n r 4"]) -> Float[Tensor, "n r 3"]:
    return rgba[..., :3] + 1.0 - rgba[..., 3:]
