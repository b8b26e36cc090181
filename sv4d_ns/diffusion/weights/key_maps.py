"""Tensor names of the released SV4D 2.0 files and their places in the diffusers-style modules.

The UNet's tensors need renaming only (equal shapes, no transposes); the image tower splits its fused q/k/v and
transposes its projection. Source: the key map verified against Stability-AI/generative-models @ 0ad7de9.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sv4d_ns.utils.errors import InputError

RES_NAMES = {
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
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


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
        return "temporal_res_block." + _renamed(name.removeprefix("time_mix_blocks."), RES_NAMES)
    return "spatial_res_block." + _renamed(name, RES_NAMES)


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
        return _inside_layer(f"mid_block.{_MIDDLE[match[1]]}", match[2])
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


def _inverted(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def _outside_layer(key: str) -> str:
    """The inverse of `_inside_layer` for what follows `resnets.i.` or `attentions.i.`."""
    for ours, prefix in (("temporal_res_block.", "time_mix_blocks."), ("spatial_res_block.", "")):
        if key.startswith(ours):
            return prefix + _renamed(key.removeprefix(ours), _inverted(RES_NAMES))
    return _renamed(key, _inverted(_ATTENTION_NAMES))


def _unet_name(key: str, layers_per_block: int, attention_levels: Sequence[bool]) -> str:
    """The inverse of `unet_key`."""
    if match := re.fullmatch(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)", key):
        return f"middle_block.{_inverted(_MIDDLE)[match[1]]}.{_outside_layer(match[2])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
    if match is None:
        return _renamed(key, _inverted(_TOP_NAMES))
    level, layer, inside = int(match[2]), int(match[4]), match[5]
    first = level * (layers_per_block + 1) + (match[1] == "down")
    side = "input_blocks" if match[1] == "down" else "output_blocks"
    if match[3] == "downsamplers":
        return f"{side}.{first + layers_per_block}.0.{_renamed(inside, {'conv': 'op'})}"
    if match[3] == "upsamplers":
        return f"{side}.{first + layers_per_block}.{1 + attention_levels[-1 - level]}.{inside}"
    return f"{side}.{first + layer}.{int(match[3] == 'attentions')}.{_outside_layer(inside)}"


def restore_unet(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `convert_unet` for a network of this `MultiViewVideoUNet` configuration."""
    depth, levels = config["layers_per_block"], config["attention_levels"]
    return {_unet_name(key, depth, levels): tensor for key, tensor in state.items()}


_VAE_NAMES = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
}


def vae_config(reference: Mapping[str, Any], scaling_factor: float = 0.18215) -> dict[str, Any]:
    """diffusers `AutoencoderKL` configuration for the reference's `ddconfig`.

    The reference's decoder has no `post_quant_conv`; its encoder has `quant_conv`.
    """
    widths = [reference["ch"] * factor for factor in reference["ch_mult"]]
    return {
        "in_channels": reference["in_channels"],
        "out_channels": reference["out_ch"],
        "latent_channels": reference["z_channels"],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": reference["num_res_blocks"],
        "scaling_factor": scaling_factor,
        "use_post_quant_conv": False,
    }


def vae_key(name: str, levels: int) -> str | None:
    """diffusers name of an autoencoder tensor of the reference (`encoder.`, `decoder.` or `quant_conv.` first).

    None for `post_quant_conv`, which the reference never evaluates.

    Raises:
        InputError: where the reference has no such tensor.
    """
    if _starts(name, "post_quant_conv"):
        return None
    if _starts(name, "quant_conv"):
        return name
    half, _, rest = name.partition(".")
    if half in ("encoder", "decoder"):
        for old, new in _VAE_NAMES.items():
            if _starts(rest, old):
                return f"{half}.{new}{rest[len(old) :]}"
        if match := re.fullmatch(r"(down|up)\.(\d+)\.block\.(\d+)\.(.+)", rest):
            inside = _renamed(match[4], {"nin_shortcut": "conv_shortcut"})
            return f"{half}.{_vae_level(match[1], int(match[2]), levels)}.resnets.{match[3]}.{inside}"
        if match := re.fullmatch(r"(down|up)\.(\d+)\.(?:down|up)sample\.(.+)", rest):
            level = _vae_level(match[1], int(match[2]), levels)
            return f"{half}.{level}.{match[1]}samplers.0.{match[3]}"
    raise InputError(f"'{name}' is not a tensor of the SV4D 2.0 autoencoder; give an official SV4D 2.0 checkpoint.")


def _vae_level(direction: str, index: int, levels: int) -> str:
    # the reference counts the way up from the finest level, diffusers from the coarsest
    return f"down_blocks.{index}" if direction == "down" else f"up_blocks.{levels - 1 - index}"


def convert_vae(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Reference autoencoder state under diffusers names; 1x1 convolutions of the attention become matrices."""
    converted = {}
    for name, tensor in state.items():
        if (key := vae_key(name, levels)) is not None:
            is_matrix = ".attentions." in key and tensor.ndim == 4
            converted[key] = tensor.flatten(1) if is_matrix else tensor
    return converted


def _vae_name(key: str, levels: int) -> str:
    """The inverse of `vae_key`."""
    half, _, rest = key.partition(".")
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)samplers\.0)\.(.+)", rest)
    if match is None:
        return f"{half}.{_renamed(rest, _inverted(_VAE_NAMES))}"
    level = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
    if match[3] is None:
        return f"{half}.{match[1]}.{level}.{match[1]}sample.{match[4]}"
    return f"{half}.{match[1]}.{level}.block.{match[3]}.{_renamed(match[4], {'conv_shortcut': 'nin_shortcut'})}"


def restore_vae(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The inverse of `convert_vae` for an autoencoder without `post_quant_conv`."""
    restored = {}
    for key, tensor in state.items():
        is_matrix = ".attentions." in key and tensor.ndim == 2
        restored[_vae_name(key, levels)] = tensor[:, :, None, None] if is_matrix else tensor
    return restored


_CLIP_NAMES = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1": "vision_model.embeddings.patch_embedding",
    "ln_pre": "vision_model.pre_layrnorm",
    "ln_post": "vision_model.post_layernorm",
    "proj": "visual_projection.weight",
}
_CLIP_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_config(reference: Mapping[str, Any]) -> dict[str, Any]:
    """transformers `CLIPVisionConfig` values for an OpenCLIP configuration (`embed_dim` and `vision_cfg`)."""
    vision = reference["vision_cfg"]
    return {
        "hidden_size": vision["width"],
        "intermediate_size": 4 * vision["width"],
        "projection_dim": reference["embed_dim"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision["head_width"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "hidden_act": "gelu",
    }


def convert_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's image tower as `CLIPVisionModelWithProjection` state.

    Only `visual.` tensors are taken; the others are leftovers of the text tower.

    Raises:
        InputError: where the tower has no such tensor.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            converted |= _clip_tensor(name.removeprefix("visual."), tensor)
    return converted


def _clip_tensor(name: str, tensor: Tensor) -> dict[str, Tensor]:
    for old, new in _CLIP_NAMES.items():
        if _starts(name, old):
            return {new + name[len(old) :]: tensor.T.contiguous() if name == "proj" else tensor}
    if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name):
        layer, inside = f"vision_model.encoder.layers.{match[1]}", match[2]
        if fused := re.fullmatch(r"attn\.in_proj_(weight|bias)", inside):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            return {f"{layer}.self_attn.{part}_proj.{fused[1]}": value.contiguous() for part, value in parts}
        for old, new in _CLIP_LAYER_NAMES.items():
            if _starts(inside, old):
                return {f"{layer}.{new}{inside[len(old) :]}": tensor}
    raise InputError(
        f"'visual.{name}' is not a tensor of OpenCLIP's image tower; give an official SV4D 2.0 checkpoint."
    )


def restore_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `convert_clip`: the image tower under OpenCLIP's names, `visual.` first, q/k/v fused."""
    restored: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", key)
        if match is None:
            name = _renamed(key, _inverted(_CLIP_NAMES))
            restored[f"visual.{name}"] = tensor.T.contiguous() if name == "proj" else tensor
            continue
        layer, inside = f"visual.transformer.resblocks.{match[1]}", match[2]
        if part := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", inside):
            if part[1] == "q":
                fused = [state[key.replace("q_proj", f"{other}_proj")] for other in "qkv"]
                restored[f"{layer}.attn.in_proj_{part[2]}"] = torch.cat(fused)
        else:
            restored[f"{layer}.{_renamed(inside, _inverted(_CLIP_LAYER_NAMES))}"] = tensor
    return restored
