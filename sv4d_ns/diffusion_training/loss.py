"""The loss: mean squared error of the v-prediction, under noise, masking and dropout drawn for each sample.

Sources: the reference's VWeighting makes its loss exactly this; one noise level for all images of a sample is what its
sampler uses. Not published, and our own choices: noise level distribution, masking and dropout probabilities.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.sv4d.preconditioning import denoised, scaled, v_target
from sv4d_ns.diffusion_training.config import TrainConfig
from sv4d_ns.diffusion_training.data import Batch, batch_images
from sv4d_ns.diffusion_training.model import TrainedParts, camera_vectors_of
from sv4d_ns.diffusion_training.sharding import is_sharded
from sv4d_ns.utils.devices import upload

FIRST_LEVEL_SPREAD = 0.25
"""Standard deviation of ln(sigma) around the sampler's first noise level."""
PICTURE_LOSS_SIGMA = 5.0
PICTURE_SOFTNESS = 0.05
"""Below this error (pictures in [-1, 1]) the absolute error becomes a square."""
ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class Encoded:
    """A batch as the network sees it, on its device.

    Attributes:
        targets: scaled latents of the novel views.
        condition: latents of the input frames.
        views: latents of the novel views in the condition's scale, of which the references are taken.
        images: input frames in [-1, 1], or None where embeddings are given.
        embeddings: of the input frames, or None.
        cameras: camera vectors.
        pictures: novel views in [-1, 1], or None where the pictures were not read.
    """

    targets: Float[Tensor, "b t v c h w"]
    condition: Float[Tensor, "b t c h w"]
    views: Float[Tensor, "b t v c h w"]
    images: Float[Tensor, "b t k H W"] | None
    embeddings: Float[Tensor, "b t d"] | None
    cameras: Float[Tensor, "b v p"]
    pictures: Float[Tensor, "b t v k H W"] | None


@dataclass(frozen=True)
class Draws:
    """Everything random about the samples of a (part of a) batch.

    Attributes:
        log_sigma: natural logarithm of each sample's noise level.
        noise: unit noise.
        references: which reference views are given.
        own: whose references the network makes itself.
        known: whether anything beside the cameras is given.
        own_noise: what such references are made from.
    """

    log_sigma: Float[Tensor, " b"]
    noise: Float[Tensor, "b t v c h w"]
    references: Bool[Tensor, "b v"]
    own: Bool[Tensor, " b"]
    known: Bool[Tensor, " b"]
    own_noise: Float[Tensor, "b v c h w"]

    def to(self, device: torch.device) -> "Draws":
        """The same on another device."""
        return Draws(**{name: upload(value, device) for name, value in vars(self).items()})


def mean_log_sigma(config: TrainConfig, step: int) -> float:
    """Centre of the noise levels of a step."""
    return config.log_sigma_mean if step < config.steps_3d else config.log_sigma_mean_4d


def first_level(pipeline: StableVideo4D2Pipeline) -> float:
    """The sampler's first noise level."""
    return float(pipeline.scheduler.config.sigma_max)


def draw(
    config: TrainConfig, step: int, shape: tuple[int, ...], numbers: range, objects: int, first_sigma: float
) -> Draws:
    """Draw for the samples `numbers` of a batch of `objects`; each sample's draws depend on (seed, step, number).

    The batch's ln(sigma) come one from each of `objects` equally probable slices of their distribution: so a small
    batch sees small and large noise every time, which steadies the gradient.

    Args:
        config: the run's settings.
        step: of the run.
        shape: (t, v, c, h, w) of a sample's latents.
        numbers: which samples.
        objects: of the whole batch.
        first_sigma: see `first_level`.
    """
    parts = [_draw_one(config, step, shape, number, objects, first_sigma) for number in numbers]
    return Draws(*(torch.stack(column) for column in zip(*parts, strict=True)))


def _draw_one(
    config: TrainConfig, step: int, shape: tuple[int, ...], number: int, objects: int, first_sigma: float
) -> tuple[Tensor, ...]:
    seed = np.random.SeedSequence([config.seed, step, number, 1]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
    slice_, spread, first, drop, own, cfg = torch.rand(6, generator=generator).tolist()
    quantile = min(max((number + slice_) / objects, 1e-4), 1 - 1e-4)
    mean, std = mean_log_sigma(config, step), config.log_sigma_std
    if first < config.first_level_share:
        quantile, mean, std = min(max(spread, 1e-4), 1 - 1e-4), math.log(first_sigma), FIRST_LEVEL_SPREAD
    log_sigma = mean + std * torch.special.ndtri(torch.tensor(quantile))
    noise = torch.randn(shape, generator=generator)
    frames, views = shape[:2]
    # a single moment's references would be the very pictures to predict
    given = frames > 1 and drop >= config.reference_drop and cfg >= config.cfg_drop
    references = torch.full((views,), given) & (torch.rand(views, generator=generator) >= config.reference_view_drop)
    own_noise = torch.randn(shape[1:], generator=generator)
    return (
        log_sigma, noise, references, torch.tensor(given and own < config.self_conditioning),
        torch.tensor(cfg >= config.cfg_drop), own_noise,
    )  # fmt: skip


@torch.no_grad()
def encode(pipeline: StableVideo4D2Pipeline, batch: Batch, device: torch.device) -> Encoded:
    """Latents of a batch from its pictures."""
    inputs, views = (upload(part, device) for part in batch_images(batch, pipeline.vae.config.in_channels))
    b, t, v = views.shape[:3]
    latents = encode_pictures(pipeline, views.flatten(0, 2)).unflatten(0, (b, t, v))
    condition = encode_pictures(pipeline, inputs.flatten(0, 1)).unflatten(0, (b, t))
    return from_latents(pipeline, batch, latents, condition, inputs, None, views)


def encode_pictures(pipeline: StableVideo4D2Pipeline, images: Float[Tensor, "n k H W"]) -> Float[Tensor, "n c h w"]:
    """Unscaled latents (posterior means) of pictures in [-1, 1]."""
    parts = [pipeline.vae.encode(part).latent_dist.mode().float() for part in images.split(ENCODED_AT_ONCE)]
    return torch.cat(parts)


def from_latents(
    pipeline: StableVideo4D2Pipeline,
    batch: Batch,
    views: Float[Tensor, "b t v c h w"],
    condition: Float[Tensor, "b t c h w"],
    images: Tensor | None,
    embeddings: Tensor | None,
    pictures: Tensor | None,
) -> Encoded:
    """Unscaled latents in the scales the network is given them."""
    factor = pipeline.config.conditioning_scaling_factor
    cameras = upload(camera_vectors_of(batch, tuple(pipeline.config.camera_dims)), views.device)
    return Encoded(
        views * pipeline.vae.config.scaling_factor, condition * factor, views * factor, images, embeddings, cameras,
        pictures,
    )  # fmt: skip


def losses(
    model: torch.nn.Module,
    pipeline: StableVideo4D2Pipeline,
    encoded: Encoded,
    draws: Draws,
    config: TrainConfig,
) -> dict[str, Float[Tensor, ""]]:
    """`loss` (what is minimised) and its parts `v` and `picture`.

    Args:
        model: `TrainedParts`, perhaps wrapped for several processes.
        pipeline: of the same parts; its autoencoder decodes for the picture loss.
        encoded: the batch.
        draws: what is random.
        config: the run's settings.
    """
    b, t, v = encoded.targets.shape[:3]
    x = encoded.targets.flatten(0, 2)
    any_own = bool(draws.own.any())  # before they are on the device
    parts = model if is_sharded(model) else TrainedParts(pipeline.unet, pipeline.image_encoder)
    if is_sharded(model):  # all processes or none: they gather the weights together
        any_own = config.self_conditioning > 0 and t > 1
    draws = draws.to(x.device)
    sigma = draws.log_sigma.exp().repeat_interleave(t * v, output_size=b * t * v)[:, None, None, None]
    noise, known = draws.noise.flatten(0, 2), draws.known
    noisy = scaled(x + sigma * noise, sigma)
    condition = encoded.condition * known[:, None, None, None, None]
    cameras = encoded.cameras.clone()
    cameras[~known, :, : pipeline.config.camera_dims[0]] = 0
    references = encoded.views[:, 0] * draws.references[..., None, None, None]
    if any_own:
        own = self_conditioning(parts, pipeline, encoded, draws, first_level(pipeline))
        mask = (draws.own[:, None] & draws.references)[..., None, None, None]
        references = torch.where(mask, own, references)
    output = model(
        encoded.images,
        encoded.embeddings,
        known,
        torch.cat([noisy, condition.repeat_interleave(v, dim=1).flatten(0, 1)], dim=1),
        draws.log_sigma.repeat_interleave(t * v, output_size=b * t * v) / 4,
        cameras[:, None].expand(b, t, v, -1).flatten(0, 2),
        references.flatten(0, 1),
    ).float()
    loss = (output - v_target(x, noise, sigma)).square().mean()
    terms = {"v": loss}
    if config.picture_loss > 0 and encoded.pictures is not None:
        terms["picture"] = _picture_loss(pipeline, denoised(noisy, output, sigma), encoded.pictures, sigma)
        loss = loss + config.picture_loss * terms["picture"]
    return {"loss": loss, **terms}


def _picture_loss(pipeline: StableVideo4D2Pipeline, clean: Tensor, pictures: Tensor, sigma: Tensor) -> Tensor:
    """Absolute error of pictures and, by half, of their edges, over samples with much noise; a mean over all."""
    much = (sigma > PICTURE_LOSS_SIGMA).flatten()
    if not much.any():
        return clean.sum() * 0
    made = pipeline.vae.decode(clean[much] / pipeline.vae.config.scaling_factor).sample.float()
    error = made - pictures.flatten(0, 2)[much]
    terms = _soft_absolute(error) + 0.5 * sum(_soft_absolute(error.diff(dim=axis)) for axis in (-1, -2))
    return terms * much.float().mean()


def _soft_absolute(error: Tensor) -> Tensor:
    return (error.square() + PICTURE_SOFTNESS**2).sqrt().mean()


@torch.no_grad()
def self_conditioning(
    parts: torch.nn.Module, pipeline: StableVideo4D2Pipeline, encoded: Encoded, draws: Draws, sigma: float
) -> Float[Tensor, "b v c h w"]:
    """What the network makes of every sample's first frame in one step, through pictures as in sampling."""
    b, _, v = encoded.targets.shape[:3]
    noise = draws.own_noise.flatten(0, 1)
    level = torch.full((), sigma, device=noise.device)
    noisy = scaled(noise * level, level)
    output = parts(
        None if encoded.images is None else encoded.images[:, :1],
        None if encoded.embeddings is None else encoded.embeddings[:, :1],
        draws.known,
        torch.cat([noisy, encoded.condition[:, :1].repeat_interleave(v, dim=1).flatten(0, 1)], dim=1),
        level.log().expand(b * v) / 4,
        encoded.cameras.flatten(0, 1),
        torch.zeros_like(noise),
    ).float()
    latents = denoised(noisy, output, level) / pipeline.vae.config.scaling_factor
    pictures = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    made = encode_pictures(pipeline, pictures) * pipeline.config.conditioning_scaling_factor
    return made.unflatten(0, (b, v))
