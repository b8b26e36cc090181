"""Tiny real components of the diffusion pipeline, with weights that are nowhere zero."""

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv4d_ns.diffusion.sv4d.guidance import Guidance, GuidanceKind
from sv4d_ns.diffusion.sv4d.pipeline import StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.sv4d.small_components import PatchAutoencoder, PooledImageEncoder
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet

CAMERA_DIMS = [8, 16, 16]
FRAMES, VIEWS, SIZE = 3, 2, 16


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter that training would start at zero a small random value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05, generator=generator)
    return module.eval()


def tiny_unet(**changes: object) -> MultiViewVideoUNet:
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "attention_levels": (False, True),
        "attention_head_dim": 16,
        "cross_attention_dim": 16,
        "projection_class_embeddings_input_dim": sum(CAMERA_DIMS),
        "camera_attention": "full_3d",
    }
    return randomised(MultiViewVideoUNet(**{**settings, **changes}))  # type: ignore[arg-type, return-value]


def unet_inputs(b: int, t: int, v: int, size: int = 8, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    n = b * t * v
    return draw(n, 8, size, size), draw(n), draw(b, t, 16), draw(n, sum(CAMERA_DIMS)), draw(b * v, 4, size, size)


def tiny_pipeline(**changes: object) -> StableVideo4D2Pipeline:
    """CLIP and AutoencoderKL around the tiny network; 16x16 pixels, 8x8 latents."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        use_post_quant_conv=False,
    ).eval()
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=224,
            patch_size=56,
            projection_dim=16,
            hidden_act="gelu",
        )
    ).eval()
    settings = {
        "camera_dims": CAMERA_DIMS,
        "num_frames": FRAMES,
        "num_views": VIEWS,
        "image_size": SIZE,
        "num_inference_steps": 3,
    }
    pipeline = StableVideo4D2Pipeline(vae, clip, tiny_unet(), released_scheduler(), **{**settings, **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_video(frames: int = FRAMES, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(frames, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def small_pipeline() -> StableVideo4D2Pipeline:
    """The kind that `sv4d train` makes from scratch: a linear autoencoder with alpha, an image encoder of our own."""
    vae = PatchAutoencoder(in_channels=4, latent_channels=16, patch_size=2)
    encoder = PooledImageEncoder(in_channels=4, width=8, embedding_dim=16)
    unet = tiny_unet(in_channels=32, out_channels=16, reference_channels=16)
    pipeline = StableVideo4D2Pipeline(
        vae, encoder, unet, released_scheduler(), num_frames=FRAMES, num_views=VIEWS, image_size=SIZE,
        num_inference_steps=3, camera_dims=CAMERA_DIMS,
        guidance=Guidance(GuidanceKind.CONSTANT, 1.0).to_config(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
