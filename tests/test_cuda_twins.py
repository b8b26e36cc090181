"""What runs on a card against what runs on a CPU; `benchmarks/gpu.py` runs this where there is a card.

Nothing here needs nerfstudio: a lent machine has no more than torch and what one carries there.
"""

import pytest
import torch
from dense_splats import dense_rasterise

from sv4d_ns.diffusion.bundled.frustum import Frustum
from sv4d_ns.diffusion.bundled.rendering import Volume
from sv4d_ns.diffusion.bundled.rendering import render_rays as render_volume
from sv4d_ns.field import hash_grid
from sv4d_ns.field import volume_rendering as rendering
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.hash_grid import HashGrid
from sv4d_ns.field.occupancy import OccupancyGrid

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_tinycudann_equals_torch_in_values_and_gradients() -> None:
    if not hash_grid.tinycudann_works():
        pytest.skip("tiny-cuda-nn is not installed")
    grids = [HashGrid(3, levels=6, log2_table_size=12, backend=b).cuda() for b in ("tinycudann", "torch")]
    torch.nn.init.normal_(grids[0].table)
    grids[1].load_state_dict(grids[0].state_dict())
    values, slopes = [], []
    for grid in grids:
        x = torch.rand(1000, 3, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).requires_grad_()
        out = grid(x)
        (out.float() * torch.linspace(-1, 1, out.shape[1], device="cuda")).sum().backward()
        values.append(out.float())
        slopes += [x.grad, grid.table.grad]
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(slopes[1], slopes[3], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(slopes[0], slopes[2], atol=1e-2, rtol=1e-2)


def test_nerfacc_finds_the_samples_of_the_torch_march() -> None:
    if not rendering.nerfacc_works():
        pytest.skip("nerfacc's CUDA extension is not there")
    torch.manual_seed(2)
    occupancy = OccupancyGrid(4, resolution=16).cuda()
    occupancy.occupied.copy_(torch.rand(occupancy.occupied.shape) < 0.4)
    occupancy.density.uniform_(0, 60)
    origins = 2 * torch.nn.functional.normalize(torch.randn(200, 3, device="cuda"), dim=-1)
    directions = torch.nn.functional.normalize(torch.rand(200, 3, device="cuda") * 0.6 - 0.3 - origins, dim=-1)
    near, far = rendering.intersect_box(origins, directions, occupancy.half_extent)
    low, high = occupancy.bins_around(torch.rand(200, device="cuda"))
    arguments = (occupancy, origins, directions, near, far, low, high, 0.015, torch.rand(200, device="cuda"), 6)
    made, twin = rendering._march_nerfacc(*arguments), rendering._march_torch(*arguments)
    # a sample on a cell's face may fall to either side
    assert abs(len(made.distances) - len(twin.distances)) <= 0.01 * len(twin.distances)
    counts = [torch.bincount(s.ray_indices, minlength=200) for s in (made, twin)]
    equal = counts[0] == counts[1]
    assert equal.float().mean() > 0.9
    kept = [equal[s.ray_indices] for s in (made, twin)]
    torch.testing.assert_close(made.distances[kept[0]], twin.distances[kept[1]], atol=2e-3, rtol=0)


def test_gsplat_draws_what_the_formula_does():
    """`gsplat.rasterization` against its twin in plain torch, for round splats far enough from each other's depth."""
    rasterization = pytest.importorskip("gsplat", reason="gsplat is not installed").rasterization
    generator = torch.Generator().manual_seed(0)
    count, size, focal = 40, 48, 60.0
    means = torch.rand(count, 3, generator=generator) * 1.2 - 0.6
    means[:, 2] = torch.linspace(2.0, 4.0, count)
    colors, opacities = torch.rand(count, 3, generator=generator), torch.full((count,), 0.7)
    scales, turned = torch.full((count, 3), 0.12), torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1)
    intrinsics = torch.tensor([[[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]])
    given = (means, turned, scales, opacities, colors, torch.eye(4)[None], intrinsics)
    wanted, wanted_alpha, _ = dense_rasterise(*given, size, size)
    made, alpha, _ = rasterization(*(tensor.cuda() for tensor in given), size, size)
    # gsplat widens each by 0.3 pixels squared, and turns a ray's angle into a sheared ellipse
    assert (made.cpu() - wanted).abs().mean() < 0.03 and (alpha.cpu() - wanted_alpha).abs().mean() < 0.03


def test_the_bundled_model_s_volumes_are_drawn_alike() -> None:
    torch.manual_seed(3)
    parts = (torch.rand(2, 32, 32, 32) * 0.3, torch.rand(2, 3, 16, 16, 16), torch.rand(2, 16, 16, 16))
    image, origins = torch.rand(2, 3, 24, 24), torch.randn(2, 200, 3) * 0.05
    directions = torch.cat([torch.rand(2, 200, 2) * 0.5 - 0.25, torch.ones(2, 200, 1)], -1)
    drawn, slopes = [], []
    for device in ("cpu", "cuda"):
        leaves = [part.to(device).requires_grad_() for part in parts]
        made = render_volume(Volume(*leaves, image.to(device)), origins.to(device), directions.to(device), Frustum())
        (made * torch.linspace(-1, 1, 4, device=device)).sum().backward()
        drawn.append(made.detach().cpu())
        slopes += [[leaf.grad.cpu() for leaf in leaves]]
    torch.testing.assert_close(drawn[0], drawn[1], atol=2e-3, rtol=1e-2)  # the compiled one ends opaque rays
    for one, other in zip(*slopes, strict=True):
        assert (one - other).norm() < 0.02 * one.norm()


def test_a_fit_s_rays_and_their_gradients_are_alike() -> None:
    config = DeformableFieldConfig(keyframes=3, log2_table_size=10, motion_resolutions=(2, 3))
    torch.manual_seed(0)
    field, occupancy = DeformableField(config), OccupancyGrid(3, resolution=12)
    with torch.no_grad():
        field.encoding.table.uniform_(-1, 1)
        for grid in field.motion.keyframes:
            grid.uniform_(-0.1, 0.1)
    occupancy.density.uniform_(0, 60)
    occupancy.occupied.copy_(torch.rand(occupancy.occupied.shape) < 0.6)
    origins = 2 * torch.nn.functional.normalize(torch.randn(60, 3), dim=-1)
    directions = torch.nn.functional.normalize(torch.rand(60, 3) * 0.4 - 0.2 - origins, dim=-1)
    rays, jitter = (origins, directions, torch.linspace(0, 1, 60)[:, None]), torch.rand(60)
    results = []
    for device in ("cpu", "cuda"):
        field.zero_grad()
        field, occupancy = field.to(device), occupancy.to(device)
        out = rendering.render_rays(field, occupancy, *(part.to(device) for part in rays), 48, jitter=jitter.to(device))
        (out.rgb.square().sum() + out.depth.clamp(max=3).sum()).backward()
        slopes = [field.encoding.table.grad, field.motion.keyframes[1].grad]
        results.append([value.detach().cpu() for value in (out.rgb, out.alpha, *slopes)])
    same = ((results[0][0] - results[1][0]).abs().amax(-1) < 1e-2).float().mean()
    assert same > 0.95, "a sample on a cell's face may fall to either side"
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert (one - other).norm() < 0.05 * one.norm()
