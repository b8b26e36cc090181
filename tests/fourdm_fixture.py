"""Tiny, untrained stand-ins of the models 4Diffusion needs: every part is there, on disk as the real ones are."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import StableVideoDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from sv4d_ns.diffusion.fourdm.guidance import ddim_scheduler
from sv4d_ns.diffusion.fourdm.pipeline import FourDMPipeline
from sv4d_ns.diffusion.fourdm.unet import FourDMUNet

LENGTH = 300
"""Tokens of a prompt; the tiny tokenizer spells."""
NETWORK = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_levels": (True, False),
    "attention_head_dim": 16,
    "cross_attention_dim": 16,
    "image_embed_dim": 24,
    "image_tokens": 3,
    "motion_heads": 4,
}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(folder: Path) -> CLIPTokenizer:
    characters = [chr(c) for c in range(97, 123)]
    words = [*characters, *[f"{c}</w>" for c in characters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(vocab_size=54, max_position_embeddings=LENGTH, bos_token_id=52, eos_token_id=53, **TOWER)
    return CLIPTextModel(config).eval()


def image_encoder(width: int, out: int, side: int = 28) -> CLIPVisionModelWithProjection:
    tower = {**TOWER, "hidden_size": width}
    config = CLIPVisionConfig(**tower, image_size=side, patch_size=side // 2, projection_dim=out)
    return CLIPVisionModelWithProjection(config).eval()


def image_processor(side: int = 28) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).eval()


def fourdm_pipeline(folder: Path) -> FourDMPipeline:
    """4DM: three frames of 16 pixels a side; `folder` takes the tokenizer's files."""
    torch.manual_seed(0)
    return FourDMPipeline(
        autoencoder(),
        text_encoder(),
        tokenizer(folder),
        image_encoder(24, 8),
        image_processor(),
        FourDMUNet(**NETWORK).eval(),
        ddim_scheduler(),
        num_frames=3,
        image_size=16,
    )


def save_text_to_image(folder: Path, scratch: Path) -> Path:
    """A Stable Diffusion pipeline on disk that makes pictures of 16 pixels a side."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        autoencoder(), text_encoder(), tokenizer(scratch), unet, DDIMScheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def save_image_to_video(folder: Path) -> Path:
    """A Stable Video Diffusion pipeline on disk that makes videos of four frames."""
    torch.manual_seed(2)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        num_frames=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=(2, 4),
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    vae = AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2)
    pipeline = StableVideoDiffusionPipeline(
        vae, image_encoder(24, 16, side=224), unet, EulerDiscreteScheduler(), image_processor(224)
    )
    pipeline.save_pretrained(folder)
    return folder


def squares(count: int) -> np.ndarray:
    """A square that moves and changes colour, RGBA [count, 20, 20, 4]."""
    pictures = np.zeros((count, 20, 20, 4), np.uint8)
    for i in range(count):
        pictures[i, 5:15, 3 + i : 12 + i] = (200, 40 * i, 30, 255)
    return pictures
