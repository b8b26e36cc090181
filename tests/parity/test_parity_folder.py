"""Every recording in the folder is read by a test: nothing new in it is left out in silence."""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import parity_folder as folder
import pytest

CONDITION = r"(c|uc)/(crossattn|concat|vector|cond_view|cond_motion)"


@dataclass(frozen=True)
class Kind:
    """One kind of recording.

    Attributes:
        file: pattern of its name; the group X is what tells recordings of a kind apart.
        test: the file that tests it.
        companions: files that belong to it.
        entries: pattern of the names of its tensors, or of its JSON keys, that the tests know; None where any is read.
    """

    file: str
    test: str
    companions: tuple[str, ...] = ()
    entries: str | None = None


UNET, SAMPLING, ENCODERS = "test_parity_unet.py", "test_parity_sampling.py", "test_parity_encoders.py"
KINDS = (
    Kind(r"unet_(?P<X>[^_]+)_trace_[^_]+\.json", UNET, ("unet_{X}.json", "unet_{X}_cases.safetensors")),
    Kind(r"unet_(?P<X>[^_]+)_trace_[^_]+\.safetensors", UNET, ("unet_{X}.json", "unet_{X}_cases.safetensors")),
    Kind(r"unet_(?P<X>[^_]+)_weights\.safetensors", UNET, ("unet_{X}.json", "unet_{X}_cases.safetensors")),
    Kind(
        r"unet_(?P<X>[^_]+)_cases\.safetensors",
        UNET,
        ("unet_{X}.json", "unet_{X}_weights.safetensors"),
        r"[^/]+/(x|timesteps|context|y|polar_rad|azimuth_rad|cond_view|cond_motion|image_only_indicator|out)",
    ),
    Kind(r"unet_(?P<X>[^_]+)\.json", UNET, ("unet_{X}_weights.safetensors", "unet_{X}_cases.safetensors")),
    Kind(
        r"sampling\.safetensors",
        SAMPLING,
        entries=r"guider/[^/]+/(scale|in|out)|(sigmas|c_noise)/\d+|precond/(W|c_in|c_noise|c_out|c_skip|denoised|sigma|x)",
    ),
    Kind(r"guider_configs\.json", SAMPLING, ("sampling.safetensors",)),
    Kind(r"traj_(?P<X>.+)\.json", SAMPLING, ("traj_{X}.safetensors",)),
    Kind(
        r"traj_(?P<X>.+)\.safetensors",
        SAMPLING,
        ("traj_{X}.json",),
        CONDITION + r"|azimuth_rad|polar_rad|noise|x_init|sigmas|guidance_scale|denoised_\d+|x_after_step_\d+",
    ),
    Kind(
        r"conditioning\.safetensors",
        SAMPLING,
        entries=r"[^/]+/((sigma|polar|azimuth)_emb|(polar|azimuth)_rad|vector_(cond|uncond)|in|out_\d+)",
    ),
    Kind(
        r"windows_and_cameras\.json",
        "test_parity_windows.py",
        entries=r"[^|]+\|stride=.+|default_cameras|custom_cameras.*",
    ),
    Kind(r"preprocess\.json", "test_parity_preprocess.py", ("preprocess.safetensors",), "pillow|cases|note"),
    Kind(r"preprocess\.safetensors", "test_parity_preprocess.py", ("preprocess.json",), r"[^/]+/(in|out)"),
    Kind(r"vae_(?P<X>[^_]+)_weights\.safetensors", ENCODERS),
    Kind(
        r"vae_(?P<X>[^_]+)\.safetensors",
        ENCODERS,
        ("vae_{X}_weights.safetensors",),
        "image|moments|latent_mode|z|decoded_first_stage|decoded_with_post_quant_conv",
    ),
    Kind(r"clip\.json", ENCODERS, ("clip.safetensors", "clip_tiny_weights.safetensors")),
    Kind(
        r"clip\.safetensors",
        ENCODERS,
        entries=r"\d+x\d+/(image_u8|preprocessed)|tiny_tower/(image_embeds|input_key_shape)",
    ),
    Kind(r"clip_tiny_weights\.safetensors", ENCODERS, ("clip.json", "clip.safetensors")),
    Kind(r"e2e_(?P<X>.+)\.json", ENCODERS, ("e2e_{X}.safetensors",)),
    Kind(
        r"e2e_(?P<X>.+)\.safetensors",
        ENCODERS,
        ("e2e_{X}.json", "vae_tiny_weights.safetensors"),
        CONDITION + r"|(polar|azimuth)_rad|cond_(motion|view)_images_u8|encoded_(frames|views)_no_jitter|clip_embeds"
        r"|guidance_scale|noise|samples|samples_z",
    ),
    Kind(r"keys_sv4d2\.json", ENCODERS),
)


def kind_of(name: str) -> tuple[Kind, list[str]]:
    """The kind of a file and its companions' names; raises LookupError for a kind no test reads."""
    for kind in KINDS:
        match = re.fullmatch(kind.file, name)
        if match:
            return kind, [companion.format(**match.groupdict()) for companion in kind.companions]
    raise LookupError(f"{name} is of no kind that tests/parity reads: add it to KINDS and write its test.")


def entries(name: str) -> list[str]:
    """Names of a file's tensors or JSON keys."""
    data = folder.read(name)
    if name.endswith(".json"):
        return list(json.loads(data))
    (length,) = struct.unpack("<Q", data[:8])
    return [key for key in json.loads(data[8 : 8 + length]) if key != "__metadata__"]


def test_the_folder_holds_recordings() -> None:
    assert folder.files(), f"{folder.FOLDER} is empty"


@pytest.mark.parametrize("name", folder.files())
def test_every_file_is_read_by_a_test(name: str) -> None:
    kind, companions = kind_of(name)
    assert (Path(__file__).parent / kind.test).exists()
    if kind.entries is not None:
        unknown = [entry for entry in entries(name) if not re.fullmatch(kind.entries, entry)]
        assert not unknown, f"{name} records what no test compares: {unknown}"
    folder.need(*companions)


def test_a_new_kind_is_noticed() -> None:
    with pytest.raises(LookupError, match="no kind"):
        kind_of("flow_a.safetensors")
    assert kind_of("unet_z_cases.safetensors")[1] == ["unet_z.json", "unet_z_weights.safetensors"]
