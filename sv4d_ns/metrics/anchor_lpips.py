"""LPIPS for the anchor, where its weights are at hand.

The network is torchmetrics' (VGG16 taps and the published 1x1 weights, which torchmetrics carries). VGG16's own
weights are torchvision's download; without them the anchor is compared by structure alone, and the log says so.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

VGG_FILE = "vgg16-397923af.pth"
MISSING = (
    "LPIPS is left out of the anchor loss, the squared error of pixels takes its place: VGG16's weights are not at "
    "hand. To have them: "
    "python -c \"import torchvision; torchvision.models.vgg16(weights='IMAGENET1K_V1')\""
)

Perceptual = Callable[[Float[Tensor, "n 3 h w"], Float[Tensor, "n 3 h w"]], Float[Tensor, ""]]


def vgg_weights() -> Path:
    """Where torchvision keeps VGG16's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE


def load_lpips(device: torch.device | str) -> Perceptual | None:
    """Mean LPIPS (Zhang et al. 2018, VGG, v0.1) of pictures in [0, 1], or None without VGG16's weights.

    The pictures are handed on as they are, not mapped to [-1, 1]: so does the reference.
    """
    if not vgg_weights().is_file():
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.to(device).requires_grad_(False)
    return lambda a, b: network(a, b, normalize=False).mean()
