"""LPIPS for the anchor, where its weights are at hand.

The network is torchmetrics' (VGG16 taps and the published 1x1 weights, which torchmetrics carries). VGG16's own
weights are torchvision's download; without them the anchor is compared by structure alone, and the log says so.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sv4d_ns.metrics.lpips import perceptual_network

MISSING = (
    "LPIPS is left out of the anchor loss, the squared error of pixels takes its place: VGG16's weights are not at "
    "hand. To have them: "
    "python -c \"import torchvision; torchvision.models.vgg16(weights='IMAGENET1K_V1')\""
)

Perceptual = Callable[[Float[Tensor, "n 3 h w"], Float[Tensor, "n 3 h w"]], Float[Tensor, ""]]


def load_lpips(device: torch.device | str) -> Perceptual | None:
    """Mean LPIPS (Zhang et al. 2018, VGG, v0.1) of pictures in [0, 1], or None without VGG16's weights.

    The pictures are mapped to the [-1, 1] the network was made for, as where LPIPS measures (the reference hands them
    on as they are).

    Raises:
        InputError: the weights are damaged.
    """
    network, _ = perceptual_network(device)
    return None if network is None else lambda a, b: network(a, b).mean()
