"""What is learned about views that are wrong as a whole, and what must never be touched: the input view."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_fitting import ball_grid

from sv4d_ns.field.volume_rendering import pixel_rays
from sv4d_ns.fitting.batch_sampler import ScheduleConfig, Window
from sv4d_ns.fitting.corrections import COLOR_RANGE, ViewCorrections, robust_weights
from sv4d_ns.fitting.objective import BatchConfig, BatchSampler, train_views
from sv4d_ns.fitting.settings import CorrectionConfig

ALL = CorrectionConfig(pose=True, color=True, robust=True)


def test_new_corrections_change_nothing_and_the_input_view_is_never_changed() -> None:
    corrections = ViewCorrections(3, ALL)
    origins, directions, view = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    rgb, alpha, background = torch.rand(6, 3), torch.rand(6), torch.rand(3)
    for value, same in zip(corrections.rays(origins, directions, view), (origins, directions), strict=True):
        torch.testing.assert_close(value, same)
    torch.testing.assert_close(corrections.recolored(rgb, alpha, background, view), rgb)
    torch.nn.init.normal_(corrections.pose)
    torch.nn.init.normal_(corrections.color)
    turned, _ = corrections.rays(origins, directions, view)
    painted = corrections.recolored(rgb, alpha, background, view)
    is_input = view == 0
    torch.testing.assert_close(turned[is_input], origins[is_input])
    torch.testing.assert_close(painted[is_input], rgb[is_input])
    assert (turned[~is_input] - origins[~is_input]).abs().amax(-1).min() > 1e-4
    assert (painted[~is_input] - rgb[~is_input]).abs().amax(-1).min() > 1e-4


def test_a_camera_turns_about_the_object_and_moves_along_its_axis_within_bounds() -> None:
    config = CorrectionConfig(pose=True, pose_range_deg=3.0, scale_range=0.06)
    corrections = ViewCorrections(2, config)
    with torch.no_grad():
        corrections.pose[1] = torch.tensor([0.0, 0.0, 50.0, -50.0])  # far beyond the range
    camera = torch.eye(4)
    camera[:3, 3] = torch.tensor([0.0, -2.0, 0.0])
    camera[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # looks along +y
    rays = pixel_rays(torch.tensor([[4.0, 4.0]]), camera[None], torch.tensor([8.0]), torch.tensor([[8.0, 8.0]]))
    origin, direction = corrections.rays(*rays, torch.tensor([1]))
    assert origin.norm().item() == pytest.approx(2 * np.exp(-0.06), rel=1e-4)
    angle = torch.rad2deg(torch.atan2(origin[0, 0], -origin[0, 1]))
    assert angle.item() == pytest.approx(3.0, abs=0.01)
    # still looking at the object
    torch.testing.assert_close(-direction * origin.norm(), origin, rtol=0, atol=1e-4)


def test_the_color_map_leaves_the_background_alone() -> None:
    corrections = ViewCorrections(2, CorrectionConfig(color=True))
    with torch.no_grad():
        corrections.color[1, :, 3] = 0.1  # an offset
    alpha, background = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.2, 0.4, 0.6])
    painted = corrections.recolored((1 - alpha[:, None]) * background, alpha, background, torch.ones(3).long())
    offset = COLOR_RANGE * np.tanh(0.1)
    torch.testing.assert_close(painted, (1 - alpha[:, None]) * background + offset * alpha[:, None])


def test_gradients_of_a_wrong_pose_lead_back() -> None:
    """A view's camera is a degree off: the rays' own error says in which direction."""
    corrections = ViewCorrections(2, CorrectionConfig(pose=True, penalty=0.0))
    turn = np.radians(1.0)
    true = torch.tensor([2 * np.cos(turn), 2 * np.sin(turn), 0.0]).float()
    stated = torch.tensor([[2.0, 0.0, 0.0]])
    optimizer = torch.optim.Adam([corrections.pose], lr=0.05)
    for _ in range(60):
        origin, _ = corrections.rays(stated, -stated / 2, torch.tensor([1]))
        optimizer.zero_grad()
        (origin - true).square().sum().backward()
        optimizer.step()
    assert (origin - true).norm() < 0.01 * (stated - true).norm() + 1e-3


def test_one_bad_view_loses_its_weight_and_ordinary_differences_do_not() -> None:
    error = torch.tensor([0.9, 0.01, 0.012, 0.015, 0.009, 0.1])
    weights = robust_weights(error, tolerance=2.0)
    assert weights[:5].tolist() == [1.0] * 5
    assert weights[5] < 0.1
    assert robust_weights(torch.full((4,), -1.0), 2.0).tolist() == [1.0] * 4


def test_the_running_error_finds_the_view_that_contradicts_the_field() -> None:
    grid = ball_grid(wrong_view=True)
    doubted = replace(grid, confidence=np.full(grid.novel_views.shape[:-1], 255, np.uint8))
    sampler = BatchSampler(train_views(doubted, "cpu"), BatchConfig(rays=512, patches=0), ScheduleConfig(), 0)
    corrections = ViewCorrections(6, replace(ALL, pose=False, color=False))
    truth = BatchSampler(train_views(ball_grid(), "cpu"), BatchConfig(rays=512, patches=0), ScheduleConfig(), 0)
    for step in range(20):
        batch = sampler.draw(step, Window(0, 3), 0)
        # a field that looks like the true ball: its error is nothing but the wrong view's
        rendered = _as_rendered(batch, truth)
        _, seen = corrections.corrected(rendered, batch)
    trust = corrections.trust()
    assert trust.argmin() == 2 and trust[2] < 0.2
    assert float((seen.weight[batch.view == 2] / batch.weight[batch.view == 2]).mean()) < 0.2


def _as_rendered(batch, truth):  # type: ignore[no-untyped-def]
    """What a true field would show for a batch's rays: looked up where they meet each true view's pixels."""
    from sv4d_ns.field.volume_rendering import RaySamples, RenderOutput

    rgb, alpha = batch.rgb.clone(), batch.alpha.clone()
    for view in truth.views:
        at = (batch.view == view.number).nonzero()[:, 0]
        local = batch.directions[at] @ view.c2w[:3, :3]
        size = view.alpha.shape[1]
        column = (local[:, 0] / -local[:, 2] * view.focal + size / 2).floor().long().clamp(0, size - 1)
        row = (-local[:, 1] / -local[:, 2] * view.focal + size / 2).floor().long().clamp(0, size - 1)
        frame = (batch.times[at, 0] * (view.alpha.shape[0] - 1)).round().long()
        alpha[at] = view.alpha[frame, row, column]
        white = view.rgb[frame, row, column]
        rgb[at] = white + (1 - alpha[at, None]) * (batch.background - 1)
    none = torch.zeros(0)
    samples = RaySamples(none.long(), none, 0.1, len(rgb))
    return RenderOutput(rgb, alpha, alpha, none, samples, none, none, none, None)


def test_what_is_switched_off_is_not_learned_and_costs_nothing() -> None:
    off = ViewCorrections(4, CorrectionConfig(pose=False, color=False, robust=False))
    assert off.parameter_groups() == {} and off.penalties() == {}
    origins = torch.randn(2, 3)
    assert off.rays(origins, origins, torch.tensor([1, 2]))[0] is origins
    on = ViewCorrections(4, ALL)
    assert set(on.penalties()) == {"pose_correction", "color_correction"}
    assert len(on.parameter_groups()["views"]) == 2
