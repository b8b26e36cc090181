"""Following points of the surface from frame to frame through the views' optical flow."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sv4d_ns.fitting.frame_order import FrameOrder, order_by_likeness
from sv4d_ns.fitting.local_motion import locally_rigid
from sv4d_ns.fitting.scene_flow import SURE, Matches, SceneFlow, guided_flow, spread_guess
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
    found = SceneFlow(ball(), half_extent=0.57, canonical=0).matches(0, 1)
    sure = found.weight > 0.3
    assert sure.float().mean() > 0.3
    missed = (found.after - found.before - SPEED).norm(dim=-1)[sure]
    assert missed.median() < 0.15 * SPEED.norm()


def test_points_before_are_on_the_surface_and_a_turning_ball_turns_them() -> None:
    found = SceneFlow(ball(turn_deg=8.0), half_extent=0.57, canonical=0).matches(0, 1)
    assert ((found.before.norm(dim=-1) - RADIUS).abs() < 0.05).float().mean() > 0.95
    angle = np.radians(8.0)
    turn = torch.tensor([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]).float()
    truth = found.before @ turn.T + SPEED - found.before
    sure = found.weight > 0.3
    missed = (found.after - found.before - truth).norm(dim=-1)[sure]
    assert missed.median() < 0.25 * truth[sure].norm(dim=-1).median()


def test_the_same_pair_is_found_again_and_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = SceneFlow(ball(), half_extent=0.57, canonical=0)
    first = flow.matches(0, 1)
    assert torch.equal(SceneFlow(ball(), half_extent=0.57, canonical=0).matches(0, 1).after, first.after)
    monkeypatch.setattr("sv4d_ns.fitting.scene_flow.optical_flow", lambda *_: pytest.fail("asked twice"))
    assert flow.matches(0, 1) is first


def test_points_are_drawn_by_their_weight_and_none_where_there_is_nothing() -> None:
    views = ball()
    found = SceneFlow(views, half_extent=0.57, canonical=0).matches(0, 1)
    rng = np.random.default_rng(0)
    before, after = found.draw(4000, rng)
    assert before.shape == after.shape == (4000, 3)
    moved = {tuple(row) for row in found.before[found.weight == 0].tolist()}
    assert not moved & {tuple(row) for row in before.tolist()}
    for view in views:
        view.alpha[1] = 0
    empty = SceneFlow(views, half_extent=0.57, canonical=0).matches(1, 0)
    assert len(empty.before) == 0 and len(empty.draw(10, rng)[0]) == 0


def rotation(degrees: float, axis: int = 2) -> torch.Tensor:
    angle = np.radians(degrees)
    turn = torch.eye(3)
    a, b = [k for k in range(3) if k != axis]
    turn[a, a] = turn[b, b] = float(np.cos(angle))
    turn[a, b], turn[b, a] = float(-np.sin(angle)), float(np.sin(angle))
    return turn


def test_two_rigid_parts_are_told_apart_in_spite_of_wrong_matches() -> None:
    draw = torch.Generator().manual_seed(0)
    body = 0.1 * torch.rand(800, 3, generator=draw)
    limb = body + torch.tensor([0.5, 0.0, 0.0])
    before = torch.cat([body, limb])
    truth = torch.cat([body + 0.02, (limb - 0.5) @ rotation(35.0, 0).T + 0.5])
    after = truth.clone()
    after[::4] += 0.3 * torch.randn(400, 3, generator=draw)
    weight = torch.ones(len(before))
    weight[1::4] = 0  # places that nobody could follow
    after[1::4] = before[1::4]
    found = locally_rigid(before, before, before, after, weight)
    missed = (before + found - truth).norm(dim=-1)
    assert missed.median() < 1e-3 and missed.quantile(0.95) < 0.01


def test_points_of_the_later_moment_go_on_as_they_came() -> None:
    turn = rotation(20.0)
    before = 0.2 * torch.rand(600, 3, generator=torch.Generator().manual_seed(0))
    after = before @ turn.T
    found = locally_rigid(after, after, before, after, torch.ones(600))
    assert torch.allclose(after + found, after @ turn.T, atol=1e-4)


def test_where_nothing_is_known_nothing_moves() -> None:
    x = torch.rand(50, 3)
    assert not locally_rigid(x, x, x, x + 1, torch.zeros(50)).any()
    assert locally_rigid(x[:0], x, x, x + 1, torch.ones(50)).shape == (0, 3)


def test_a_guess_is_kept_where_it_is_given_and_goes_on_where_it_is_not() -> None:
    uv = torch.tensor([[0.25, 0.25], [0.75, 0.75]])
    spread = spread_guess(uv, torch.tensor([[0.1, 0.0], [0.0, -0.2]]), torch.ones(2), 96, 128)
    assert spread.shape == (96, 128, 2)
    assert np.allclose(spread[24, 32], [0.1, 0.0], atol=1e-3) and np.allclose(spread[72, 96], [0.0, -0.2], atol=1e-3)
    assert np.isfinite(spread).all()


def test_flow_beyond_the_reach_of_a_search_is_found_from_a_guess() -> None:
    import cv2

    noise = np.random.default_rng(0).random((128, 128)).astype(np.float32)
    first = (255 * cv2.GaussianBlur(noise, (0, 0), 2.0) ** 2).astype(np.uint8)
    first = cv2.normalize(first, None, 20, 255, cv2.NORM_MINMAX)
    turn = cv2.getRotationMatrix2D((64, 64), -60, 1.0)
    second = cv2.warpAffine(first, turn, (128, 128))
    row, column = np.mgrid[44:84, 44:84]
    truth = (np.stack([column, row, np.ones_like(row)], -1) @ turn.T - np.stack([column, row], -1)) / 128
    everywhere = np.mgrid[0:128, 0:128][::-1].transpose(1, 2, 0)
    rough = cv2.getRotationMatrix2D((64, 64), -54, 1.0)
    guess = (np.dstack([everywhere, np.ones((128, 128))]) @ rough.T - everywhere) / 128

    def missed(start: np.ndarray) -> float:
        flow, _ = guided_flow(first, second, start.astype(np.float32))
        return float(np.median(np.linalg.norm(flow[44:84, 44:84] - truth, axis=-1)) * 128)

    assert missed(np.zeros_like(guess)) > 5 and missed(guess) < 1


def test_a_fast_turn_is_followed_by_the_turn_before_it() -> None:
    turned = ball(turn_deg=24.0, frames=4)
    flow = SceneFlow(turned, half_extent=0.57, canonical=0)
    found = flow.matches(2, 3)
    around = found.before - 2 * SPEED
    truth = around @ rotation(24.0).T + 3 * SPEED
    sure = found.weight > 0.3
    missed = (found.after - truth).norm(dim=-1)[sure]
    moved = (truth - found.before).norm(dim=-1)[sure]
    assert sure.float().mean() > 0.3 and missed.median() < 0.25 * moved.median()


def test_a_clip_that_comes_back_is_followed_from_both_ends() -> None:
    views = ball(frames=8)
    for view in views:  # there and back again: 0 1 2 3 3 2 1 0
        for values in (view.rgb, view.alpha):
            values[4:] = values[:4].flip(0)
    order = SceneFlow(views, half_extent=0.57, canonical=0).order
    assert order.depths[0] == 0 and order.parents[7] == 0 and max(order.depths) <= 4
    straight = SceneFlow(ball(frames=6), half_extent=0.57, canonical=2).order
    assert straight == FrameOrder.outward(6, 2)


def test_alike_is_not_enough_where_motion_cannot_be_found() -> None:
    views = ball(frames=6)
    for view in views:
        for values in (view.rgb, view.alpha):
            values[3:] = values[:3].flip(0)
    asked = []

    def never(known: int, new: int) -> bool:
        asked.append((known, new))
        return False

    assert order_by_likeness(views, 0, never) == FrameOrder.outward(6, 0)
    assert asked and all(abs(a - b) > 1 for a, b in asked)
    assert SceneFlow(views, half_extent=0.57, canonical=0).matches(0, 5).confidence >= SURE


def test_a_clip_of_many_frames_can_be_asked_for_its_last_pair_first(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = SceneFlow([], half_extent=0.57, canonical=0)
    flow.__dict__["order"] = FrameOrder.outward(1500, 0)
    point, asked = torch.zeros(1, 3), []
    monkeypatch.setattr(flow, "_surface", lambda frame: SimpleNamespace(x=point))

    def follow(surface: object, known: int, new: int, guess: torch.Tensor) -> Matches:
        asked.append((known, new))
        return Matches(point, point, torch.zeros(1))

    monkeypatch.setattr(flow, "_follow", follow)
    assert len(flow.matches(1498, 1499).before) == 1
    assert set(asked) == {(frame, frame + 1) for frame in range(1499)}


def test_a_clip_that_stands_still_has_an_order() -> None:
    views = ball(frames=5)
    for view in views:
        for values in (view.rgb, view.alpha):
            values[:] = values[:1].clone()
    order = SceneFlow(views, half_extent=0.57, canonical=2).order
    assert order.depths[2] == 0 and all(0 <= parent < 5 for parent in order.parents)
