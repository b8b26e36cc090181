"""The folder of recorded reference outputs, and what is in it."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sv4d_ns.diffusion.checkpoints import convert_unet, convert_vae, unet_config, vae_config
from sv4d_ns.diffusion.guidance import Guidance, GuidanceKind
from sv4d_ns.diffusion.unet import MultiViewVideoUNet

FOLDER = Path(os.environ.get("SV4D_FIXTURES") or Path(__file__).parents[1] / "data" / "sv4d2")
ATOL = 1e-4


def has(*names: str) -> bool:
    return all((FOLDER / name).exists() for name in names)


def needs(*names: str) -> Any:
    """Leave a test out where the folder does not have these files."""
    missing = [name for name in names if not has(name)]
    return pytest.mark.skipif(bool(missing), reason=f"not in {FOLDER}: {', '.join(missing)}")


def names(prefix: str, *suffixes: str) -> list[str]:
    """X for every `<prefix>X.json` that has all of `<prefix>X<suffix>` beside it."""
    stems = [path.name.removeprefix(prefix).removesuffix(".json") for path in sorted(FOLDER.glob(f"{prefix}*.json"))]
    return [stem for stem in stems if has(*(f"{prefix}{stem}{suffix}" for suffix in suffixes))]


def unet_names() -> list[str]:
    return names("unet_", "_weights.safetensors", "_cases.safetensors")


def with_unet(found: list[str]) -> list[str]:
    """Those recordings whose network is in the folder."""
    return [name for name in found if read_json(f"{name}.json")["unet"] in unet_names()]


def read_json(name: str) -> Any:
    path = FOLDER / name
    if path.exists():
        return json.loads(path.read_text())
    return json.loads(gzip.decompress((FOLDER / f"{name}.gz").read_bytes()))


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / name)


def part(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix/`."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in recorded.items() if name.startswith(f"{prefix}/")}


def load_unet(name: str) -> MultiViewVideoUNet:
    reference = read_json(f"unet_{name}.json")["reference_kwargs"]
    unet = MultiViewVideoUNet(**unet_config(reference)).eval()
    state = {key: value.float() for key, value in tensors(f"unet_{name}_weights.safetensors").items()}
    unet.load_state_dict(convert_unet(state, reference["num_res_blocks"]), strict=True)
    return unet


def load_vae(ddconfig: dict[str, Any]) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(**vae_config(ddconfig)).eval()
    state = {key: value.float() for key, value in tensors("vae_tiny_weights.safetensors").items()}
    vae.load_state_dict(convert_vae(state, len(ddconfig["ch_mult"])), strict=True)
    return vae


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
