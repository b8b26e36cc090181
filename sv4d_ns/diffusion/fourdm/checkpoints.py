"""Tensor names of the ImageDream and 4Diffusion checkpoints and their places in `FourDMUNet`.

Both files use the names of the latent-diffusion code base. Motion modules shift the indices of what follows them in a
block, so ImageDream's names differ from 4Diffusion's for 16 tensors; a tensor's place follows here from what it is,
not from its index, and both are read. All shapes are equal but for the resampler's joint key/value matrix, which
diffusers keeps as two.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from sv4d_ns.diffusion.weights.key_maps import RES_NAMES
from sv4d_ns.utils.errors import InputError

MOTION = ".temporal_transformer."

_TOP_NAMES = {
    "time_embed.0": "unet.time_embedding.linear_1",
    "time_embed.2": "unet.time_embedding.linear_2",
    "camera_embed.0": "unet.class_embedding.linear_1",
    "camera_embed.2": "unet.class_embedding.linear_2",
    "input_blocks.0.0": "unet.conv_in",
    "out.0": "unet.conv_norm_out",
    "out.2": "unet.conv_out",
    "image_embed.latents": "image_projection.latents",
    "image_embed.proj_in": "image_projection.proj_in",
    "image_embed.proj_out": "image_projection.proj_out",
    "image_embed.norm_out": "image_projection.norm_out",
}
_RESAMPLER_NAMES = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}
_MOTION_NAMES = {
    "attention_blocks.0.pos_encoder": "pos_embed",
    "attention_blocks.0": "attn1",
    "attention_blocks.1": "attn2",
    "norms.0": "norm1",
    "norms.1": "norm2",
    "ff_norm": "norm3",
    "ff": "ff",
}
_SECOND_POSITIONS = "attention_blocks.1.pos_encoder.pe"


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return None


def keys_of(name: str, layers_per_block: int) -> tuple[str, ...]:
    """Our names of a tensor of either checkpoint (without its file's prefix).

    Two names for the resampler's joint key/value matrix (keys first); none for the second of a motion module's two
    equal position tables, which diffusers shares.

    Raises:
        InputError: where the reference network has no such tensor.
    """
    key = _renamed(name, _TOP_NAMES)
    if key is not None:
        return (key,)
    if match := re.fullmatch(r"image_embed\.layers\.(\d+)\.(.+)", name):
        place = f"image_projection.layers.{match[1]}"
        if match[2] == "0.to_kv.weight":
            return (f"{place}.attn.to_k.weight", f"{place}.attn.to_v.weight")
        if inside := _renamed(match[2], _RESAMPLER_NAMES):
            return (f"{place}.{inside}",)
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        # the first residual block is 0, the second 2 (ImageDream) or 3 (with the motion module between)
        return _inside("unet.mid_block", "0" if match[1] in "01" else str(int(MOTION not in name)), match[2], name)
    if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.\d\.(.+)", name):
        down = match[1] == "input"
        level, layer = divmod(int(match[2]) - down, layers_per_block + 1)
        block = f"unet.{'down' if down else 'up'}_blocks.{level}"
        if match[3].startswith("op."):
            return (f"{block}.downsamplers.0.{match[3].replace('op', 'conv', 1)}",)
        if match[3].startswith("conv."):
            return (f"{block}.upsamplers.0.{match[3]}",)
        return _inside(block, str(layer), match[3], name)
    raise _unknown(name)


def _inside(block: str, layer: str, rest: str, name: str) -> tuple[str, ...]:
    """Our names of a tensor of one layer: its residual block, its transformer or its motion module."""
    if rest.startswith(MOTION[1:]):
        place = f"{block}.motion_modules.{0 if 'mid_block' in block else layer}"
        rest = rest.removeprefix(MOTION[1:])
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", rest)
        if match is None:
            return (f"{place}.{rest}",)
        if match[2] == _SECOND_POSITIONS:
            return ()
        if inside := _renamed(match[2], _MOTION_NAMES):
            return (f"{place}.transformer_blocks.{match[1]}.{inside}",)
        raise _unknown(name)
    if inside := _renamed(rest, RES_NAMES):
        return (f"{block}.resnets.{layer}.{inside}",)
    image_prompt = re.sub(r"attn2\.to_([kv])_ip\.", r"attn2.processor.to_\1_ip.0.", rest)
    return (f"{block}.attentions.{layer}.{image_prompt}",)


def _unknown(name: str) -> InputError:
    return InputError(f"'{name}' is not a tensor of 4Diffusion's network; give an ImageDream or 4Diffusion checkpoint.")


def convert_network(state: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """A reference state (prefixes removed) under our names.

    Raises:
        InputError: a tensor the network does not have, or a motion module whose two position tables differ.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        keys = keys_of(name, layers_per_block)
        if not keys:
            first = name.replace("attention_blocks.1", "attention_blocks.0")
            if first in state and not torch.equal(state[first], tensor):
                raise InputError(f"{first} and {name} differ, but the model shares one table of time positions.")
        for key, part in zip(keys, tensor.chunk(len(keys)) if keys else (), strict=True):
            converted[key] = part.contiguous()
    return converted
