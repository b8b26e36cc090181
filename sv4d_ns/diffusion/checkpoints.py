"""Tensor names of the released SV4D 2.0 files and their places in the diffusers-style modules.

The UNet's tensors need renaming only (equal shapes, no transposes); the image tower splits its fused q/k/v and
transposes its projection. Source: the key map verified against Stability-AI/generative-models @ 0ad7de9.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sv4d_ns.diffusion.attention import CameraAttention
from sv4d_ns.errors import InputError

_RES_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION_NAMES = {
    "time_mix_blocks": "view_transformer_blocks",
    "motion_blocks": "frame_transformer_blocks",
    "time_mix_time_embed.0": "view_embed.linear_1",
    "time_mix_time_embed.2": "view_embed.linear_2",
    "time_mix_motion_embed.0": "frame_embed.linear_1",
    "time_mix_motion_embed.2": "frame_embed.linear_2",
    "time_mixer": "view_mixer",
    "time_mixer_motion": "frame_mixer",
}
_TOP_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {0: "resnets.0", 1: "attentions.0", 2: "resnets.1"}


def unet_config(reference: Mapping[str, Any]) -> dict[str, Any]:
    """`MultiViewVideoUNet` configuration for the constructor arguments of the reference's SpatialUNetModelWithTime."""
    widths = [reference["model_channels"] * factor for factor in reference["channel_mult"]]
    depths = reference["num_res_blocks"]
    return {
        "in_channels": reference["in_channels"],
        "out_channels": reference["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": depths,
        "attention_levels": [2**level in reference["attention_resolutions"] for level in range(len(widths))],
        "attention_head_dim": reference["num_head_channels"],
        "cross_attention_dim": reference["context_dim"],
        "reference_channels": reference["motion_context_dim"],
        "projection_class_embeddings_input_dim": reference["adm_in_channels"],
        "camera_attention": (
            CameraAttention.RELEASED if reference["use_3d_attention"] else CameraAttention.PER_VIEW_PIXEL
        ).value,
    }


def _starts(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if _starts(name, old):
            return new + name[len(old) :]
    return name


def _inside_resnet(name: str) -> str:
    if _starts(name, "time_mixer"):
        return name
    if _starts(name, "time_mix_blocks"):
        return "temporal_res_block." + _renamed(name.removeprefix("time_mix_blocks."), _RES_NAMES)
    return "spatial_res_block." + _renamed(name, _RES_NAMES)


def _inside_layer(place: str, name: str) -> str:
    inside = _inside_resnet(name) if ".resnets." in place else _renamed(name, _ATTENTION_NAMES)
    return f"{place}.{inside}"


def unet_key(name: str, layers_per_block: int) -> str:
    """Our name of a UNet tensor or module of the reference (without the `model.diffusion_model.` prefix).

    Raises:
        InputError: where the reference network has no such tensor.
    """
    for old, new in _TOP_NAMES.items():
        if _starts(name, old):
            return new + name[len(old) :]
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        return _inside_layer(f"mid_block.{_MIDDLE[int(match[1])]}", match[2])
    if match := re.fullmatch(r"input_blocks\.(\d+)\.(\d)\.(.+)", name):
        level, layer = divmod(int(match[1]) - 1, layers_per_block + 1)
        if layer == layers_per_block:
            return f"down_blocks.{level}.downsamplers.0.{_renamed(match[3], {'op': 'conv'})}"
        return _inside_layer(f"down_blocks.{level}.{_kind(int(match[2]))}.{layer}", match[3])
    if match := re.fullmatch(r"output_blocks\.(\d+)\.(\d)\.(.+)", name):
        level, layer = divmod(int(match[1]), layers_per_block + 1)
        # the upsampler follows the residual block directly on a level without attention
        if int(match[2]) > 0 and _starts(match[3], "conv"):
            return f"up_blocks.{level}.upsamplers.0.{match[3]}"
        return _inside_layer(f"up_blocks.{level}.{_kind(int(match[2]))}.{layer}", match[3])
    raise InputError(f"'{name}' is not a tensor of the SV4D 2.0 UNet; give an official SV4D 2.0 checkpoint.")


def _kind(index: int) -> str:
    return "resnets" if index == 0 else "attentions"


def convert_unet(state: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """Reference UNet state (prefix removed) under our names."""
    return {unet_key(name, layers_per_block): tensor for name, tensor in state.items()}
