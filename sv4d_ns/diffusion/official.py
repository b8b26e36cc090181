"""The released SV4D 2.0 files as a pipeline: found on the hub or on disk, checked by name and shape, read as a stream.

The layout of the files is that of the reference's model code (Stability-AI/generative-models @ 0ad7de9). The files
themselves are gated; nothing here was written against their content.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv4d_ns.diffusion.attention import CameraAttention
from sv4d_ns.diffusion.checkpoints import (
    clip_config,
    convert_clip,
    convert_unet,
    convert_vae,
    restore_clip,
    restore_unet,
    restore_vae,
    vae_config,
)
from sv4d_ns.diffusion.guidance import Guidance, GuidanceKind
from sv4d_ns.diffusion.pipeline import RELEASED_CAMERA_DIMS, StableVideo4D2Pipeline, released_scheduler
from sv4d_ns.diffusion.unet import MultiViewVideoUNet
from sv4d_ns.errors import InputError

REPOSITORY = "stabilityai/sv4d2.0"
MODEL_URL = f"https://huggingface.co/{REPOSITORY}"
LICENCE = "Stability AI Community License"
REMEDY = "or go without these weights: --pipeline.datamanager.synthesis embedded"
NAMES_SHOWN = 10


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


def load_official_pipeline(
    device: torch.device | str,
    checkpoint: str | Path = "sv4d2.safetensors",
    dtype: torch.dtype = torch.float16,
    architecture: Architecture | None = None,
) -> StableVideo4D2Pipeline:
    """The released model, ready to sample; says in a printed line under which licence.

    Tensors go one by one from the file to the device, so that main memory never holds the whole file. The autoencoder
    stays float32, as the reference decodes in float32.

    Args:
        device: where the weights go.
        checkpoint: one of the names in `RELEASES`, fetched from the hub (HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are
            honoured) unless such a file is in the working directory; or the path of a local file of one of these names.
        dtype: of the network and the image encoder.
        architecture: the released one by default.

    Raises:
        InputError: when the file cannot be had, is damaged, or has missing, unknown or wrongly shaped tensors.
    """
    architecture = architecture or Architecture()
    path, release = locate(checkpoint)
    print(f"The SV4D 2.0 weights ({path}) are used under the {LICENCE}: {MODEL_URL}")
    unet, vae, image_encoder = _empty_modules(architecture, release)
    parts = _parts(unet, vae, image_encoder)
    with _opened(path) as file:
        names = file.keys()
        _check_layout(path, {name: tuple(file.get_slice(name).get_shape()) for name in names}, parts)
        _check_same_autoencoder(path, file, parts)
        for module, kind in ((unet, dtype), (image_encoder, dtype), (vae, torch.float32)):
            state: dict[str, Tensor] = {}
            for part in parts:
                if part.module is module and part.prefix != VIEWS_PREFIX:
                    state |= _read(path, file, part, torch.device(device), kind)
            module.load_state_dict(state, strict=True, assign=True)
            module.eval()
    return StableVideo4D2Pipeline(
        vae,
        image_encoder,
        unet,
        released_scheduler(),
        num_frames=release.num_frames,
        num_views=release.num_views,
        image_size=architecture.image_size,
        guidance=release.guidance.to_config(),
        camera_dims=list(architecture.camera_dims),
    ).to(device)


def locate(checkpoint: str | Path) -> tuple[Path, Release]:
    """The file on this machine, downloaded where it is not, and what its name says about it.

    Raises:
        InputError: when it is not one of the released files, or cannot be had.
    """
    path = Path(checkpoint)
    known = " or ".join(RELEASES)
    if path.name not in RELEASES:
        raise InputError(
            f"'{checkpoint}' is not {known}: give one of these names, or a local file of that name (the name says "
            "which of the two models it is; the tensors do not)."
        )
    release = RELEASES[path.name]
    if path.is_file():
        return path, release
    if path.parent != Path():
        raise InputError(f"{path} does not exist: give an existing file, or just {path.name} to fetch it from the hub.")
    return _download(path.name), release


def _download(name: str) -> Path:
    """The cached or freshly fetched file; every way this can fail is one sentence."""
    log_in = f"accept the licence at {MODEL_URL}, log in with 'hf auth login' (or set HF_TOKEN)"
    try:
        return Path(hf_hub_download(REPOSITORY, name))
    except GatedRepoError as error:
        raise InputError(
            f"The official SV4D 2.0 weights need your consent to the {LICENCE}: {log_in}, {REMEDY}."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"The hub shows no repository {REPOSITORY} to you: look at {MODEL_URL}; if it is there, {log_in}, {REMEDY}."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{name} is not in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE forbids to fetch it: unset "
                f"HF_HUB_OFFLINE, or set HF_HOME to a cache that has it, {REMEDY}."
            ) from error
        raise InputError(
            f"{name} is not in the cache {constants.HF_HUB_CACHE} and the hub cannot be reached: connect to the "
            f"network, or copy the file from {MODEL_URL} here, {REMEDY}."
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"{MODEL_URL} has no file {name}: look there for its new name, {REMEDY}.") from error
    except Exception as error:  # the client's transport errors differ from version to version
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"{name} could not be fetched from {MODEL_URL} ({reason}): check the network, the free disk space and "
            f"that you are logged in ('hf auth login'), {REMEDY}."
        ) from error


UNET_PREFIX = "model.diffusion_model."
CLIP_PREFIX = "conditioner.embedders.0.open_clip.model."
FRAMES_PREFIX = "conditioner.embedders.1.encoder."
VIEWS_PREFIX = "conditioner.embedders.4.encoder."
DECODER_PREFIX = "first_stage_model."

DROPPED = (
    # the text tower's leftovers; the reference's image embedder never runs them
    *(
        f"{CLIP_PREFIX}{name}"
        for name in ("positional_embedding", "text_projection", "logit_scale", "token_embedding.", "ln_final.")
    ),
    # the embedders' autoencoders only encode
    *(f"{prefix}{name}" for prefix in (FRAMES_PREFIX, VIEWS_PREFIX) for name in ("decoder.", "post_quant_conv.")),
    # cond_motion: encoded by the reference, and used nowhere
    "conditioner.embedders.5.",
    # not in the files as the model code would write them, but read by nobody if they are (the reference does not load
    # strictly): the other half of the first-stage autoencoder, and what a trainer saves beside a network
    *(f"{DECODER_PREFIX}{name}" for name in ("encoder.", "quant_conv.", "post_quant_conv.", "loss.")),
    "model_ema.",
    "loss_fn.",
    "denoiser.",
)
"""Starts of the names of tensors that may be in a file and are not read."""


@dataclass(frozen=True)
class _Part:
    """The tensors below one prefix of a file, and the module they fill (or a part of it)."""

    prefix: str
    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor the module needs from here, by its name in the file."""
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def _empty_modules(architecture: Architecture, release: Release) -> tuple[MultiViewVideoUNet, Any, Any]:
    """Network, autoencoder and image encoder whose parameters are on the meta device (buffers are real)."""
    with init_empty_weights(include_buffers=False):
        unet = MultiViewVideoUNet(**architecture.unet, camera_attention=release.camera_attention.value)
        vae = AutoencoderKL(**architecture.vae)
        image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**architecture.image_encoder))
    return unet, vae, image_encoder


def _parts(unet: MultiViewVideoUNet, vae: Any, image_encoder: nn.Module) -> list[_Part]:
    depth, levels = unet.config["layers_per_block"], len(vae.config.block_out_channels)
    vae_state = restore_vae(vae.state_dict(), levels)
    decoder = {name: tensor for name, tensor in vae_state.items() if name.startswith("decoder.")}
    encoder = {name: tensor for name, tensor in vae_state.items() if name not in decoder}
    clip = restore_clip(image_encoder.state_dict())

    def part(prefix: str, module: nn.Module, state: Mapping[str, Tensor], convert: Any) -> _Part:
        shapes = {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in state.items()}
        return _Part(prefix, module, shapes, convert)

    def to_vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return convert_vae(state, levels)

    return [
        part(UNET_PREFIX, unet, restore_unet(unet.state_dict(), unet.config), lambda state: convert_unet(state, depth)),
        part(CLIP_PREFIX, image_encoder, clip, convert_clip),
        part(FRAMES_PREFIX, vae, encoder, to_vae),
        part(VIEWS_PREFIX, vae, encoder, to_vae),
        part(DECODER_PREFIX, vae, decoder, to_vae),
    ]


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(
        f"{path} is damaged or incomplete ({reason}): delete it and fetch it again from {MODEL_URL}, {REMEDY}."
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, read lazily; whatever is wrong with its bytes is one sentence."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _check_layout(path: Path, found: Mapping[str, tuple[int, ...]], parts: Sequence[_Part]) -> None:
    """Every tensor of the networks is there with its shape, and nothing else but what is known to be left out."""
    expected = {name: shape for part in parts for name, shape in part.shapes.items()}
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected and not name.startswith(DROPPED)]
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    counts = (("missing", missing), ("unknown", unknown), ("wrongly shaped", misshapen))
    problems = [f"{len(names)} {what} ({_listed(names)})" for what, names in counts if names]
    if problems:
        raise InputError(
            f"{path} is not an SV4D 2.0 checkpoint: of its tensors {'; '.join(problems)}; give the file of {MODEL_URL}."
        )


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _check_same_autoencoder(path: Path, file: Any, parts: Sequence[_Part]) -> None:
    """The frames' and the views' encoders are equal, so that one autoencoder serves both."""
    frames = next(part for part in parts if part.prefix == FRAMES_PREFIX)
    for name in frames.shapes:
        other = name.replace(FRAMES_PREFIX, VIEWS_PREFIX)
        first, second = file.get_tensor(name), file.get_tensor(other)
        if not torch.equal(first, second):
            difference = (first.float() - second.float()).abs().max().item()
            raise InputError(
                f"{path} encodes frames and views with different autoencoders ({name} and {other} differ by up to "
                f"{difference:.3g}), which this pipeline cannot do: give the file of {MODEL_URL}."
            )


def _read(path: Path, file: Any, part: _Part, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A part's tensors under our names, on the device."""
    state: dict[str, Tensor] = {}
    for name in part.shapes:
        tensor = file.get_tensor(name).to(device, dtype)
        if not torch.isfinite(tensor).all():
            raise _damaged(path, f"{name} has values that are not finite as {dtype}")
        state |= part.convert({name.removeprefix(part.prefix): tensor})
    return state
