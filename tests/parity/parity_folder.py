"""The folder of recorded reference outputs, and what is in it."""

import gzip
import json
import lzma
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from sv4d_ns.diffusion.sv4d.attention import CameraAttention
from sv4d_ns.diffusion.sv4d.guidance import Guidance, GuidanceKind
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion.weights.key_maps import convert_unet, convert_vae, vae_config

FOLDER = Path(os.environ.get("SV4D_FIXTURES") or Path(__file__).parents[1] / "data" / "sv4d2")
ATOL = 1e-4
PACKED: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}


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


def files() -> list[str]:
    """Every recording, by its name without compression."""
    found = (path.name.removesuffix(".xz").removesuffix(".gz") for path in FOLDER.iterdir())
    return sorted(name for name in found if name.endswith((".safetensors", ".json")))


def has(*names: str) -> bool:
    return set(names) <= set(files())


def read(name: str) -> bytes:
    for packing, unpack in PACKED.items():
        if (FOLDER / f"{name}{packing}").exists():
            return unpack((FOLDER / f"{name}{packing}").read_bytes())
    return (FOLDER / name).read_bytes()


def read_json(name: str) -> Any:
    return json.loads(read(name))


@lru_cache(maxsize=4)
def tensors(name: str) -> dict[str, Tensor]:
    return load(read(name))


def need(*names: str) -> None:
    """Leave the running test out, with a reason, where the folder lacks a file it builds on."""
    missing = [name for name in names if not has(name)]
    if missing:
        pytest.skip(f"not in {FOLDER}: {', '.join(missing)}")


def names(prefix: str, suffix: str = ".json") -> list[str]:
    """X for every file `<prefix>X<suffix>`."""
    found = (re.fullmatch(f"{re.escape(prefix)}(.*){re.escape(suffix)}", name) for name in files())
    return [match[1] for match in found if match]


def part(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix/`."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in recorded.items() if name.startswith(f"{prefix}/")}


def cases(recorded: dict[str, Tensor], tensor: str) -> list[str]:
    """What stands before `/<tensor>`."""
    return sorted(name.removesuffix(f"/{tensor}") for name in recorded if name.endswith(f"/{tensor}"))


def weights(name: str) -> dict[str, Tensor]:
    """Float16 on disk, and run as float32 by the reference."""
    return {key: value.float() for key, value in tensors(name).items()}


def load_unet(name: str) -> MultiViewVideoUNet:
    need(f"unet_{name}.json", f"unet_{name}_weights.safetensors")
    reference = read_json(f"unet_{name}.json")["reference_kwargs"]
    unet = MultiViewVideoUNet(**unet_config(reference)).eval()
    state = convert_unet(weights(f"unet_{name}_weights.safetensors"), reference["num_res_blocks"])
    unet.load_state_dict(state, strict=True)
    return unet


def load_vae(name: str = "tiny") -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    need(f"vae_{name}_weights.safetensors")
    state = weights(f"vae_{name}_weights.safetensors")
    ddconfig = vae_ddconfig(state)
    vae = AutoencoderKL(**vae_config(ddconfig)).eval()
    vae.load_state_dict(convert_vae(state, len(ddconfig["ch_mult"])), strict=True)
    return vae


def vae_ddconfig(state: dict[str, Tensor]) -> dict[str, Any]:
    """The reference's settings of an autoencoder, read off the shapes of its tensors."""
    width = state["encoder.conv_in.weight"].shape[0]
    levels = sorted({int(match[1]) for name in state if (match := re.match(r"encoder\.down\.(\d+)\.", name))})
    blocks = {match[1] for name in state if (match := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))}
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
    return {
        "ch": width,
        "ch_mult": [level // width for level in widths],
        "num_res_blocks": len(blocks),
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_ch": state["decoder.conv_out.weight"].shape[0],
        "z_channels": state["decoder.conv_in.weight"].shape[1],
    }


def script_guidance(options: dict[str, Any]) -> Guidance:
    """The guider that the reference's script makes of its options: its linear one (2) ignores `min_cfg`."""
    kinds = {
        2: Guidance(GuidanceKind.LINEAR, options["cfg"]),
        5: Guidance(GuidanceKind.SPATIOTEMPORAL, options["cfg"], options["min_cfg"]),
    }
    return kinds[options["guider"]]


def assert_within(ours: Tensor, reference: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(ours, reference.to(ours.dtype), atol=atol, rtol=rtol)


def assert_relative_to_peak(ours: Tensor, reference: Tensor, tolerance: float, least: float = 0.0) -> None:
    """|difference| <= tolerance * max(least, max|reference|)."""
    assert ours.shape == reference.shape
    peak = max(least, reference.abs().max().item())
    assert (ours - reference).abs().max().item() <= tolerance * peak
