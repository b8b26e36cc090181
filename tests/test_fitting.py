"""Which pixels a step draws, what they count, and how silhouettes bound the object."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sv4d_ns.field.deformable import DeformableField, DeformableFieldConfig
from sv4d_ns.field.occupancy import OccupancyGrid
from sv4d_ns.field.volume_rendering import render_rays
from sv4d_ns.fitting.batch_sampler import BatchConfig, BatchSampler
from sv4d_ns.fitting.fit import FitOptions, GridFit
from sv4d_ns.fitting.frame_order import FrameOrder
from sv4d_ns.fitting.objective import RIGIDITY_BESIDE_FLOW, TURNS, loss_terms
from sv4d_ns.fitting.registration import band_losses, draw_band
from sv4d_ns.fitting.schedule import ScheduleConfig, Window, apply_schedule
from sv4d_ns.fitting.settings import LossWeights
from sv4d_ns.fitting.train_views import (
    agreeing_views,
    closed,
    hull_views,
    largest_silhouette,
    surface_flow,
    train_views,
)
from sv4d_ns.geometry.cameras import ViewPlan
from sv4d_ns.utils import randomness
from sv4d_ns.utils.errors import InputError
from sv4d_ns.views.grid import ViewGrid


def grid(frames: int = 3) -> ViewGrid:
    """A square that is largest in the middle frame; the novel views believe half of it."""
    views = ViewPlan.ring((90.0, 180.0, 270.0))
    pictures = np.full((frames, 4, 32, 32, 4), 255, np.uint8)
    pictures[..., 3] = 0
    for frame in range(frames):
        half = 10 if frame == frames // 2 else 6
        pictures[frame, :, 16 - half : 16 + half, 16 - half : 16 + half] = [200, 30, 60, 255]
    confidence = np.full((frames, 3, 32, 32), 255, np.uint8)
    confidence[..., :16] = 0
    return ViewGrid(pictures[:, 0], pictures[:, 1:], views, fps=10.0, confidence=confidence)


def test_the_canonical_frame_shows_most_of_the_object() -> None:
    assert largest_silhouette(grid(5)) == 2


def test_the_input_view_counts_fully_and_generated_pixels_by_confidence_and_angle() -> None:
    views = train_views(grid(), "cpu")
    assert (views[0].weight == 1).all() and views[0].vote == 1
    assert (views[1].weight[..., :16] == 0).all()
    beside, behind = float(views[1].weight[0, 0, 31]), float(views[2].weight[0, 0, 31])
    assert 0 < behind < beside < 1


def test_a_batch_follows_from_seed_and_step_and_stays_in_its_window() -> None:
    views, config = train_views(grid(5), "cpu"), BatchConfig(rays=128, patches=2)
    draw = lambda seed, step: BatchSampler(views, config, ScheduleConfig(), seed).draw(step, Window((1, 2, 3)), 2)  # noqa: E731
    first, again, other = draw(0, 7), draw(0, 7), draw(0, 8)
    assert torch.equal(first.rgb, again.rgb) and torch.equal(first.origins, again.origins)
    assert not torch.equal(first.origins, other.origins) or not torch.equal(first.directions, other.directions)
    assert len(first.rgb) == 128 + 2 * 16 * 16
    assert set(np.round(first.times[:, 0].numpy() * 4).astype(int)) <= {1, 2, 3}
    torch.testing.assert_close(first.directions.norm(dim=-1), torch.ones(len(first.rgb)))


def test_half_of_the_single_rays_look_through_the_input_camera() -> None:
    views = train_views(grid(), "cpu")
    batch = BatchSampler(views, BatchConfig(rays=200, patches=0), ScheduleConfig(), 0).draw(0, Window.whole(3), 1)
    from_input = (batch.origins - views[0].c2w[:3, 3]).norm(dim=-1) < 1e-5
    assert float(from_input.float().mean()) >= 0.5


def test_rays_of_a_point_cloud_repeat_none():
    """Pixel centres are a finite pool: a cloud of many points would hold each of them many times."""
    views = train_views(grid(), "cpu")
    counts = {}
    for spread in (False, True):
        sampler = BatchSampler(views, BatchConfig(rays=4000, patches=0, spread=spread), ScheduleConfig(), 0)
        batches = [sampler.draw(step, Window.whole(1), 0) for step in range(3)]
        rays = torch.cat([torch.cat([batch.origins, batch.directions], dim=-1) for batch in batches])
        counts[spread] = len(torch.unique(rays, dim=0))
        middle = batches[0].directions
    assert counts[True] == 12000 > 2 * counts[False]
    assert torch.isfinite(middle).all()


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_step_looks_through_four_cameras(orthogonal: bool) -> None:
    plan = ViewPlan.ring((40.0, 80.0, 120.0, 160.0, 200.0, 240.0, 280.0, 320.0))
    pictures = np.full((2, 9, 32, 32, 4), 255, np.uint8)
    views = train_views(ViewGrid(pictures[:, 0], pictures[:, 1:], plan, fps=10.0), "cpu")
    config = BatchConfig(rays=400, patches=0, input_share=0.0, orthogonal=orthogonal)
    sampler = BatchSampler(views, config, ScheduleConfig(), 0)
    spreads = []
    for step in range(8):
        eyes = sampler.draw(step, Window.whole(2), 0).origins.unique(dim=0)
        assert len(eyes) == 4 or not orthogonal
        spreads.append(float(eyes.mean(0).norm()))
    assert (max(spreads) < 0.8) == orthogonal, "quarter turns surround the object, chance does not always"


def test_targets_stand_on_the_step_s_background() -> None:
    views = train_views(grid(), "cpu")
    batch = BatchSampler(views, BatchConfig(rays=400, patches=0), ScheduleConfig(), 0).draw(3, Window.whole(3), 1)
    empty = batch.alpha == 0
    assert empty.any() and (~empty).any()
    torch.testing.assert_close(batch.rgb[empty], batch.background.expand(int(empty.sum()), 3))


@pytest.mark.parametrize("row", [10, 16])
def test_closing_fills_a_seam_and_keeps_the_outline(row: int) -> None:
    alpha = torch.zeros(1, 32, 32)
    alpha[:, 4:28, 0:28] = 1
    seam = alpha.clone()
    seam[:, row : row + 4] = 0
    assert torch.equal(closed(seam), alpha)
    generated = [view for view in hull_views(train_views(grid(), "cpu")) if view.vote < 1]
    assert len(generated) == 3


def ball_grid(frames: int = 4, wrong_view: bool = False) -> ViewGrid:
    """A true ball seen from all sides, moving up; `wrong_view` exchanges one view's picture by a bar."""
    plan = ViewPlan.ring((60.0, 120.0, 180.0, 240.0, 300.0))
    size, pictures = 48, np.zeros((frames, 6, 48, 48, 4), np.uint8)
    axis = (np.arange(size) + 0.5 - size / 2) / plan.focal_px(size)
    for frame in range(frames):
        height = 0.1 * frame - 0.15
        for view, c2w in enumerate(plan.c2w()):
            d = np.stack(np.broadcast_arrays(axis[None, :], -axis[:, None], -1.0), -1) @ c2w[:3, :3].T
            d /= np.linalg.norm(d, axis=-1, keepdims=True)
            away = np.array([0.0, 0.0, height]) - c2w[:3, 3]
            along = d @ away
            hit = (away @ away - along**2) < 0.25**2
            pictures[frame, view][hit] = [200, 30, 60, 255]
    if wrong_view:
        pictures[:, 2] = 0
        pictures[:, 2, :, 20:24] = [10, 200, 10, 255]
    return ViewGrid(pictures[:, 0], np.ascontiguousarray(pictures[:, 1:]), plan, fps=10.0)


def test_views_of_one_object_are_trusted_and_contradicting_or_doubted_ones_are_not() -> None:
    true = ball_grid()
    assert agreeing_views(true) == set(range(6))
    assert all(view.trusted and view.vote == 1 and (view.weight == 1).all() for view in train_views(true, "cpu"))
    wrong = ball_grid(wrong_view=True)
    assert agreeing_views(wrong) == {0, 1, 3, 4, 5}
    assert [view.number for view in train_views(wrong, "cpu")] == [0, 1, 3, 4, 5]
    doubted = ViewGrid(
        true.input_frames, true.novel_views, true.plan, fps=10.0, confidence=np.full((4, 5, 48, 48), 200, np.uint8)
    )
    views = train_views(doubted, "cpu")
    assert views[0].trusted and not any(view.trusted for view in views[1:])
    share = BatchSampler(train_views(true, "cpu"), BatchConfig(rays=600, patches=0), ScheduleConfig(), 0)
    batch = share.draw(0, Window.whole(4), 0)
    from_input = (batch.origins - views[0].c2w[:3, 3]).norm(dim=-1) < 1e-5
    assert 0 < from_input.float().mean() < 0.5


def test_a_view_that_shows_nothing_is_left_out_and_one_view_is_enough() -> None:
    grid = ball_grid(2)
    blank = grid.novel_views.copy()
    blank[:, 1] = 0
    views = train_views(replace(grid, novel_views=blank), "cpu")
    assert [view.number for view in views] == [0, 1, 3, 4, 5] and all(view.trusted for view in views)
    one = ViewGrid(grid.input_frames, grid.novel_views[:, 1:2], ViewPlan.ring((120.0,)), fps=10.0)
    views = train_views(one, "cpu")
    assert len(views) == 2
    occupancy = OccupancyGrid(2, resolution=16)
    occupancy.carve(hull_views(views))
    batch = BatchSampler(views, BatchConfig(rays=64, patches=2), ScheduleConfig(), 0).draw(0, Window.whole(2), 0)
    assert set(batch.view.tolist()) == {0, 1} and occupancy.hull.any()


@pytest.mark.parametrize("empty_frame", [None, 1])
@pytest.mark.parametrize("frames", [1, 3])
def test_one_frame_and_a_frame_without_object_can_be_fitted(frames: int, empty_frame: int | None) -> None:
    grid = ball_grid(frames)
    if empty_frame is not None and frames > 1:
        grid.input_frames[empty_frame] = 0
        grid.novel_views[empty_frame] = 0
    views = train_views(grid, "cpu")
    sizes = {"levels": 2, "max_resolution": 32, "motion_resolutions": (2,), "density_resolutions": (4,)}
    field = DeformableField(DeformableFieldConfig(keyframes=frames, **sizes))
    occupancy = OccupancyGrid(frames, resolution=16)
    occupancy.carve(hull_views(views))
    flow = surface_flow(views, occupancy.half_extent, 0)
    sampler = BatchSampler(views, BatchConfig(rays=64, patches=0), ScheduleConfig(), 0)
    for step in range(5):
        window = apply_schedule(field, occupancy, flow, ScheduleConfig(), step, 5, 1)
        batch = sampler.draw(step, window, 0)
        out = render_rays(field, occupancy, batch.origins, batch.directions, batch.times, 32, batch.background)
        loss = torch.stack(list(loss_terms(field, occupancy, flow, out, batch, LossWeights(), 0, step).values())).sum()
        assert loss.isfinite()
        loss.backward()


def test_frames_that_another_order_brings_into_the_window_start_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 2's views may show another order: frames far away then lie in the window all at once."""
    sizes = {"levels": 2, "max_resolution": 32, "motion_resolutions": (2,), "density_resolutions": (4,)}
    field = DeformableField(DeformableFieldConfig(keyframes=6, **sizes))
    occupancy = OccupancyGrid(6, resolution=16)
    first, second = FrameOrder.outward(6, 0), FrameOrder((0, 0, 1, 2, 0, 4))
    for step, order, frames in ((30, first, {0, 1, 2}), (31, second, {0, 1, 2, 4, 5})):
        monkeypatch.setattr("sv4d_ns.fitting.schedule.frame_order", lambda *_, order=order: order)
        window = apply_schedule(field, occupancy, None, ScheduleConfig(), step, 100, 200)
        assert set(window.frames) == frames == field.admitted_frames
        assert frames == set(field.admitted.nonzero()[:, 0].tolist())
    again = DeformableField(DeformableFieldConfig(keyframes=6, **sizes))
    again.load_state_dict(field.state_dict())
    assert again.admitted_frames == field.admitted_frames


def test_a_fit_looks_through_a_network_and_at_normals_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sv4d_ns.fitting.fit.vgg_distance", lambda _: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    up = np.broadcast_to(np.float32([0, 0, 1]), (3, 32, 32, 3)).copy()
    options = FitOptions(steps=10, rays=32, losses=LossWeights(perceptual=0.5))
    fit = GridFit(grid(), options, normals=[up] * 4)
    assert "perceptual" in fit.take_step()
    normals = fit.sampler.draw(1, Window.whole(3), 1).normals
    assert normals is not None and (normals[..., 2] == 1).all()
    monkeypatch.undo()
    monkeypatch.setattr("sv4d_ns.metrics.lpips.packaged_file", lambda _: None)
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nowhere")
    with pytest.raises(InputError, match=r"LPIPS \(vgg\) needs its network"):
        GridFit(grid(), options)


def test_a_short_fit_finds_the_moving_ball() -> None:
    torch.manual_seed(0)
    grid, total = ball_grid(), 30
    views = train_views(grid, "cpu")
    sizes = {"levels": 4, "max_resolution": 64, "motion_resolutions": (2, 4), "density_resolutions": (8,)}
    field = DeformableField(DeformableFieldConfig(keyframes=4, **sizes))
    occupancy = OccupancyGrid(4, resolution=32)
    occupancy.carve(hull_views(views))
    flow = surface_flow(views, occupancy.half_extent, 0)
    sampler = BatchSampler(views, BatchConfig(rays=128, patches=1), ScheduleConfig(), 0)
    rates = {"encoding": 2e-2, "heads": 1e-2, "deformation": 2e-2, "appearance": 2e-2, "density_residual": 1e-2}
    groups = [{"params": p, "lr": rates[name]} for name, p in field.parameter_groups().items()]
    optimizer = torch.optim.Adam(groups, eps=1e-15)
    names: set[str] = set()
    for step in range(total):
        window = apply_schedule(field, occupancy, flow, ScheduleConfig(), step, total, 2)
        batch = sampler.draw(step, window, 0)
        out = render_rays(field, occupancy, batch.origins, batch.directions, batch.times, 64, batch.background)
        terms = loss_terms(field, occupancy, flow, out, batch, LossWeights(), 0, step)
        names |= set(terms)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    assert {"registration", "band_rigidity", "density_residual", "structure", "scene_flow"} <= names
    assert "sparsity" not in names  # these views are true
    unknown = loss_terms(field, occupancy, None, out, batch, LossWeights(), 0, step)
    known = loss_terms(field, occupancy, flow, out, batch, LossWeights(), 0, step)
    for name in ("band_rigidity", "deformation_rigidity"):
        torch.testing.assert_close(known[name], RIGIDITY_BESIDE_FLOW * unknown[name])
    # at the last frame the ball's middle is at z = 0.15, and it came from z = -0.15
    point = torch.tensor([[0.0, 0.0, 0.15]])
    with torch.no_grad():
        came_from = (point + field.deformation(point, torch.ones(1, 1)))[0, 2]
    assert came_from < 0.0
    assert field.residual_open


def test_terms_that_take_turns_are_asked_every_other_step_and_twice_as_much() -> None:
    views = train_views(ball_grid(), "cpu")
    field = DeformableField(DeformableFieldConfig(keyframes=4, levels=4, max_resolution=64, initial_logit=5.0))
    torch.nn.init.uniform_(field.motion.keyframes[1], -0.1, 0.1)
    occupancy = OccupancyGrid(4, resolution=32)
    occupancy.carve(hull_views(views))
    batch = BatchSampler(views, BatchConfig(rays=256, patches=2), ScheduleConfig(), 0).draw(0, Window((1,)), 0)
    out = render_rays(field, occupancy, batch.origins, batch.directions, batch.times, 64, batch.background)
    even, odd = (
        loss_terms(field, occupancy, None, out, batch, LossWeights(registration=0.5), 0, step) for step in (0, 1)
    )
    assert not set(even) & set(TURNS[1]) and "bilateral_normal" in even
    assert not set(odd) & set(TURNS[0]) and set(TURNS[1]) <= set(odd)
    torch.testing.assert_close(even["photometric"], odd["photometric"])
    band = draw_band(occupancy, [1], randomness.generator(0, 1, 3))
    assert band is not None
    torch.testing.assert_close(odd["registration"], 2 * 0.5 * band_losses(field, occupancy, band)[0])


def test_sparsity_pulls_at_what_is_seen_of_views_that_contradict_each_other() -> None:
    views = train_views(ball_grid(), "cpu")
    field = DeformableField(DeformableFieldConfig(keyframes=4, levels=4, max_resolution=64))
    occupancy = OccupancyGrid(4, resolution=32)
    occupancy.carve(hull_views(views))
    true = BatchSampler(views, BatchConfig(rays=256, patches=0), ScheduleConfig(), 0).draw(0, Window.whole(4), 0)
    out = render_rays(field, occupancy, true.origins, true.directions, true.times, 64, true.background)
    assert true.agreeing and "sparsity" not in loss_terms(field, occupancy, None, out, true, LossWeights(), 0, 0)
    density = torch.full_like(out.density, field.config.max_density, requires_grad=True)
    made = replace(true, agreeing=False)
    terms = loss_terms(field, occupancy, None, replace(out, density=density), made, LossWeights(), 0, 0)
    (gradient,) = torch.autograd.grad(terms["sparsity"], density)
    first = torch.ones_like(out.ray_indices, dtype=torch.bool)
    first[1:] = out.ray_indices[1:] != out.ray_indices[:-1]
    assert gradient[first].min() > 0
    assert gradient[~first].max() < 0.2 * gradient[first].max()  # behind the first sample it is dark


def test_visibility_is_computed_when_asked_and_kept_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ball_grid(2)
    doubted = replace(grid, confidence=np.full(grid.novel_views.shape[:-1], 255, np.uint8))
    sampler = BatchSampler(train_views(doubted, "cpu"), BatchConfig(rays=64, patches=0), ScheduleConfig(), 0)
    before = [view.weight.clone() for view in sampler.views]
    calls = []

    def seen(field, occupancy, input_camera, cameras, *_):  # type: ignore[no-untyped-def]
        calls.append(len(cameras))
        return torch.full((len(cameras), 24, 24), 0.25)

    monkeypatch.setattr("sv4d_ns.fitting.batch_sampler.view_weights", seen)
    sampler.update_visibility(None, None, 1)  # type: ignore[arg-type]
    for step in range(5):
        sampler.draw(step, Window.whole(2), 0)
    assert calls == [5]  # all generated views at once, and not for the rays of a step
    assert torch.equal(sampler.views[0].weight, before[0])
    for view, old in zip(sampler.views[1:], before[1:], strict=True):
        assert torch.equal(view.weight[0], old[0])
        assert torch.equal(view.weight[1], 0.25 * view.confidence[1])
