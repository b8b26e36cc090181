"""The compiled renderer of frustum volumes against its torch twin and against shapes whose pictures are known."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sv4d_ns.diffusion.bundled.frustum import Frustum, pixel_directions, relative_poses
from sv4d_ns.diffusion.bundled.pipeline import render_views
from sv4d_ns.diffusion.bundled.rendering import Volume, render_rays, render_rays_torch
from sv4d_ns.geometry.cameras import look_at_cameras


def some_volume(seed: int = 0, batch: int = 2, size: int = 16) -> Volume:
    generator = torch.Generator().manual_seed(seed)
    density = F.softplus(2.0 * torch.randn(batch, size, size, size, generator=generator) - 3.0)
    colour = torch.rand(batch, 3, size // 2, size // 2, size // 2, generator=generator)
    gate = torch.rand(batch, size // 2, size // 2, size // 2, generator=generator)
    return Volume(density, colour, gate, torch.rand(batch, 3, 20, 20, generator=generator))


def some_rays(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    c2w = look_at_cameras(np.array([0.0, 50.0, 170.0]), np.array([0.0, 10.0, -20.0]))
    poses = torch.from_numpy(relative_poses(c2w, c2w[0])).float()
    pixels = torch.from_numpy(pixel_directions(9, 33.9)).float().reshape(-1, 3)
    directions = torch.cat([pixels @ pose[:3, :3].T for pose in poses])
    origins = torch.cat([pose[:3, 3].expand(len(pixels), 3) for pose in poses])
    return origins.expand(batch, -1, 3), F.normalize(directions, dim=-1).expand(batch, -1, 3)


def leaves(volume: Volume) -> list[torch.Tensor]:
    return [tensor.requires_grad_() for tensor in (volume.density, volume.colour, volume.gate)]


def test_the_compiled_renderer_and_its_twin_make_the_same_pictures_and_gradients() -> None:
    origins, directions = some_rays()
    weights = torch.randn(2, origins.shape[1], 4, generator=torch.Generator().manual_seed(1))
    found = []
    for render in (render_rays, render_rays_torch):
        volume = some_volume()
        inputs = leaves(volume)
        pictures = render(volume, origins, directions, Frustum())
        found.append((pictures, torch.autograd.grad((pictures * weights).sum(), inputs)))
    (compiled, compiled_grads), (twin, twin_grads) = found
    torch.testing.assert_close(compiled, twin, atol=2e-3, rtol=0)
    assert compiled[..., 3].max() > 0.5
    for mine, theirs in zip(compiled_grads, twin_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-3 * float(theirs.abs().max()), rtol=2e-2)


def test_a_ball_in_the_middle_looks_the_same_from_every_side() -> None:
    frustum, size, radius = Frustum(), 48, 0.3
    points = torch.from_numpy(frustum.points(size)).float()
    inside = (points - torch.tensor([0.0, 0.0, frustum.radius])).norm(dim=-1) < radius
    grey = torch.full((1, 3, 4, 4, 4), 0.5)
    volume = Volume(inside[None].float() * 3.0, grey, torch.zeros(1, 4, 4, 4), torch.ones(1, 3, 8, 8))
    c2w = look_at_cameras(np.array([0.0, 90.0, 200.0]), np.array([0.0, 30.0, -40.0]))
    pictures = render_views(volume, torch.from_numpy(relative_poses(c2w, c2w[0])).float(), 64, frustum)[0]
    rays = pixel_directions(64, frustum.fov_deg)
    angle = np.arctan2(np.linalg.norm(rays[..., :2], axis=-1), rays[..., 2])
    truth = angle < np.arcsin(radius / frustum.radius)
    for picture in pictures:
        seen = picture[3].numpy() > 0.5
        assert (seen & truth).sum() / (seen | truth).sum() > 0.9
        middle = picture[:3, 32, 32] / picture[3, 32, 32]
        torch.testing.assert_close(middle, torch.full((3,), 0.5))


def test_the_gate_shows_the_input_picture_to_the_input_camera() -> None:
    frustum = Frustum()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    volume = Volume(torch.full((1, 32, 32, 32), 1.0), torch.zeros(1, 3, 8, 8, 8), torch.ones(1, 8, 8, 8), image)
    picture = render_views(volume, torch.eye(4)[None], 32, frustum)[0, 0]
    middle = slice(8, 24)
    alpha = picture[3:, middle, middle]
    assert alpha.min() > 0.99
    torch.testing.assert_close(picture[:3, middle, middle] / alpha, image[0, :, middle, middle], atol=1e-3, rtol=0)


@pytest.mark.parametrize("outside", [(0.0, 3.0, 0.0), (0.0, 0.0, 5.0)])
def test_rays_that_miss_the_scene_are_empty(outside: tuple[float, float, float]) -> None:
    origins = torch.tensor(outside).expand(2, 1, 3)
    directions = torch.tensor([1.0, 0.0, 0.0]).expand(2, 1, 3)
    assert not render_rays(some_volume(), origins, directions, Frustum()).any()
