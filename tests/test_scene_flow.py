"""Following points of the surface from frame to frame through the views' optical flow."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sv4d_ns.fitting.scene_flow import SceneFlow
from sv4d_ns.geometry.cameras import ViewPlan

SIZE, RADIUS, SPEED = 96, 0.25, torch.tensor([0.03, 0.06, 0.04])


def ball(views: int = 8, frames: int = 2, turn_deg: float = 0.0) -> list[SimpleNamespace]:
    """A textured ball that moves by SPEED and turns about the vertical from each frame to the next."""
    plan = ViewPlan.ring(tuple(360.0 / views * k for k in range(1, views)))
    seen = []
    for c2w in torch.from_numpy(plan.c2w()).float():
        focal = plan.focal_px(SIZE)
        axis = torch.arange(SIZE) + 0.5 - SIZE / 2
        down, right = torch.meshgrid(axis, axis, indexing="ij")
        local = torch.stack([right / focal, -down / focal, -torch.ones_like(right)], -1)
        rays = torch.nn.functional.normalize(local @ c2w[:3, :3].T, dim=-1)
        rgb, alpha = torch.ones(frames, SIZE, SIZE, 3), torch.zeros(frames, SIZE, SIZE)
        for frame in range(frames):
            origin = c2w[:3, 3] - frame * SPEED
            along = -(rays @ origin)
            inside = RADIUS**2 - (origin.square().sum() - along**2)
            hit = inside > 0
            place = origin + rays * (along - inside.clamp(min=0).sqrt())[..., None]
            angle = -np.radians(turn_deg * frame)
            turned = place @ torch.tensor(
                [[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]], dtype=torch.float32
            )
            rgb[frame][hit] = (0.5 + 0.4 * torch.sin(23 * turned + 5 * turned.roll(1, -1)))[hit]
            alpha[frame] = hit.float()
        seen.append(SimpleNamespace(c2w=c2w, focal=focal, rgb=rgb, alpha=alpha))
    return seen


def test_a_moving_ball_is_followed() -> None:
    found = SceneFlow(ball(), half_extent=0.57, start=0).matches(0, 1)
    sure = found.weight > 0.3
    assert sure.float().mean() > 0.3
    missed = (found.after - found.before - SPEED).norm(dim=-1)[sure]
    assert missed.median() < 0.15 * SPEED.norm()


def test_points_before_are_on_the_surface_and_a_turning_ball_turns_them() -> None:
    found = SceneFlow(ball(turn_deg=8.0), half_extent=0.57, start=0).matches(0, 1)
    assert ((found.before.norm(dim=-1) - RADIUS).abs() < 0.05).float().mean() > 0.95
    angle = np.radians(8.0)
    turn = torch.tensor([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]).float()
    truth = found.before @ turn.T + SPEED - found.before
    sure = found.weight > 0.3
    missed = (found.after - found.before - truth).norm(dim=-1)[sure]
    assert missed.median() < 0.25 * truth[sure].norm(dim=-1).median()


def test_the_same_pair_is_found_again_and_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = SceneFlow(ball(), half_extent=0.57, start=0)
    first = flow.matches(0, 1)
    assert torch.equal(SceneFlow(ball(), half_extent=0.57, start=0).matches(0, 1).after, first.after)
    monkeypatch.setattr("sv4d_ns.fitting.scene_flow.optical_flow", lambda *_: pytest.fail("asked twice"))
    assert flow.matches(0, 1) is first


def test_points_are_drawn_by_their_weight_and_none_where_there_is_nothing() -> None:
    views = ball()
    found = SceneFlow(views, half_extent=0.57, start=0).matches(0, 1)
    rng = np.random.default_rng(0)
    before, after = found.draw(4000, rng)
    assert before.shape == after.shape == (4000, 3)
    moved = {tuple(row) for row in found.before[found.weight == 0].tolist()}
    assert not moved & {tuple(row) for row in before.tolist()}
    for view in views:
        view.alpha[1] = 0
    empty = SceneFlow(views, half_extent=0.57, start=0).matches(1, 0)
    assert len(empty.before) == 0 and len(empty.draw(10, rng)[0]) == 0
