"""Marching, compositing and occupancy against closed forms and against a dense reference."""

import math

import pytest
import torch
from torch import Tensor

from sv4d_ns.field.compositing import RaySamples, composite
from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import HullView, OccupancyGrid
from sv4d_ns.field.visibility import angular_weight, smoothstep, soft_visibility, unoccluded, view_weights
from sv4d_ns.field.volume_rendering import (
    FAR_DEPTH,
    _march_fused,
    _march_torch,
    box_step,
    intersect_box,
    march,
    render_rays,
    render_rays_chunked,
)
from sv4d_ns.geometry.rays import pixel_rays, project
from sv4d_ns.utils.errors import InputError

FOV_TAN = math.tan(math.radians(33.9) / 2)


def camera(azimuth: float) -> Tensor:
    """OpenGL camera at distance 2 in the plane z = 0, looking at the origin."""
    a = math.radians(azimuth)
    backward = torch.tensor([math.cos(a), math.sin(a), 0.0])
    right = torch.tensor([-math.sin(a), math.cos(a), 0.0])
    c2w = torch.eye(4)
    c2w[:3, 0], c2w[:3, 1], c2w[:3, 2], c2w[:3, 3] = right, torch.tensor([0.0, 0.0, 1.0]), backward, 2 * backward
    return c2w


def image_rays(c2w: Tensor, size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size) + 0.5
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    n = len(xy)
    focal = torch.full((n,), size / 2 / FOV_TAN)
    return pixel_rays(xy, c2w.expand(n, 4, 4), focal, torch.full((n, 2), float(size)))


def ball_field(radius: float = 0.3, speed: float = 0.0, sharpness: float = 2000.0) -> DeformableField:
    """A field whose canonical object is a red ball at the origin; at time t it is seen at x = speed * t."""
    field = DeformableField(DeformableFieldConfig(levels=2, log2_table_size=10, max_resolution=32))

    def canonical(p: Tensor) -> tuple[Tensor, Tensor]:
        return sharpness * (radius - p.norm(dim=-1)), torch.zeros(len(p), field.config.geometry_features)

    def deformation(x: Tensor, t: Tensor, *_: object) -> Tensor:
        return torch.cat([-speed * t, torch.zeros_like(t), torch.zeros_like(t)], -1)

    field._canonical = canonical  # type: ignore[method-assign]
    field.deformation = deformation  # type: ignore[method-assign]
    field.color_from_geometry = lambda g: torch.tensor([1.0, 0.0, 0.0]).expand(len(g), 3)  # type: ignore[method-assign]
    return field


def random_rays(n: int) -> tuple[Tensor, Tensor, Tensor]:
    origins = 2 * torch.nn.functional.normalize(torch.randn(n, 3), dim=-1)
    targets = (torch.rand(n, 3) - 0.5) * 1.6
    return origins, torch.nn.functional.normalize(targets - origins, dim=-1), torch.rand(n, 1)


def test_box_intersection_lies_on_the_box() -> None:
    torch.manual_seed(0)
    origins, directions, _ = random_rays(500)
    near, far = intersect_box(origins, directions, 0.57)
    hit = near < far
    assert 50 < hit.sum() < 500
    for distance in (near, far):
        on = (origins + distance[:, None] * directions)[hit].abs().amax(-1)
        torch.testing.assert_close(on, torch.full_like(on, 0.57), atol=1e-5, rtol=0)
    along = torch.tensor([[1.0, 0.0, 0.0]])
    near, far = intersect_box(torch.tensor([[0.1, 0.2, 0.3]]), along, 0.57)
    assert near == 0 and far == pytest.approx(0.47)  # from inside the box, along an axis


def test_fused_march_equals_torch_march() -> None:
    torch.manual_seed(1)
    occupancy = OccupancyGrid(bins=3, resolution=16)
    occupancy.occupied.copy_(torch.rand(occupancy.occupied.shape) < 0.4)
    occupancy.density.copy_(torch.rand(occupancy.density.shape) * 100)
    origins, directions, times = random_rays(1500)
    near, far = intersect_box(origins, directions, 0.57)
    low, high = occupancy.bins_around(times[:, 0])
    jitter = torch.rand(1500)
    a = _march_fused(occupancy, origins, directions, near, far, low, high, 0.02, jitter, 5)
    b = _march_torch(occupancy, origins, directions, near, far, low, high, 0.02, jitter, 5)
    # A sample on a cell border may fall on either side in float32, and an early stop then moves by a step.
    same = torch.bincount(a.ray_indices, minlength=1500) == torch.bincount(b.ray_indices, minlength=1500)
    assert same.float().mean() > 0.98
    keep = same.nonzero()[:, 0]
    torch.testing.assert_close(
        a.distances[torch.isin(a.ray_indices, keep)], b.distances[torch.isin(b.ray_indices, keep)], atol=0.021, rtol=0
    )
    assert (a.ray_indices.diff() >= 0).all()


def test_march_stays_in_the_box_in_occupied_cells_in_order() -> None:
    torch.manual_seed(2)
    occupancy = OccupancyGrid(bins=5, resolution=8)
    occupancy.occupied.copy_(torch.rand(occupancy.occupied.shape) < 0.3)
    origins, directions, times = random_rays(800)
    samples = march(occupancy, origins, directions, times, 0.013, torch.rand(800))
    x = origins[samples.ray_indices] + samples.distances[:, None] * directions[samples.ray_indices]
    assert x.abs().max() <= 0.57 + 1e-5
    assert occupancy.is_occupied(x, times[samples.ray_indices]).float().mean() > 0.999
    same_ray = samples.ray_indices[1:] == samples.ray_indices[:-1]
    assert (samples.distances.diff()[same_ray] > 0.0129).all()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_weights_match_a_dense_per_ray_reference(backend: str) -> None:
    torch.manual_seed(3)
    counts = torch.tensor([3, 0, 5, 1, 0, 0, 40])
    rays = torch.repeat_interleave(torch.arange(7), counts)
    density = (torch.rand(len(rays)) * 60).requires_grad_()
    samples = RaySamples(rays, torch.rand(len(rays)).cumsum(0), 0.05, 7)
    weights, _ = composite(density, samples, backend)
    expected = []
    for ray in range(7):
        optical = density[rays == ray] * 0.05
        before = torch.cat([torch.zeros(1), optical.cumsum(0)])[: len(optical)]
        expected.append(torch.exp(-before) * (1 - torch.exp(-optical)))
    torch.testing.assert_close(weights, torch.cat(expected))
    cotangent = torch.rand(len(rays))
    ours = torch.autograd.grad((weights * cotangent).sum(), density, retain_graph=True)[0]
    theirs = torch.autograd.grad((torch.cat(expected) * cotangent).sum(), density)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_weights_keep_precision_far_into_a_large_batch(backend: str) -> None:
    # A float32 running sum would be about 2e5 here and lose the last ray's transmittance altogether.
    rays = torch.arange(4000).repeat_interleave(50)
    density = torch.full((len(rays),), 100.0)
    density[-50:] = 0.01
    weights, _ = composite(density, RaySamples(rays, torch.zeros(len(rays)), 0.01, 4000), backend)
    assert weights[-50:].sum() == pytest.approx(1 - math.exp(-50 * 1e-4), rel=1e-4)


def test_rendered_ball_has_its_silhouette_depth_colour_and_motion() -> None:
    occupancy = OccupancyGrid(bins=2, resolution=16)
    origins, directions = image_rays(camera(0), 33)
    field = ball_field(radius=0.3)
    out = render_rays(field, occupancy, origins, directions, torch.zeros(len(origins), 1), n_samples=400)
    distance = torch.linalg.cross(origins, directions).norm(dim=-1)
    assert (out.alpha[distance < 0.29] > 0.99).all() and (out.alpha[distance > 0.31] < 0.01).all()
    centre = 33 * 16 + 16
    assert out.depth[centre] == pytest.approx(1.7, abs=0.01)
    assert (out.depth[distance > 0.31] == FAR_DEPTH).all()
    torch.testing.assert_close(out.rgb[centre], torch.tensor([1.0, 0.0, 0.0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(out.rgb[0], torch.ones(3))
    black = render_rays(field, occupancy, origins, directions, torch.zeros(len(origins), 1), background=torch.zeros(3))
    torch.testing.assert_close(black.rgb[0], torch.zeros(3))
    moved = ball_field(radius=0.2, speed=0.2)
    sideways = camera(90)  # sees +x to its left
    origins, directions = image_rays(sideways, 33)
    for time in (0.0, 1.0):
        times = torch.full((len(origins), 1), time)
        alpha = render_rays(moved, occupancy, origins, directions, times, n_samples=200).alpha
        axis = torch.tensor([0.2 * time, 0.0, 0.0]) - origins
        distance = torch.linalg.cross(axis, directions).norm(dim=-1)
        assert (alpha[distance < 0.18] > 0.95).all() and (alpha[distance > 0.22] < 0.05).all()


def test_early_stop_and_culling_do_not_change_the_picture() -> None:
    field = ball_field(radius=0.3, speed=0.1)
    full, learned = OccupancyGrid(bins=3, resolution=24), OccupancyGrid(bins=3, resolution=24)
    for _ in range(12):
        for k in range(3):
            learned.update(field, k)
    origins, directions = image_rays(camera(20), 40)
    for time in (0.0, 0.3, 1.0):  # on a bin, between bins, at the end
        times = torch.full((len(origins), 1), time)
        a = render_rays(field, full, origins, directions, times, n_samples=160)
        b = render_rays(field, learned, origins, directions, times, n_samples=160)
        assert len(b.weights) < 0.35 * len(a.weights)
        torch.testing.assert_close(a.rgb, b.rgb, atol=5e-3, rtol=0)
        torch.testing.assert_close(a.alpha, b.alpha, atol=5e-3, rtol=0)


def test_rays_that_miss_everything_render_background_with_gradients_intact() -> None:
    field = DeformableField(DeformableFieldConfig(levels=2, log2_table_size=10, max_resolution=32))
    occupancy = OccupancyGrid(bins=1, resolution=8)
    origins, directions = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    out = render_rays(field, occupancy, origins, directions, torch.zeros(1, 1))
    assert len(out.weights) == 0 and out.alpha == 0 and out.depth == FAR_DEPTH
    torch.testing.assert_close(out.rgb, torch.ones(1, 3))
    out.rgb.sum().backward()


def test_chunks_do_not_change_the_picture() -> None:
    field, occupancy = ball_field(0.25, 0.1), OccupancyGrid(bins=2, resolution=16)
    origins, directions, times = random_rays(300)
    whole = render_rays_chunked(field, occupancy, origins, directions, times, 100)
    parts = render_rays_chunked(field, occupancy, origins, directions, times, 100, chunk=77)
    for name in ("rgb", "alpha", "depth", "motion"):
        torch.testing.assert_close(whole[name], parts[name])
    hit = whole["alpha"] > 0.99
    torch.testing.assert_close(whole["motion"][hit], 0.1 * times[hit, 0], atol=2e-3, rtol=0)


def test_projection_inverts_pixel_rays() -> None:
    c2w = camera(37)
    origins, directions = image_rays(c2w, 16)
    uv, depth = project(origins + 1.7 * directions, c2w, 8 / FOV_TAN, 16, 16)
    axis = torch.arange(16) + 0.5
    xy = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    torch.testing.assert_close(uv, xy, atol=1e-4, rtol=0)
    assert (depth > 0).all()


def ball_mask(c2w: Tensor, size: int, centre: Tensor, radius: float) -> Tensor:
    origins, directions = image_rays(c2w, size)
    return (torch.linalg.cross(centre - origins, directions).norm(dim=-1) < radius).float().reshape(size, size)


def test_carving_keeps_the_object_at_its_time_and_drops_the_rest() -> None:
    centres = torch.tensor([[-0.2, 0.0, 0.1], [0.0, 0.1, 0.0], [0.25, 0.0, -0.1]])
    views = [
        HullView(
            torch.stack([ball_mask(camera(a), size, c, 0.15) for c in centres]), camera(a), size / 2 / FOV_TAN, vote
        )
        for a, size, vote in ((0, 96, 1.0), (90, 48, 0.5), (210, 48, 0.5))
    ]
    occupancy = OccupancyGrid(bins=3, resolution=40)
    occupancy.carve(views)
    cells = occupancy.cell_centers()
    for k, centre in enumerate(centres):
        inside = (cells - centre).norm(dim=-1) < 0.15
        hull = occupancy.hull[k].flatten()
        assert hull[inside].all()
        # The two weak views together carve what the strong one cannot see: the ends of the column along its axis.
        assert hull.float().mean() < 8 * inside.float().mean()
    strong_only = OccupancyGrid(bins=3, resolution=40)
    strong_only.carve(views[:2])
    assert strong_only.hull.sum() > 1.5 * occupancy.hull.sum()
    assert torch.equal(occupancy.occupied, occupancy.hull)


def test_wrong_generated_masks_never_empty_a_ray_of_the_input_view() -> None:
    limb = torch.tensor([0.0, 0.2, 0.1])
    seen = ball_mask(camera(0), 96, limb, 0.1)[None]
    wrong = torch.zeros(1, 48, 48)  # two views that do not show the limb at all
    wrong[:, 30:34, 30:34] = 1
    views = [
        HullView(seen, camera(0), 48 / FOV_TAN, 1.0),
        HullView(wrong, camera(90), 24 / FOV_TAN, 0.5),
        HullView(wrong, camera(210), 24 / FOV_TAN, 0.5),
    ]
    occupancy = OccupancyGrid(bins=1, resolution=32)
    occupancy.carve(views)
    origins, directions = image_rays(camera(0), 96)
    n = len(origins)
    samples = march(occupancy, origins, directions, torch.zeros(n, 1), 0.01, torch.full((n,), 0.5))
    hits = torch.bincount(samples.ray_indices, minlength=n).reshape(96, 96) > 0
    assert hits[seen[0] > 0].all()
    far = torch.nn.functional.max_pool2d(seen, 17, 1, 8)[0] == 0
    assert not hits[far].any()


@pytest.mark.parametrize("bins", [1, 2, 5])
def test_carving_folds_frames_into_any_number_of_bins(bins: int) -> None:
    centres = torch.tensor([[-0.2, 0.0, 0.0], [0.0, 0.0, 0.0], [0.2, 0.0, 0.0]])
    alpha = torch.stack([ball_mask(camera(90), 64, c, 0.1) for c in centres])
    occupancy = OccupancyGrid(bins=bins, resolution=20)
    occupancy.carve([HullView(alpha, camera(90), 32 / FOV_TAN)])
    for frame, centre in enumerate(centres):
        assert occupancy.is_occupied(centre[None], torch.tensor([[frame / 2]])).all()
    if bins == 5:
        between = (centres[0] + centres[1]) / 2
        assert occupancy.is_occupied(torch.stack([centres[0], centres[1]]), torch.full((2, 1), 0.25)).all()
        assert between.shape == (3,)
        assert not occupancy.is_occupied(centres[2:], torch.tensor([[0.0]])).any()


def test_update_empties_empty_space_and_finds_what_moved_in() -> None:
    occupancy = OccupancyGrid(bins=2, resolution=32)
    for _ in range(20):
        for k in range(2):
            occupancy.update(ball_field(0.2, speed=0.3), k)
    cells = occupancy.cell_centers()
    for k, x in ((0, 0.0), (1, 0.3)):
        distance = (cells - torch.tensor([x, 0.0, 0.0])).norm(dim=-1)
        occupied = occupancy.occupied[k].flatten()
        assert occupied[distance < 0.2].all() and not occupied[distance > 0.32].any()
    # The surface creeps outward: the rim of free cells around it lets the grid follow.
    for step in range(40):
        occupancy.update(ball_field(0.2 + 0.003 * step, speed=0.0), 0)
    distance = cells.norm(dim=-1)
    assert occupancy.occupied[0].flatten()[distance < 0.3].all()


def test_a_moment_that_lost_its_object_stays_open() -> None:
    occupancy = OccupancyGrid(bins=2, resolution=16)
    occupancy.hull[:, :8] = False
    for _ in range(40):
        occupancy.update(ball_field(radius=-1.0), 1)
    assert torch.equal(occupancy.occupied[1], occupancy.hull[1])


def test_grid_state_survives_a_checkpoint() -> None:
    occupancy = OccupancyGrid(bins=2, resolution=12)
    occupancy.update(ball_field(0.2), 0)
    other = OccupancyGrid(bins=2, resolution=12)
    other.load_state_dict(occupancy.state_dict())
    assert torch.equal(other.density, occupancy.density) and torch.equal(other.occupied, occupancy.occupied)


def test_bad_grids_are_refused() -> None:
    with pytest.raises(InputError):
        OccupancyGrid(bins=0)
    with pytest.raises(InputError):
        OccupancyGrid(bins=1).carve([])
    views = [HullView(torch.ones(t, 8, 8), camera(0), 10.0) for t in (2, 3)]
    with pytest.raises(InputError):
        OccupancyGrid(bins=1).carve(views)


def test_soft_visibility_is_svd3s_smoothstep_of_the_cosine() -> None:
    torch.testing.assert_close(
        smoothstep(torch.tensor([-1.0, 0.0, 0.25, 0.5, 1.0]), 0.0, 0.5), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0])
    )
    angles = torch.tensor([0.0, 60.0, 75.52248781, 90.0, 180.0]).deg2rad()
    normals = torch.stack([angles.cos(), angles.sin(), torch.zeros(5)], -1)
    seen = soft_visibility(torch.zeros(5, 3), normals, torch.tensor([2.0, 0.0, 0.0]))
    torch.testing.assert_close(seen, torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_angular_weight_falls_linearly_to_the_far_side() -> None:
    origin = camera(0)[:3, 3]
    weights = [angular_weight(camera(a)[:3, 3], origin) for a in (0, 90, -90, 180)]
    assert weights == pytest.approx([1.0, 0.625, 0.625, 0.25], abs=1e-3)


def test_occlusion_by_depth() -> None:
    depth = torch.full((16, 16), 1.7)
    points = torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.3, 0.0, 0.0], [0.3, 5.0, 0.0]])
    assert unoccluded(points, depth, camera(0), 8 / FOV_TAN, 0.03).tolist() == [True, False, False, False]


def test_view_weights_trust_the_input_where_it_sees() -> None:
    field, occupancy = ball_field(0.3), OccupancyGrid(bins=2, resolution=16)
    views = torch.stack([camera(a) for a in (30, 90, 180)])
    weights = view_weights(field, occupancy, camera(0), views, FOV_TAN, size=64, time=0.0)
    assert weights.shape == (3, 32, 32) and weights.min() > 0 and weights.max() <= 1
    angular = [1 - 0.75 * a / 180 for a in (30, 90, 180)]
    assert weights[:, 0, 0].tolist() == pytest.approx(angular, abs=1e-3)  # empty: the mask still counts fully
    assert weights[0, 16, 16] == pytest.approx(0.5 * angular[0], abs=0.02)  # the input sees this surface as well
    assert weights[2, 16, 16] == pytest.approx(angular[2], abs=0.02)  # only this view sees the back
    # From the side, the half that faces the input is left to the input.
    assert weights[1, 16, 10] != pytest.approx(weights[1, 16, 22].item(), rel=0.2)


def test_step_divides_the_diagonal() -> None:
    assert box_step(0.5, 100) == pytest.approx(math.sqrt(3) / 100)
