"""The folder of recorded outputs of 4Diffusion's reference, and what is in it."""

import gzip
import json
import lzma
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from sv4d_ns.diffusion.fourdm.checkpoints import convert_network
from sv4d_ns.diffusion.fourdm.conditioning import FourDMCondition
from sv4d_ns.diffusion.fourdm.unet import FourDMUNet
from sv4d_ns.field.space_time import SpaceTimeField, SpaceTimeFieldConfig

FOLDER = Path(os.environ.get("SV4D_FIXTURES_4DM") or Path(__file__).parents[1] / "data" / "4dm")
PACKED: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
VIEWS, FRAMES = 4, 8


def network_config(reference: Mapping[str, Any]) -> dict[str, Any]:
    """`FourDMUNet` configuration for the constructor arguments of the reference's MultiViewUNetModel."""
    widths = [reference["model_channels"] * factor for factor in reference["channel_mult"]]
    return {
        "block_out_channels": widths,
        "layers_per_block": reference["num_res_blocks"],
        "attention_levels": [2**level in reference["attention_resolutions"] for level in range(len(widths))],
        "attention_head_dim": reference["num_head_channels"],
        "cross_attention_dim": reference["context_dim"],
        "image_tokens": reference["ip_dim"],
        "motion_heads": reference["motion_module_kwargs"]["num_attention_heads"],
    }


def files() -> list[str]:
    """Every recording, by its name without compression."""
    return sorted(path.name.removesuffix(".xz").removesuffix(".gz") for path in FOLDER.iterdir())


def has(*names: str) -> bool:
    return set(names) <= set(files())


def needs(*names: str) -> Any:
    """Leave a test out where the folder does not have these files."""
    missing = [name for name in names if not has(name)]
    return pytest.mark.skipif(bool(missing), reason=f"not in {FOLDER}: {', '.join(missing)}")


def names(prefix: str, suffix: str = ".safetensors") -> list[str]:
    """X for every `<prefix>X<suffix>`."""
    found = [name for name in files() if name.startswith(prefix) and name.endswith(suffix)]
    return [name.removeprefix(prefix).removesuffix(suffix) for name in found]


def read(name: str) -> bytes:
    for packing, unpack in PACKED.items():
        if (FOLDER / f"{name}{packing}").exists():
            return unpack((FOLDER / f"{name}{packing}").read_bytes())
    return (FOLDER / name).read_bytes()


def read_json(name: str) -> Any:
    return json.loads(read(name))


@lru_cache(maxsize=8)
def tensors(name: str) -> dict[str, Tensor]:
    return load(read(name))


def metadata(name: str) -> dict[str, Any]:
    """The recorded settings; values that are JSON are read."""
    content = read(name)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {key: _value(text) for key, text in header.get("__metadata__", {}).items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def weights(unet: str) -> dict[str, Tensor]:
    """The recorded tensors of a network, all its files together."""
    parts = [name for name in files() if name.startswith(f"{unet}_weights")]
    return {key: value for name in parts for key, value in tensors(name).items()}


@lru_cache(maxsize=2)
def network(unet: str) -> FourDMUNet:
    """The network of `<unet>_io.safetensors`, with every recorded weight (`is_whole` says whether that is all)."""
    torch.manual_seed(0)
    reference = metadata(f"{unet}_io.safetensors")["config"]
    model = FourDMUNet(**network_config(reference)).eval()
    result = model.load_state_dict(convert_network(weights(unet), reference["num_res_blocks"]), strict=False)
    assert not result.unexpected_keys
    return model


@lru_cache(maxsize=8)
def is_whole(unet: str) -> bool:
    """Whether the folder has all weights of a network."""
    if not has(f"{unet}_io.safetensors"):
        return False
    reference = metadata(f"{unet}_io.safetensors")["config"]
    recorded = convert_network(weights(unet), reference["num_res_blocks"])
    return recorded.keys() == network(unet).state_dict().keys()


def condition(model: FourDMUNet, recorded: dict[str, Tensor], image_latents: Tensor) -> FourDMCondition:
    """What one window of a recording is conditioned on."""
    with torch.no_grad():
        tokens = model.image_tokens(recorded["clip_tokens"])
        nothing = model.image_tokens(torch.zeros_like(recorded["clip_tokens"][:1]))[0]
    return FourDMCondition(
        recorded["text_embedding"][0], recorded["negative_embedding"][0], tokens, nothing, image_latents
    )


def real_views(rows: Tensor) -> Tensor:
    """[(b f 5) ...] without the image view: [(b f 4) ...]."""
    return rows.unflatten(0, (-1, VIEWS + 1))[:, :VIEWS].flatten(0, 1)


def field(name: str, backend: str) -> SpaceTimeField:
    """The field of a `nerf_*.safetensors`."""
    recorded, encoding = tensors(name), metadata(name)["encoding"]
    ours = SpaceTimeField(
        SpaceTimeFieldConfig(
            levels=encoding["n_levels"],
            log2_table_size=encoding["log2_hashmap_size"],
            base_resolution=encoding["base_resolution"],
            growth=encoding["per_level_scale"],
            hidden_width=recorded["sd.density_network.layers.0.weight"].shape[0],
            encoding_backend=backend,  # type: ignore[arg-type]
        )
    )
    with torch.no_grad():
        for key, parameter in field_parameters(ours).items():
            parameter.copy_(recorded[f"sd.{key}"].view_as(parameter))
    return ours


def field_parameters(ours: SpaceTimeField) -> dict[str, Tensor]:
    """Our parameters under the reference's names."""
    return {
        "encoding.encoding.encoding.params": ours.space.table,
        "encoding.encoding.encoding_time.params": ours.space_time.table,
        "density_network.layers.0.weight": ours.density_net[0].weight,  # type: ignore[dict-item]
        "density_network.layers.2.weight": ours.density_net[2].weight,  # type: ignore[dict-item]
        "feature_network.layers.0.weight": ours.color_net[0].weight,  # type: ignore[dict-item]
        "feature_network.layers.2.weight": ours.color_net[2].weight,  # type: ignore[dict-item]
    }


def assert_within(ours: Tensor, reference: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(ours, reference.to(ours.dtype), atol=atol, rtol=rtol)
