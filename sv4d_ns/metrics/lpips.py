"""LPIPS as a loss of the 4D optimisation, where its network is on this machine. Nothing is downloaded."""

import torch

from sv4d_ns.evaluation.backbones import BackboneMissing, load_lpips
from sv4d_ns.fitting.losses import Perceptual


def perceptual_network(device: torch.device | str) -> tuple[Perceptual | None, str]:
    """LPIPS (Zhang et al. 2018, VGG16, which still sees something in patches of 16 pixels), and a sentence about it.

    None without VGG16's weights; the sentence then says what takes its place and how to get them.

    Raises:
        InputError: the weights are damaged.
    """
    try:
        network = load_lpips("vgg").net.to(device).requires_grad_(False)
    except BackboneMissing as missing:
        return None, (f"Perceptual loss: left out, D-SSIM on patches takes its place. {missing}")
    return lambda a, b: network(a, b, normalize=True).reshape(-1), "Perceptual loss: LPIPS (VGG16) on patches."
