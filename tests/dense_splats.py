"""Gaussian splats drawn by the formula, every pixel with every splat: the twin of `gsplat.rasterization`."""

import torch


def dense_rasterise(means, quats, scales, opacities, colors, viewmats, intrinsics, width, height):
    """Isotropic Gaussians composited front to back in plain torch: the interface of gsplat.rasterization."""
    local = means @ viewmats[0, :3, :3].T + viewmats[0, :3, 3]
    z = local[:, 2]
    uv = local[:, :2] / z[:, None] * intrinsics[0, 0, 0] + intrinsics[0, :2, 2]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    radius = scales.mean(-1) / z * intrinsics[0, 0, 0]
    order = z.argsort()
    away = ((x[..., None] - uv[order, 0]) ** 2 + (y[..., None] - uv[order, 1]) ** 2) / radius[order] ** 2
    alpha = (opacities[order] * torch.exp(-0.5 * away)).clamp(max=0.99)
    left = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], -1), -1)
    weights = alpha * left[..., :-1]
    return (weights @ colors[order])[None], weights.sum(-1, keepdim=True)[None], {}
