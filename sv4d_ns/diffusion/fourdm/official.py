"""The released 4Diffusion weights as a pipeline: which files, where from, and what is in them.

Two sources are needed. ImageDream's weights and encoders come from a repository on the hub in Hugging Face's layout
(the repository the reference itself names for the text encoder was taken down; the same encoder is in ImageDream's).
4Diffusion's own `4dm.ckpt` is on the authors' drive only, so the user brings the file. Nothing here was written against
the contents of either; they are checked by name and shape, and what was found is reported.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from sv4d_ns.diffusion.fourdm.checkpoints import MOTION, convert_network
from sv4d_ns.diffusion.fourdm.guidance import ddim_scheduler
from sv4d_ns.diffusion.fourdm.pipeline import FourDMPipeline
from sv4d_ns.diffusion.fourdm.unet import FourDMUNet
from sv4d_ns.utils.errors import InputError

IMAGEDREAM = "ashawkey/imagedream-ipmv-diffusers"
"""ImageDream (pixel controller), Stable Diffusion 2.1's autoencoder, OpenCLIP ViT-H/14's two halves; openrail."""
IMAGEDREAM_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DRIVE = "https://drive.google.com/drive/folders/19k3p2CfzQ6ArqpDNOy73RJeJhWfNs4i6"
"""Where the authors of 4Diffusion keep 4dm.ckpt."""
CHECKPOINT_FLAG = "--pipeline.datamanager.fourdm-checkpoint"
REMEDY = "or go without these weights: --pipeline.datamanager.synthesis bundled"
NAMES_SHOWN = 5

_PREFIXES = ("module.", "model.diffusion_model.")
_OTHER_PARTS = ("vae_model.", "clip_model.", "model_ema.")
"""Other models in ImageDream's own file, whose Hugging Face form is used instead."""


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint of 4Diffusion turned out to hold."""

    path: Path
    contents: Literal["motion modules", "whole network", "whole pipeline"]
    tensors: int

    def sentence(self) -> str:
        """One line for the log."""
        rest = " on top of ImageDream's weights" if self.contents == "motion modules" else ""
        rest = " with its own encoders" if self.contents == "whole pipeline" else rest
        return f"{self.path.name} holds the {self.contents} ({self.tensors} tensors); used{rest}."


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .ckpt, .pt or .safetensors file, without the prefixes its trainer left; nothing is executed.

    Raises:
        InputError: the file cannot be read, or holds more than tensors (such a file could run any code).
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the path of a downloaded checkpoint ({DRIVE}).")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{path} is refused, because it holds more than tensors and loading it could run code ({reason}): save its "
            "state_dict alone, with torch.save or as safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or incomplete ({error}): download it again ({DRIVE}).") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise InputError(f"{path} holds no state_dict of tensors: give 4dm.ckpt ({DRIVE}).")
    return {_stripped(name): value for name, value in state.items() if not name.startswith(_OTHER_PARTS)}


def _stripped(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def fill_network(network: FourDMUNet, checkpoint: Path, imagedream: Mapping[str, Tensor] | None) -> CheckpointReport:
    """Load 4Diffusion's checkpoint, over ImageDream's weights where it holds the motion modules alone.

    Args:
        network: may be on the meta device; its parameters are replaced.
        checkpoint: 4dm.ckpt.
        imagedream: ImageDream's tensors under their own names; only asked for where they are needed.

    Raises:
        InputError: tensors are missing, unknown or wrongly shaped.
    """
    depth = network.config.layers_per_block
    state = read_tensors(checkpoint)
    motion_only = all(MOTION in f".{name}" for name in state)
    found = convert_network(state, depth)
    if motion_only:
        if imagedream is None:
            raise InputError(
                f"{checkpoint} holds the motion modules alone: ImageDream's weights ({IMAGEDREAM}) are needed, too."
            )
        found = {**convert_network(imagedream, depth), **found}
    _check(found, network, checkpoint)
    network.load_state_dict(found, strict=True, assign=True)
    return CheckpointReport(checkpoint, "motion modules" if motion_only else "whole network", len(state))


def _check(found: Mapping[str, Tensor], network: FourDMUNet, path: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [n for n, shape in expected.items() if n in found and tuple(found[n].shape) != shape],
    }
    listed = [
        f"{len(names)} {what} ({', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''})"
        for what, names in problems.items()
        if names
    ]
    if listed:
        raise InputError(
            f"{path} does not make 4Diffusion's network: of its tensors {'; '.join(listed)}; give 4dm.ckpt ({DRIVE})."
        )


def holds_motion_only(checkpoint: Path) -> bool:
    """Whether a checkpoint needs ImageDream's weights beside it."""
    return all(MOTION in f".{name}" for name in read_tensors(checkpoint))


def load_fourdm_pipeline(
    checkpoint: Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.float16,
    imagedream: str | Path = IMAGEDREAM,
) -> tuple[FourDMPipeline, CheckpointReport]:
    """The released model, ready to sample, and what the checkpoint held.

    The network and the image encoder are in `dtype`; the autoencoder is, too, as in the reference.

    Args:
        checkpoint: 4dm.ckpt, or a folder that `FourDMPipeline.save_pretrained` wrote (of a model of any size).
        imagedream: a repository on the hub, or a folder, with `vae`, `text_encoder`, `tokenizer`, `image_encoder` and
            `unet` in it; not asked for where the checkpoint is a folder.

    Raises:
        InputError: a file cannot be had or does not fit.
    """
    if checkpoint.is_dir():
        return _load_saved(checkpoint, device, dtype)
    with init_empty_weights(include_buffers=False):
        network = FourDMUNet()
    base = read_tensors(_imagedream_weights(imagedream)) if holds_motion_only(checkpoint) else None
    report = fill_network(network, checkpoint, base)
    source = str(imagedream)
    try:
        pipeline = FourDMPipeline(
            vae=AutoencoderKL.from_pretrained(source, subfolder="vae", use_safetensors=True, dtype=dtype),
            text_encoder=CLIPTextModel.from_pretrained(
                source, subfolder="text_encoder", use_safetensors=True, dtype=dtype
            ),
            tokenizer=CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
            image_encoder=CLIPVisionModelWithProjection.from_pretrained(
                source, subfolder="image_encoder", use_safetensors=True, dtype=dtype
            ),
            feature_extractor=CLIPImageProcessor(),
            unet=network.to(dtype).eval(),
            scheduler=ddim_scheduler(),
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"ImageDream's encoders could not be had from {imagedream} ({reason}): {REMEDY}.") from error
    return pipeline.to(device), report


def _load_saved(
    folder: Path, device: torch.device | str, dtype: torch.dtype
) -> tuple[FourDMPipeline, CheckpointReport]:
    """A pipeline that was saved as a whole."""
    try:
        pipeline = FourDMPipeline.from_pretrained(folder, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder} holds no 4DM pipeline ({reason}): give the path of 4dm.ckpt, or of a folder that "
            f"FourDMPipeline.save_pretrained wrote, {REMEDY}."
        ) from error
    pipeline.unet.eval()
    tensors = len(pipeline.unet.state_dict())
    return pipeline.to(device), CheckpointReport(folder, "whole pipeline", tensors)


def _imagedream_weights(source: str | Path) -> Path:
    local = Path(source) / IMAGEDREAM_WEIGHTS
    if local.is_file():
        return local
    try:
        return Path(hf_hub_download(str(source), IMAGEDREAM_WEIGHTS))
    except Exception as error:  # the client's errors differ from version to version
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"ImageDream's weights could not be had from {source} ({reason}): check the network and the free disk "
            f"space, {REMEDY}."
        ) from error
