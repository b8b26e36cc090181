"""4Diffusion's field and objective: derivatives, memory, cameras, the anchor, and a run from video to checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusion_fixture import small_pipeline

from sv4d_ns.diffusion.bundled import load_bundled_pipeline
from sv4d_ns.diffusion.fourdm.frame import DISTANCE, FIELD_OF_VIEW, WORLD_SCALE
from sv4d_ns.distillation.anchor import choose_anchor
from sv4d_ns.distillation.cameras import HIGHEST_ELEVATION_DEG, DrawnViews, draw_views, draw_window
from sv4d_ns.distillation.motion import motion_loss
from sv4d_ns.distillation.objective import Objective, ObjectiveConfig, make_anchor
from sv4d_ns.distillation.priors import BundledPrior, SV4DPrior
from sv4d_ns.distillation.rendering import RenderSettings, grid_rays, render
from sv4d_ns.distillation.schedules import reference_step
from sv4d_ns.field.hash_grid import HashGrid
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.space_time import SpaceTimeField, SpaceTimeFieldConfig
from sv4d_ns.geometry.cameras import OBJECT_BOX, ViewPlan, look_at_cameras
from sv4d_ns.metrics import lpips
from sv4d_ns.metrics.images import padded_ssim
from sv4d_ns.metrics.lpips import anchor_lpips
from sv4d_ns.synthesis.fourdm import KNOWN_POSE, nearest_view
from sv4d_ns.training_data.procedural import creature
from sv4d_ns.training_data.procedural import render as render_creature
from sv4d_ns.utils.errors import InputError
from sv4d_ns.views.grid import ViewGrid

SMALL = SpaceTimeFieldConfig(
    half_extent=OBJECT_BOX,
    levels=3,
    log2_table_size=10,
    base_resolution=4,
    growth=2.0,
    hidden_width=16,
    blob_radius=0.6,
)


def small_field(**changes) -> SpaceTimeField:
    torch.manual_seed(0)
    field = SpaceTimeField(replace(SMALL, **changes))
    with torch.no_grad():
        field.space.table.normal_(std=0.5)
        field.space_time.table.normal_(std=0.5)
    return field


# ------------------------------------------------------------------------------------------------------- the field


@pytest.mark.parametrize("dimensions", [3, 4])
def test_pull_back_is_the_derivative_and_both_back_ends_agree(dimensions):
    torch.manual_seed(0)
    fused = HashGrid(dimensions, levels=3, log2_table_size=8, base_resolution=4, growth=1.7)
    twin = HashGrid(dimensions, levels=3, log2_table_size=8, base_resolution=4, growth=1.7, backend="torch")
    with torch.no_grad():
        fused.table.normal_()
    twin.load_state_dict(fused.state_dict())
    x = torch.rand(40, dimensions)
    weights, direction = torch.randn(40, fused.out_dim), torch.randn(40, dimensions)
    results = []
    for grid in (fused, twin):
        points, gradient = x.clone().requires_grad_(), weights.clone().requires_grad_()
        features = grid(points)
        first = torch.autograd.grad((features * weights).sum(), [points, grid.table])
        pulled = grid.vjp(x, gradient)
        second = torch.autograd.grad((pulled * direction).sum(), [gradient, grid.table])
        assert torch.allclose(pulled, first[0], atol=1e-4)
        results.append([features, *first, *second])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_normals_are_those_of_finite_differences():
    field = small_field().double()
    field.space.backend = field.space_time.backend = "torch"
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 3, generator=generator).double() - 0.5
    t = torch.rand(60, 1, generator=generator).double()
    step = 1e-6
    with torch.no_grad():
        slope = torch.stack(
            [field.density(x + step * axis, t) - field.density(x - step * axis, t) for axis in torch.eye(3).double()],
            -1,
        )
    wanted = -torch.nn.functional.normalize(slope, dim=-1)
    agree = (field.normals(x, t).detach() * wanted).sum(-1)
    # a point within a step of a cell's face has two derivatives
    assert (agree > 0.999).float().mean() > 0.95


def test_normals_move_the_field():
    field = small_field()
    x, t = torch.rand(20, 3) - 0.5, torch.rand(20, 1)
    field.normals(x, t)[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in field.parameter_groups()["encoding"])
    with torch.no_grad():
        assert not field.normals(x, t).requires_grad


def test_an_untrained_field_is_a_blob_at_every_time():
    field = SpaceTimeField(SMALL)
    x = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.55, 0.0, 0.0], [0.6, 0.0, 0.0]])
    for time in (0.0, 0.4, 1.0):
        centre, half, rim, outside = field.density(x, torch.full((4, 1), time)).tolist()
        assert centre == pytest.approx(10, abs=0.1) and half == pytest.approx(5, abs=0.1)
        assert 0.5 < rim < 2 and outside == 0


@pytest.mark.parametrize("bad", [{"in_dim": 2}, {"levels": 0}, {"log2_table_size": 30}, {"backend": "cuda"}])
def test_grids_that_cannot_be(bad):
    with pytest.raises(InputError):
        HashGrid(**bad)


class Translated(SpaceTimeField):
    """A solid ball that travels along x, in place of what a field would have learned."""

    speed, radius = 0.3, 0.2

    def density_and_color(self, x, t):
        centre = torch.cat([self.speed * t, torch.zeros_like(t), torch.zeros_like(t)], -1)
        density = 60 * torch.sigmoid(20 * (self.radius - (x - centre).norm(dim=-1)))
        return density, torch.sigmoid(8 * (x - centre))

    def density(self, x, t, moments=None):
        return self.density_and_color(x, t)[0]


def test_the_motion_beside_the_field_follows_it_and_leaves_it_alone():
    torch.manual_seed(0)
    field, occupancy = Translated(SMALL), OccupancyGrid(3, resolution=16)
    for frame in range(3):
        occupancy.density.zero_()
        occupancy.update(field, frame)
    optimizer = torch.optim.AdamW(field.parameter_groups()["motion"], lr=5e-3)
    for step in range(200):
        loss = motion_loss(field, occupancy, 3, 0, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in field.parameter_groups()["encoding"])
    x = torch.tensor([[0.3, 0.0, 0.1], [0.2, 0.1, 0.0], [0.4, 0.0, 0.0]])
    moved = field.deformation(x, torch.ones(3, 1))
    assert (moved - torch.tensor([-0.3, 0.0, 0.0])).norm(dim=-1).max() < 0.1
    assert field.deformation(x, torch.zeros(3, 1)).abs().max() == 0


# ------------------------------------------------------------------------------------------------------- rendering


def test_chunks_rendered_twice_give_the_pictures_and_gradients_of_one_pass():
    rays = grid_rays(ViewPlan.ring((0.0, 90.0)), torch.tensor([0.0, 1.0]), 12, "cpu")
    results = []
    for chunk_rays in (len(rays), 100):
        field, occupancy = small_field(), OccupancyGrid(2, resolution=16)
        settings = RenderSettings(samples=40, chunk_rays=chunk_rays, normals=0)
        rendered = render(field, occupancy, rays, settings, seed=3)
        (rendered.rgb.square().sum() + rendered.alpha.sum()).backward()
        results.append((rendered.rgb.detach(), field.space_time.table.grad, field.color_net[0].weight.grad))
    for one, many in zip(*results, strict=True):
        assert torch.allclose(one, many, atol=2e-4 * one.abs().max().item())


def test_orientation_is_estimated_without_bias():
    field, occupancy = small_field(), OccupancyGrid(1, resolution=16)
    rays = grid_rays(ViewPlan.ring((30.0,)), torch.tensor([0.0]), 8, "cpu")
    estimates = [
        render(field, occupancy, rays, RenderSettings(samples=30, normals=count), seed=0).orientation.item()
        for count in (200, 20_000)
    ]
    assert estimates[0] == pytest.approx(estimates[1], rel=0.25) and estimates[1] > 0


# ------------------------------------------------------------------------------------------------- cameras, anchor


def test_drawn_views_are_orthogonal_and_low():
    drawn = [draw_views(np.random.default_rng(seed)) for seed in range(400)]
    for views in drawn:
        assert np.allclose(np.diff(views.azimuths_deg), 90.0)
        assert 0 <= views.elevation_deg <= HIGHEST_ELEVATION_DEG
    elevations = np.array([views.elevation_deg for views in drawn])
    # half of them end at 3.18 degrees
    assert 0.1 < (elevations > 3.19).mean() < 0.27
    starts = np.array([views.azimuths_deg[0] for views in drawn])
    assert starts.min() < -175 and starts.max() > -95


def test_windows_of_any_clip():
    rng = np.random.default_rng(0)
    windows = [draw_window(rng, 20, 8) for _ in range(200)]
    assert {window[0] for window in windows} == set(range(13))
    assert all(np.array_equal(np.diff(window), np.ones(7)) for window in windows)
    assert draw_window(rng, 3, 8) == [0, 1, 2, 2, 2, 2, 2, 2]


def test_both_worlds_show_the_same_picture_of_the_middle_plane():
    plan = DrawnViews((0.0,), 0.0).plan(DISTANCE * WORLD_SCALE, FIELD_OF_VIEW)
    ours = ViewPlan.ring((0.0,))
    assert plan.focal_px(64) / plan.radius == pytest.approx(ours.focal_px(64) / ours.radius)


def test_a_shorter_run_passes_the_same_schedule():
    assert reference_step(250, 500) == 17_500 and reference_step(0, 500, 3500) == 3500
    assert reference_step(500, 500, 3500) == 35_000


def creature_grid(
    azimuths: tuple[float, ...], input_azimuth: float, known: bool, frames: int = 3, seed: int = 2**31 + 7
) -> ViewGrid:
    angles = np.array([input_azimuth, *azimuths])
    cameras = look_at_cameras(angles, np.zeros(len(angles)))
    pictures = render_creature(creature(seed), np.linspace(0, 0.5, frames), cameras, 48)
    provenance = {} if known else {KNOWN_POSE: False}
    return ViewGrid(pictures[:, 0], pictures[:, 1:], ViewPlan.ring(azimuths), 8.0, provenance=provenance)


def test_the_anchor_is_the_view_nearest_to_the_input():
    around, rng, right = (0.0, 90.0, 180.0, 270.0), np.random.default_rng(1), 0
    for number in range(10):
        wanted = int(rng.integers(4))
        azimuth = around[wanted] + rng.uniform(-30, 30)
        grid = creature_grid(around, azimuth, known=False, frames=2, seed=2**31 + 3000 + number)
        assert choose_anchor(grid) == 1 + nearest_view(grid.input_frames, grid.novel_views)
        right += nearest_view(grid.input_frames, grid.novel_views) == wanted
    # a creature can look alike from two sides; chance is two or three of ten
    assert right >= 8


def test_the_user_may_choose_another_anchor():
    grid = creature_grid((90.0, 180.0), 0.0, known=True)
    assert choose_anchor(grid, 2) == 2
    with pytest.raises(InputError, match="anchor-view 9"):
        choose_anchor(grid, 9)


def test_the_anchor_is_the_input_where_its_camera_is_known():
    assert choose_anchor(creature_grid((90.0,), 0.0, known=True)) == 0


def test_ssim_of_equal_pictures_is_one_and_falls():
    a = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert padded_ssim(a, a).item() == pytest.approx(1, abs=1e-6)
    assert padded_ssim(a, a.flip(-1)) < 0.5


def test_lpips_without_weights_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(lpips, "packaged_file", lambda net: None)
    network, sentence = anchor_lpips("cpu")
    assert network is None and "downloads vgg16-397923af.pth" in sentence


# ------------------------------------------------------------------------------------------------------- objective


class TruthPrior:
    """Knows what the views look like: its target is the truth, at any noise."""

    num_frames, image_size, channels, base_elevation_deg, highest_elevation_deg = 2, 16, 4, 0.0, 0.0
    radius, fov_deg = ViewPlan.BUNDLED.radius, ViewPlan.BUNDLED.fov_deg

    def __init__(self, subject, times):
        self.subject, self.times, self.noise_steps = subject, times, []

    def encode(self, images, generator):
        return 4 * images

    def target(self, latents, frames, views, noise_step, generator):
        self.noise_steps.append(noise_step)
        cameras = views.plan(self.radius, self.fov_deg).c2w()[1:]
        rgba = (
            render_creature(self.subject, self.times[list(frames)], cameras, self.image_size).astype(np.float32) / 255
        )
        white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
        pictures = np.concatenate([white, rgba[..., 3:]], -1).reshape(-1, 16, 16, 4)
        return 4 * torch.from_numpy(pictures).movedim(-1, 1)


def test_the_objective_finds_the_object_its_prior_knows():
    subject, times = creature(2**31 + 7), np.linspace(0, 0.5, 3)
    grid = creature_grid((90.0, 180.0, 270.0), 0.0, known=True)
    torch.manual_seed(0)
    field, occupancy = SpaceTimeField(SMALL), OccupancyGrid(3, resolution=16)
    prior = TruthPrior(subject, times)
    config = ObjectiveConfig(total_steps=60, render=RenderSettings(samples=40, normals=128))
    anchor = make_anchor(grid, 0, 16, "cpu")
    objective = Objective(field, occupancy, prior, anchor, 3, config)
    optimizer = torch.optim.AdamW(field.parameters(), lr=2e-2, betas=(0.9, 0.99), eps=1e-15)
    values = []
    for step in range(60):
        terms = objective.terms(step)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        values.append(terms["sds"].item())
    assert np.mean(values[-10:]) < 0.4 * np.mean(values[:3])
    assert objective.anchor_psnr > 14
    assert max(prior.noise_steps[:2]) >= 970 and max(prior.noise_steps[-20:]) <= 250
    assert set(terms) == {"sds", "orientation", "sparsity", "opaque", "ssim"}


def test_a_step_follows_from_seed_and_number():
    grid = creature_grid((90.0,), 0.0, known=True)
    values = []
    for _ in range(2):
        field = small_field()
        prior = TruthPrior(creature(2**31 + 7), np.linspace(0, 0.5, 3))
        config = ObjectiveConfig(total_steps=10, render=RenderSettings(samples=30, normals=64))
        objective = Objective(field, OccupancyGrid(3, resolution=8), prior, make_anchor(grid, 0, 16, "cpu"), 3, config)
        values.append({name: value.item() for name, value in objective.terms(4).items()})
    assert values[0] == values[1]


def test_an_sv4d_model_knows_elevations_relative_to_the_input():
    pipeline = small_pipeline()
    frames = creature_grid((90.0,), 0.0, known=True).input_frames
    latents = torch.rand(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    for base, elevation in ((0.0, 5.0), (20.0, 25.0), (0.0, 25.0)):
        prior = SV4DPrior(pipeline, frames, 2.0, 33.9, input_elevation_deg=base)
        views = DrawnViews((0.0, 90.0, 180.0, 270.0), elevation)
        seen.append(prior.target(latents, [0], views, 900, torch.Generator().manual_seed(1)))
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2], atol=1e-3)


def test_an_sv4d_model_is_asked_in_the_order_of_its_training_and_with_its_guidance():
    pipeline = small_pipeline()
    frames = creature_grid((90.0,), 0.0, known=True).input_frames
    latents = torch.rand(8, 16, 8, 8, generator=torch.Generator().manual_seed(0)).unflatten(0, (2, 4))
    prior, turned = SV4DPrior(pipeline, frames, 2.0, 33.9, 0.0), [2, 0, 3, 1]
    ascending = (10.0, 100.0, 190.0, 280.0)
    mixed = tuple(ascending[view] for view in turned)

    def answer(views, azimuths):
        return prior._denoise(views.flatten(0, 1), 2.0, [0, 1], DrawnViews(azimuths, 5.0)).unflatten(0, (2, 4))

    with torch.no_grad():
        plain = answer(latents, ascending)
        torch.testing.assert_close(answer(latents[:, turned], mixed), plain[:, turned])
        strong = {"kind": "constant", "scale": 3.0, "min_scale": 1.0}
        pipeline.register_to_config(guidance=strong)
        guided = answer(latents, ascending)
        pipeline.register_to_config(guidance={**strong, "scale": 1.0})
        conditional = answer(latents, ascending)
        pipeline.register_to_config(guidance={**strong, "scale": 0.0})
        unconditional = answer(latents, ascending)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(conditional, unconditional, atol=1e-4)


def test_the_bundled_models_targets_are_pictures_of_the_asked_frames():
    prior = BundledPrior(load_bundled_pipeline(), creature_grid((90.0,), 0.0, known=True).input_frames, 2.0, 33.9, 0.0)
    views = DrawnViews((0.0, 90.0, 180.0, 270.0), 5.0)
    pictures = torch.rand(8, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    target = prior.target(
        prior.encode(pictures, torch.Generator()), [0, 1], views, 900, torch.Generator().manual_seed(1)
    )
    assert target.shape == (8, 4, 64, 64) and target.min() >= -1.001 and target.max() <= 1.001
    assert prior.noise.at(0) == prior.noise.at(35_000) == (850, 980), "it predicts a mean in one step"
