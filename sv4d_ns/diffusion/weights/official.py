"""The released SV4D 2.0 files as a pipeline: checked by name and shape, read as a stream.

The layout of the files is that of the reference's model code (Stability-AI/generative-models @ 0ad7de9). The files
themselves are gated; nothing here was written against their content.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv4d_ns.diffusion.sv4d.attention import CameraAttention
from sv4d_ns.diffusion.sv4d.guidance import Guidance, GuidanceKind
from sv4d_ns.diffusion.sv4d.pipeline import RELEASED_CAMERA_DIMS, StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.sv4d.unet import MultiViewVideoUNet
from sv4d_ns.diffusion.weights.hub import DEFAULT_FILE, LICENCE, MODEL_URL, damaged, fetch, locate, verify
from sv4d_ns.diffusion.weights.key_maps import (
    clip_config,
    convert_clip,
    convert_unet,
    convert_vae,
    restore_clip,
    restore_unet,
    restore_vae,
    vae_config,
)
from sv4d_ns.diffusion.weights.streaming import TensorInfo, layout, read_tensors, unreadable
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.progress import bytes_bar

NAMES_SHOWN = 10
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Release:
    """What a released file's name says about it; its tensors do not: both files have the same names and shapes.

    Source: sv4d2.yaml, sv4d2_8views.yaml and the options of `simple_video_sample_4d2*.py`.
    """

    num_frames: int
    num_views: int
    camera_attention: CameraAttention
    guidance: Guidance


RELEASES = {
    "sv4d2.safetensors": Release(12, 4, CameraAttention.RELEASED, Guidance(GuidanceKind.LINEAR, 2.0)),
    "sv4d2_8views.safetensors": Release(
        5, 8, CameraAttention.PER_VIEW_PIXEL, Guidance(GuidanceKind.SPATIOTEMPORAL, 2.5, 1.5)
    ),
}

_AUTOENCODER = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "in_channels": 3, "out_ch": 3, "z_channels": 4}
_VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"width": 1280, "head_width": 80, "layers": 32, "image_size": 224, "patch_size": 14},
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of the networks in a file; the defaults are the released ones.

    Attributes:
        unet: `MultiViewVideoUNet` settings but for its camera attention, which is the `Release`'s.
        vae: `AutoencoderKL` settings.
        image_encoder: `CLIPVisionConfig` settings.
        camera_dims: sizes of the parts of the camera vector.
        image_size: pixels along the side of the pictures.
    """

    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=lambda: vae_config(_AUTOENCODER))
    image_encoder: Mapping[str, Any] = field(default_factory=lambda: clip_config(_VIT_H_14))
    camera_dims: Sequence[int] = tuple(RELEASED_CAMERA_DIMS)
    image_size: int = 576


UNET_PREFIX = "model.diffusion_model."
CLIP_PREFIX = "conditioner.embedders.0.open_clip.model."
DECODER_PREFIX = "first_stage_model."
FRAMES, VIEWS, MOTION = (f"conditioner.embedders.{index}" for index in (1, 4, 5))
AUTOENCODERS = {FRAMES: "frames", VIEWS: "views", MOTION: "motion, which nothing uses"}
"""The embedders that hold a whole autoencoder each (below `.encoder.`), and what the reference encodes with it."""

DROPPED = (
    # the text tower's leftovers; the reference's image embedder never runs them
    *(
        f"{CLIP_PREFIX}{name}"
        for name in ("positional_embedding", "text_projection", "logit_scale", "token_embedding.", "ln_final.")
    ),
    # the autoencoders beside the one that is read: compared with it (`compare_autoencoders`)
    f"{VIEWS}.encoder.",
    f"{MOTION}.encoder.",
    # the embedders' autoencoders only encode
    *(f"{FRAMES}.encoder.{name}" for name in ("decoder.", "post_quant_conv.")),
    # not in the files as the model code would write them, but read by nobody if they are (the reference does not load
    # strictly): the other half of the first-stage autoencoder, and what a trainer saves beside a network
    *(f"{DECODER_PREFIX}{name}" for name in ("encoder.", "quant_conv.", "post_quant_conv.", "loss.")),
    "model_ema.",
    "loss_fn.",
    "denoiser.",
)
"""Starts of the names of tensors that may be in a file and are not read."""


@dataclass(frozen=True)
class Part:
    """The tensors below one prefix of a file and the component of the pipeline whose weights they are."""

    component: str
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor the component needs from here, by its name in the file."""
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """From the reference's names without the prefix to ours; see `checkpoints`."""

    def convert(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What one tensor of the file becomes: one of ours, or the three of a fused q/k/v."""
        return self.rename({name.removeprefix(self.prefix): tensor})


@dataclass(frozen=True)
class OfficialFile:
    """A released file that was found whole and in order, and the empty components it fills."""

    path: Path
    release: Release
    sha256: str | None
    """The checksum that was verified, if one was known."""
    layout: Mapping[str, TensorInfo]
    architecture: Architecture
    components: Mapping[str, Any]
    """`unet`, `vae` and `image_encoder`; their parameters are on the meta device."""
    parts: Sequence[Part]

    def pipeline(self) -> StableVideo4D2Pipeline:
        """The pipeline around the components as they are."""
        return StableVideo4D2Pipeline(
            **self.components,
            scheduler=released_scheduler(),
            num_frames=self.release.num_frames,
            num_views=self.release.num_views,
            image_size=self.architecture.image_size,
            guidance=self.release.guidance.to_config(),
            camera_dims=list(self.architecture.camera_dims),
        )


def load_official_pipeline(
    device: torch.device | str = "cpu",
    checkpoint: str | PathLike[str] = DEFAULT_FILE,
    dtype: torch.dtype | None = None,
    architecture: Architecture | None = None,
    *,
    torch_dtype: torch.dtype | None = None,
    **opening: Any,
) -> StableVideo4D2Pipeline:
    """The released model, ready to sample; says in a printed line under which licence.

    Tensors go one by one from the file to the device, so that main memory never holds the whole file. The autoencoder
    stays float32, as the reference decodes in float32.

    Args:
        device: where the weights go.
        checkpoint: one of the names in `RELEASES`, fetched from the hub (HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are
            honoured) unless such a file is in the working directory; a local file or folder; or a repository of the
            hub, see `hub.locate`.
        dtype: of the network and the image encoder; float16 by default.
        architecture: the released one by default.
        torch_dtype: the older name of `dtype` in diffusers.
        opening: further arguments of `open_official`.

    Raises:
        InputError: when the file cannot be had, is damaged, or has missing, unknown or wrongly shaped tensors.
    """
    official = open_official(checkpoint, architecture=architecture, **opening)
    half = dtype or torch_dtype or torch.float16
    names = [name for part in official.parts for name in part.shapes]
    sources = {name: part for part in official.parts for name in part.shapes}
    states: dict[str, dict[str, Tensor]] = {component: {} for component in official.components}
    report_differences(compare_autoencoders(official.path, official.layout))
    with bytes_bar(f"Loading {official.path.name}", sum(official.layout[name].nbytes for name in names)) as advance:
        for name, tensor in zip(names, stream(official.path, names), strict=True):
            part = sources[name]
            kind = torch.float32 if part.component == "vae" else half
            moved = tensor.to(torch.device(device), kind)
            if not torch.isfinite(moved).all():
                raise damaged(official.path, f"{name} has values that are not finite as {kind}")
            states[part.component] |= part.convert(name, moved)
            advance(tensor.nbytes)
    for component, module in official.components.items():
        module.load_state_dict(states[component], strict=True, assign=True)
        module.eval()
    return official.pipeline().to(device)


def open_official(
    checkpoint: str | PathLike[str] = DEFAULT_FILE,
    *,
    architecture: Architecture | None = None,
    model: str | None = None,
    filename: str | None = None,
    variant: str | None = None,
    sha256: str | None = None,
    ignore_unknown: bool = False,
    **download: Any,
) -> OfficialFile:
    """Find a released file, name its licence, and check it: checksum where one is known, names, shapes, size.

    Args:
        checkpoint, filename, variant: see `hub.locate`.
        architecture: the released one by default.
        model: "sv4d2" or "sv4d2_8views", for a file whose name does not say which of the two it is.
        sha256: checksum to verify; see `hub.verify`.
        ignore_unknown: accept tensors nobody knows (they are named, and not read).
        download: for `huggingface_hub.hf_hub_download`.

    Raises:
        InputError: when the file cannot be had, is damaged, or has missing, unknown or wrongly shaped tensors.
    """
    architecture = architecture or Architecture()
    source = locate(checkpoint, filename, variant)
    release = release_of(source.name, model)
    path = fetch(source, **download)
    print(f"The SV4D 2.0 weights ({path}) are used under the {LICENCE}: {MODEL_URL}")
    verified = verify(path, sha256)
    with reading(path):
        found = layout(path)
    components = empty_components(architecture, release)
    parts = parts_of(components)
    check_layout(path, found, parts, ignore_unknown)
    return OfficialFile(path, release, verified, found, architecture, components, parts)


def release_of(name: str, model: str | None = None) -> Release:
    """What a file's name (or `model`, where it is given) says about it.

    Raises:
        InputError: when it says nothing.
    """
    stem = model or name.removesuffix(".safetensors").split(".")[0]
    if f"{stem}.safetensors" in RELEASES and (model or name.endswith(".safetensors")):
        return RELEASES[f"{stem}.safetensors"]
    known = " or ".join(RELEASES)
    raise InputError(
        f"'{model or name}' is not {known}: give the file one of these names (the tensors do not say which model they "
        "are), or say --model sv4d2 or sv4d2_8views where there is that flag."
    )


def empty_components(architecture: Architecture, release: Release) -> dict[str, Any]:
    """Network, autoencoder and image encoder whose parameters are on the meta device (buffers are real)."""
    with init_empty_weights(include_buffers=False):
        return {
            "unet": MultiViewVideoUNet(**architecture.unet, camera_attention=release.camera_attention.value),
            "vae": AutoencoderKL(**architecture.vae),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**architecture.image_encoder)),
        }


def parts_of(components: Mapping[str, Any]) -> list[Part]:
    """Where in a released file the weights of the components are."""
    unet, vae, image_encoder = (components[name] for name in ("unet", "vae", "image_encoder"))
    depth, levels = unet.config["layers_per_block"], len(vae.config.block_out_channels)
    vae_state = restore_vae(vae.state_dict(), levels)
    decoder = {name: tensor for name, tensor in vae_state.items() if name.startswith("decoder.")}
    encoder = {name: tensor for name, tensor in vae_state.items() if name not in decoder}

    def part(component: str, prefix: str, state: Mapping[str, Tensor], rename: Any) -> Part:
        return Part(
            component, prefix, {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in state.items()}, rename
        )

    def to_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return convert_unet(state, depth)

    def to_vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return convert_vae(state, levels)

    return [
        part("unet", UNET_PREFIX, restore_unet(unet.state_dict(), unet.config), to_unet),
        part("image_encoder", CLIP_PREFIX, restore_clip(image_encoder.state_dict()), convert_clip),
        part("vae", f"{FRAMES}.encoder.", encoder, to_vae),
        part("vae", DECODER_PREFIX, decoder, to_vae),
    ]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file's bytes is one sentence.

    Raises:
        InputError: for a file that cannot be opened, or is not the safetensors file its header says.
    """
    try:
        with unreadable(path):
            yield
    except SafetensorError as error:
        raise damaged(path, error) from error


def stream(path: Path, names: Sequence[str]) -> Iterator[Tensor]:
    """`streaming.read_tensors` with the errors of `reading`."""
    with reading(path):
        yield from read_tensors(path, names)


def check_layout(
    path: Path, found: Mapping[str, TensorInfo], parts: Sequence[Part], ignore_unknown: bool = False
) -> None:
    """Every tensor of the components is there with its shape, and nothing else but what is known to be left out.

    Raises:
        InputError: naming every tensor that is missing, unknown, wrongly shaped or not of a floating-point type.
    """
    expected = {name: shape for part in parts for name, shape in part.shapes.items()}
    if not any(name.startswith(UNET_PREFIX) for name in found):
        raise InputError(
            f"{path} is not an SV4D 2.0 checkpoint: it has no tensor below {UNET_PREFIX} (but {_some(list(found))}); "
            f"give the file of {MODEL_URL}."
        )
    unknown = [name for name in found if name not in expected and not name.startswith(DROPPED)]
    if unknown and ignore_unknown:
        print(f"Not read, because unknown: {', '.join(unknown)}.")
        unknown = []
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": unknown,
        "wrongly shaped": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
        "not of a floating-point type": [
            f"{name} {found[name].dtype}" for name in expected if name in found and found[name].dtype not in FLOATING
        ],
    }
    told = [f"{len(names)} {what} ({', '.join(names)})" for what, names in problems.items() if names]
    if told:
        only_unknown = len(told) == 1 and bool(unknown)
        remedy = ", or leave them out with ignore_unknown (--ignore-unknown)" if only_unknown else ""
        raise InputError(
            f"{path} is not an SV4D 2.0 checkpoint: of its tensors {'; '.join(told)}; give the file of "
            f"{MODEL_URL}{remedy}."
        )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


ABSENT = "not in the file"


@dataclass(frozen=True)
class Difference:
    """A tensor of one of the `AUTOENCODERS` that is not the one of the same name in `FRAMES`, which is read."""

    embedder: str
    name: str
    """Below `<embedder>.encoder.`; empty where the whole autoencoder is `ABSENT`."""
    reason: str

    @property
    def matters(self) -> bool:
        """Whether the reference computes with it."""
        return self.embedder == VIEWS and self.name.startswith(("encoder.", "quant_conv."))


def compare_autoencoders(path: Path, found: Mapping[str, TensorInfo]) -> list[Difference]:
    """Compare the three embedded autoencoders, tensor by tensor.

    Nothing in the reference makes them equal; this pipeline has one.

    Args:
        path: the file.
        found: its layout.
    """
    prefixes = [f"{key}.encoder." for key in AUTOENCODERS]
    names = {name.removeprefix(prefix) for prefix in prefixes for name in found if name.startswith(prefix)}
    present = [key for key in (VIEWS, MOTION) if any(name.startswith(f"{key}.encoder.") for name in found)]
    pairs, differences = [], []
    if VIEWS not in present:
        differences.append(Difference(VIEWS, "", ABSENT))
    for name in sorted(names):
        for embedder in present:
            first, second = (found.get(f"{key}.encoder.{name}") for key in (FRAMES, embedder))
            if first is None or second is None:
                differences.append(Difference(embedder, name, f"only in {FRAMES if first else embedder}"))
            elif first.shape != second.shape:
                differences.append(Difference(embedder, name, f"{list(second.shape)} instead of {list(first.shape)}"))
            else:
                pairs.append((embedder, name))
    wanted = [f"{key}.encoder.{name}" for embedder, name in pairs for key in (FRAMES, embedder)]
    tensors = stream(path, wanted)
    with bytes_bar("Comparing the autoencoders", sum(found[name].nbytes for name in wanted)) as advance:
        for (embedder, name), one, other in zip(pairs, tensors, tensors, strict=True):
            if not _equal(one, other):
                largest = (one.float() - other.float()).abs().max().item()
                differences.append(Difference(embedder, name, f"max abs difference {largest:.3g}"))
            advance(one.nbytes + other.nbytes)
    return differences


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype:
        return torch.equal(first.double(), second.double())
    # bits: a value that is not a number equals itself here
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def report_differences(differences: Sequence[Difference]) -> None:
    """Print one line for each autoencoder that differs: in what, by how much, and what is used."""
    for embedder in (VIEWS, MOTION):
        own = [difference for difference in differences if difference.embedder == embedder]
        if not own:
            continue
        if own[0].reason == ABSENT:
            print(f"The file has no {embedder} ({AUTOENCODERS[embedder]}): {FRAMES} encodes both.")
            continue
        used = (
            f"{FRAMES} encodes both, so the results will differ from the reference's"
            if any(difference.matters for difference in own)
            else "no result depends on them"
        )
        names = _some([f"{difference.name} ({difference.reason})" for difference in own])
        print(
            f"The autoencoder of {embedder} ({AUTOENCODERS[embedder]}) differs from that of {FRAMES} "
            f"({AUTOENCODERS[FRAMES]}) in {len(own)} tensors: {names}; {used}."
        )
