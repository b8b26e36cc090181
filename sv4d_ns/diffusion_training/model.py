"""What is trained, and how it becomes a pipeline: network, image encoder, fixed autoencoder."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn

from sv4d_ns.diffusion.sv4d.attention import MultiViewTransformer
from sv4d_ns.diffusion.sv4d.conditioning import camera_angles, camera_vectors, embed_images
from sv4d_ns.diffusion.sv4d.guidance import Guidance, GuidanceKind
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.sv4d.small_components import PatchAutoencoder, PooledImageEncoder
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion_training.data import Batch, BatchShape, make_batch, to_model_images

CONDITIONING_SIGMA = 1e-5
AUTOENCODER_IMAGES = 64
"""Batches of 5 pictures from which the autoencoder's components are computed."""
AUTOENCODER_STEP = 2**40
"""Stands for the step of that batch; no run gets so far."""


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
    """How the exported pipeline samples; chosen by measurement (`sv4d_ns.diffusion_training.evaluate`)."""

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
    """The network and its image encoder as one module (one optimiser, one average, one file).

    Args:
        unet: the network.
        image_encoder: trained with the network if it is ours, frozen if it is CLIP.
    """

    unet: MultiViewVideoUNet
    _no_split_modules = MultiViewVideoUNet._no_split_modules  # what accelerate makes FSDP's units of
    image_encoder: Any  # CLIP or ours; untyped because transformers and diffusers share no base

    def __init__(self, unet: MultiViewVideoUNet, image_encoder: nn.Module):
        super().__init__()
        self.unet = unet
        self.image_encoder = image_encoder

    @classmethod
    def new(cls, config: ModelConfig) -> "TrainedParts":
        """Untrained parts of a size."""
        unet = MultiViewVideoUNet(
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
        return cls(unet, PooledImageEncoder(embedding_dim=config.embedding_dim))

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether the embeddings of pictures stay the same during training."""
        return not isinstance(self.image_encoder, PooledImageEncoder)

    def embed(self, images: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t d"]:
        """Embeddings of input frames in [-1, 1]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_is_frozen):
            return embed_images(self.image_encoder, images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def forward(
        self,
        images: Float[Tensor, "b t c h w"] | None,
        embeddings: Float[Tensor, "b t d"] | None,
        known: Float[Tensor, " b"],
        sample: Float[Tensor, "btv c h w"],
        timestep: Float[Tensor, " btv"],
        cameras: Float[Tensor, "btv p"],
        references: Float[Tensor, "bv c h w"],
    ) -> Float[Tensor, "btv c h w"]:
        """The network's output.

        Args:
            images: input frames, or None where their `embeddings` are given.
            embeddings: of the input frames, or None.
            known: 1, or 0 for samples whose image embedding is dropped.
            sample, timestep, cameras, references: as `MultiViewVideoUNet` takes them.
        """
        if embeddings is None:
            assert images is not None
            embeddings = self.embed(images)
        embeddings = embeddings * known[:, None, None].to(embeddings.dtype)
        return self.unet(sample, timestep, embeddings, cameras, references, return_dict=False)[0]


@contextlib.contextmanager
def bypassed(unet: nn.Module, branch: str) -> Iterator[None]:
    """Blend out one attention branch of every transformer: its alpha-blender returns what came in.

    Args:
        unet: the network.
        branch: `view` (3D attention) or `frame` (frame attention).
    """

    def first(module: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        return inputs[0]

    layers = [layer for layer in unet.modules() if isinstance(layer, MultiViewTransformer)]
    handles = [getattr(layer, f"{branch}_mixer").register_forward_hook(first) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fit_autoencoder(config: ModelConfig, seed: int) -> tuple[PatchAutoencoder, float]:
    """The autoencoder fitted on pictures of training creatures, and its reconstruction PSNR on them, dB."""
    vae = PatchAutoencoder(latent_channels=config.latent_channels)
    batch = make_batch(seed, AUTOENCODER_STEP, BatchShape(AUTOENCODER_IMAGES, 1), config.image_size)
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
    levels = {"sigma_min": sampling.sigma_min, "sigma_max": sampling.sigma_max}
    return StableVideo4D2Pipeline(
        vae=vae,
        image_encoder=parts.image_encoder,
        unet=parts.unet,
        scheduler=EulerDiscreteScheduler.from_config({**released_scheduler().config, **levels}),
        num_frames=sampling.frames,
        num_views=sampling.views,
        image_size=config.image_size,
        num_inference_steps=sampling.steps,
        guidance=Guidance(GuidanceKind.CONSTANT, 1.0).to_config(),
        camera_dims=list(config.camera_dims),
        conditioning_sigma=CONDITIONING_SIGMA,
    )


def with_components(pipeline: StableVideo4D2Pipeline, **parts: Any) -> StableVideo4D2Pipeline:
    """A pipeline of the same settings with other modules."""
    settings: dict[str, Any] = {
        name: value
        for name, value in pipeline.config.items()
        if name not in pipeline.components and not name.startswith("_")
    }
    return StableVideo4D2Pipeline(**{**pipeline.components, **parts}, **settings)


def export(pipeline: StableVideo4D2Pipeline, folder: Path) -> None:
    """Write a model in diffusers' layout, half precision safetensors; the pipeline itself stays as it is."""
    halves = {
        name: copy.deepcopy(part).to("cpu").half()
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }
    with_components(pipeline, **halves).save_pretrained(folder, safe_serialization=True)
