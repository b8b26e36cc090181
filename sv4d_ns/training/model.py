"""What is trained, and how it becomes a pipeline: network, image encoder, fixed autoencoder."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn

from sv4d_ns.diffusion.conditioning import camera_angles, camera_vectors
from sv4d_ns.diffusion.embedded.modules import PatchAutoencoder, PooledImageEncoder
from sv4d_ns.diffusion.guidance import Guidance, GuidanceKind
from sv4d_ns.diffusion.pipeline import StableVideo4D2Pipeline
from sv4d_ns.diffusion.unet import MultiViewVideoUNet
from sv4d_ns.training.data import Batch, BatchShape, make_batch, to_model_images

CONDITIONING_SIGMA = 1e-5
AUTOENCODER_IMAGES = 64
"""Batches of 5 pictures from which the autoencoder's components are computed."""


@dataclass(frozen=True)
class ModelConfig:
    """Size of the model. The defaults are the shipped one: 6.57 million parameters, 13.2 MB in half precision."""

    image_size: int = 64
    """Pixels per side of the pictures."""
    latent_channels: int = 32
    """Principal components kept of a patch of 4x4 pixels."""
    channels: tuple[int, ...] = (64, 96)
    """Channels of the network's levels; the first works at a quarter of the image size."""
    attention_levels: tuple[bool, ...] = (False, True)
    """Which levels have transformers."""
    head_dim: int = 32
    """Channels of one attention head."""
    embedding_dim: int = 128
    """Size of the image embedding."""
    camera_dims: tuple[int, int, int] = (32, 64, 64)
    """Sizes of the camera vector's parts: noise level, polar angle, azimuth."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the exported pipeline samples; chosen by measurement (`sv4d_ns.training.evaluate`)."""

    steps: int = 1
    """One step gives the mean of all plausible views: blurred, but steady and closest to the truth in PSNR and IoU."""
    sigma_max: float = 40.0
    """First noise level."""
    sigma_min: float = 0.02
    """Last noise level before 0; matters from two steps on."""
    frames: int = 8
    """Frames of a window."""
    views: int = 4
    """Views of a call."""


class TrainedParts(nn.Module):
    """The two networks with trainable parameters, as one module (one optimiser, one average, one file)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.unet = MultiViewVideoUNet(
            in_channels=2 * config.latent_channels,
            out_channels=config.latent_channels,
            block_out_channels=config.channels,
            layers_per_block=1,
            attention_levels=config.attention_levels,
            attention_head_dim=config.head_dim,
            cross_attention_dim=config.embedding_dim,
            reference_channels=config.latent_channels,
            projection_class_embeddings_input_dim=sum(config.camera_dims),
            camera_attention="full_3d",
        )
        self.image_encoder = PooledImageEncoder(embedding_dim=config.embedding_dim)


def fit_autoencoder(config: ModelConfig, seed: int) -> tuple[PatchAutoencoder, float]:
    """The autoencoder fitted on pictures of training creatures, and its reconstruction PSNR on them, dB."""
    vae = PatchAutoencoder(latent_channels=config.latent_channels)
    batch = make_batch(seed, 2**40, BatchShape(AUTOENCODER_IMAGES, 1), config.image_size)
    pictures = np.concatenate([batch.inputs[:, :, None], batch.views], axis=2)
    return vae, vae.fit(to_model_images(pictures).flatten(0, 2))


def camera_vectors_of(batch: Batch, dims: tuple[int, int, int]) -> Float[Tensor, "b v p"]:
    """Camera vectors of a batch's views, made by the very function the pipeline uses."""
    rows = []
    for azimuths, elevations in zip(batch.azimuths, batch.elevations, strict=True):
        polar, azimuth = camera_angles(azimuths.tolist(), elevations.tolist())
        rows.append(camera_vectors(polar, azimuth, CONDITIONING_SIGMA, dims))
    return torch.stack(rows)


def build_pipeline(
    parts: TrainedParts, vae: PatchAutoencoder, config: ModelConfig, sampling: SamplingConfig
) -> StableVideo4D2Pipeline:
    """A pipeline around trained parts; shares their tensors."""
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        beta_schedule="scaled_linear",
        use_karras_sigmas=True,
        sigma_min=sampling.sigma_min,
        sigma_max=sampling.sigma_max,
    )
    return StableVideo4D2Pipeline(
        vae=vae,
        image_encoder=parts.image_encoder,
        unet=parts.unet,
        scheduler=scheduler,
        num_frames=sampling.frames,
        num_views=sampling.views,
        image_size=config.image_size,
        num_inference_steps=sampling.steps,
        guidance=Guidance(GuidanceKind.CONSTANT, 1.0).to_config(),
        camera_dims=list(config.camera_dims),
        conditioning_sigma=CONDITIONING_SIGMA,
    )


def export(
    parts: TrainedParts, vae: PatchAutoencoder, config: ModelConfig, sampling: SamplingConfig, folder: Path
) -> None:
    """Write the model in diffusers' layout, half precision safetensors."""
    half = copy.deepcopy(parts).half(), copy.deepcopy(vae).half()
    build_pipeline(*half, config, sampling).save_pretrained(folder, safe_serialization=True)
