"""The networks that metrics look through: where they come from, how they are checked, and what happens without them.

None is shipped and nothing is downloaded unless the user asks (`fetch=True`, `sv4d evaluate --fetch`). Every file has a
pinned identity: a hash, or the commit of the repository it lies in. A network that is not at hand raises
`BackboneMissing`, whose sentence says what to do; the other metrics go on.

- LPIPS: `metrics/lpips.py`.
- CLIP: ViT-B/32, `CLIP_MODEL` on huggingface.co, at a commit.
- I3D (Kinetics-400, the TorchScript file of StyleGAN-V, Skorokhodov et al. 2022): `I3D_URL`, or its copy on
  huggingface.co, `I3D_MIRROR`; either way `I3D_SHA256`.

A TorchScript file is a program: torch.jit.load hands it to an interpreter that can, among other things, open files. So
it is never opened before its sha256 is the pinned one, or one the user gave on purpose.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sv4d_ns.metrics.lpips import BackboneMissing, Identity
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import sha256

CLIP_MODEL = ("openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268")
"""Repository and commit on huggingface.co; it has no safetensors file there."""

I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
I3D_MIRROR = ("flateon/FVD-I3D-torchscript", "1c2d61711c52571ad617a1063e6fa691b212e184", "i3d_torchscript.pt")
"""Repository, commit and file on huggingface.co."""
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
I3D_MIN_FRAMES = 10
"""Shorter videos vanish in its temporal pooling (strides of 8 in all, then a window of 2)."""

BATCH = 16


# ---------------------------------------------------------------------------------------------------------------- CLIP


class Clip:
    """CLIP's image embeddings (Radford et al. 2021) through transformers."""

    def __init__(self, model: nn.Module, processor: Any, identity: Identity) -> None:
        self.model, self.processor, self.identity = model.eval(), processor, identity

    @torch.no_grad()
    def embed(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[np.ndarray, "n d"]:
        """Projected embeddings of pictures in [0, 1], not normalised; resized and cropped as the model was trained."""
        parts = []
        for part in pictures.split(BATCH):
            levels = [(picture * 255).round().byte().permute(1, 2, 0).numpy() for picture in part]
            pixels = self.processor(images=levels, return_tensors="pt")["pixel_values"]
            parts.append(self.model(pixel_values=pixels).image_embeds)
        return torch.cat(parts).double().numpy()


def load_clip(fetch: bool = False) -> Clip:
    """`CLIP_MODEL` from the Hugging Face cache; raises `BackboneMissing`."""
    from huggingface_hub import snapshot_download

    repository, revision = CLIP_MODEL
    patterns = ["config.json", "preprocessor_config.json", "pytorch_model.bin"]
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=not fetch)
    except OSError as error:
        how = "go online" if fetch else "'sv4d evaluate --fetch' downloads it"
        raise BackboneMissing(
            f"CLIP (ViT-B/32) needs {repository} at {revision[:7]} in the Hugging Face cache: {how}."
        ) from error
    return open_clip(Path(folder), "CLIP ViT-B/32", f"huggingface.co/{repository}@{revision}")


def open_clip(folder: Path, name: str, source: str) -> Clip:
    """A CLIP model in a folder as transformers saves it."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
    from transformers.utils import logging

    logging.set_verbosity_error()  # the text half of the file is left out on purpose
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    model = CLIPVisionModelWithProjection.from_pretrained(folder)
    return Clip(model, CLIPImageProcessor.from_pretrained(folder), Identity(name, source, files))


# -------------------------------------------------------------------------------------------------------------- videos


class VideoFeatures(Protocol):
    """Turns videos into features whose distributions are compared."""

    identity: Identity
    prefix: str
    """Begins the names of the metrics made with it."""
    min_frames: int

    def features(self, videos: Float[Tensor, "n l 3 h w"]) -> Float[np.ndarray, "n d"]:
        """Of videos in [0, 1]."""
        ...


class I3D:
    """FVD's features: Kinetics-400 logits of I3D (Carreira and Zisserman 2017), as StyleGAN-V packed them."""

    prefix = "fvd"
    min_frames = I3D_MIN_FRAMES

    def __init__(self, module: nn.Module, identity: Identity) -> None:
        self.module, self.identity = module.eval(), identity

    @torch.no_grad()
    def features(self, videos: Float[Tensor, "n l 3 h w"]) -> Float[np.ndarray, "n d"]:
        """Logits of square videos in [0, 1], resized to 224 (bilinear, antialiased when shrinking), in [-1, 1]."""
        parts = []
        for video in videos:
            frames = nn.functional.interpolate(video, (224, 224), mode="bilinear", antialias=True, align_corners=False)
            batch = (2 * frames - 1).permute(1, 0, 2, 3)[None].contiguous()
            parts.append(self.module(batch, rescale=False, resize=False, return_features=True).reshape(1, -1))
        return torch.cat(parts).double().numpy()


def load_i3d(path: Path | None = None, trusted_sha256: str | None = None, fetch: bool = False) -> I3D:
    """The I3D of FVD.

    Args:
        path: a TorchScript file; None looks in the Hugging Face cache (and fetches `I3D_MIRROR` if `fetch`).
        trusted_sha256: accept this file instead of the pinned one. It is a program: say so only of one you trust.

    Raises:
        BackboneMissing: no path was given and the cache has no file.
        InputError: the file does not exist or is not the trusted one.
    """
    if path is None:
        path = _cached_i3d(fetch)
    elif not path.is_file():
        raise InputError(f"--i3d {path} does not exist: download {I3D_URL} and give its path.")
    digest, wanted = sha256(path), (trusted_sha256 or I3D_SHA256).lower()
    if digest != wanted:
        raise InputError(
            f"{path} has the sha256 {digest}, not {wanted}, and is not opened, because TorchScript is a program: "
            f"download {I3D_URL}, or give --i3d-sha256 {digest} if you trust this file."
        )
    try:
        module = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise InputError(f"{path} is not a TorchScript file of this torch version ({error}).") from error
    return I3D(module, Identity("I3D Kinetics-400 logits", str(path), {path.name: digest}))


def _cached_i3d(fetch: bool) -> Path:
    from huggingface_hub import hf_hub_download

    repository, revision, name = I3D_MIRROR
    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=not fetch))
    except OSError as error:
        how = "go online" if fetch else "'sv4d evaluate --fetch' downloads it"
        raise BackboneMissing(
            f"FVD needs the I3D network (51 MB): {how}, or download {I3D_URL} yourself and give it as --i3d."
        ) from error


class RandomVideoFeatures:
    """A stand-in where no backbone is at hand: features of a fixed random 3D convolution network.

    Random convolutions tell blur, flicker, jumps and wrong colours from their absence, but know nothing of objects. The
    metrics made with them are called rfd, never fvd, and compare only with each other.
    """

    prefix = "rfd"
    min_frames = 1
    size = 64
    """Pixels that pictures are resized to."""
    channels = (3, 16, 32, 32)

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.weights = [
            torch.from_numpy(rng.normal(size=(b, a, 3, 3, 3)) * np.sqrt(2 / (27 * a))).float()
            for a, b in zip(self.channels, self.channels[1:], strict=False)
        ]
        self.identity = Identity("random 3D convolutions", f"numpy PCG64, seed {seed}", {})

    @torch.no_grad()
    def features(self, videos: Float[Tensor, "n l 3 h w"]) -> Float[np.ndarray, "n 64"]:
        """Mean and standard deviation of the last activations over time and space."""
        parts = []
        for video in videos:
            small = nn.functional.interpolate(
                video, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
            x = (2 * small - 1).permute(1, 0, 2, 3)[None]
            for weight in self.weights:
                x = nn.functional.conv3d(x, weight, stride=(1, 2, 2), padding=1).relu()
            flat = x.flatten(2)[0]
            parts.append(torch.cat([flat.mean(-1), flat.std(-1)]))
        return torch.stack(parts).double().numpy()
