"""Which pixels a step draws, what they count, and how silhouettes bound the object."""

import numpy as np
import pytest
import torch

from sv4d_ns.cameras import ViewPlan
from sv4d_ns.fitting import BatchConfig, BatchSampler, closed, hull_views, largest_silhouette, train_views
from sv4d_ns.sampling import ScheduleConfig, Window
from sv4d_ns.views import ViewGrid


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
    draw = lambda seed, step: BatchSampler(views, config, ScheduleConfig(), seed).draw(step, Window(1, 3), 2)  # noqa: E731
    first, again, other = draw(0, 7), draw(0, 7), draw(0, 8)
    assert torch.equal(first.rgb, again.rgb) and torch.equal(first.origins, again.origins)
    assert not torch.equal(first.origins, other.origins) or not torch.equal(first.directions, other.directions)
    assert len(first.rgb) == 128 + 2 * 16 * 16
    assert set(np.round(first.times[:, 0].numpy() * 4).astype(int)) <= {1, 2, 3}
    torch.testing.assert_close(first.directions.norm(dim=-1), torch.ones(len(first.rgb)))


def test_half_of_the_single_rays_look_through_the_input_camera() -> None:
    views = train_views(grid(), "cpu")
    batch = BatchSampler(views, BatchConfig(rays=200, patches=0), ScheduleConfig(), 0).draw(0, Window(0, 2), 1)
    from_input = (batch.origins - views[0].c2w[:3, 3]).norm(dim=-1) < 1e-5
    assert float(from_input.float().mean()) >= 0.5


def test_targets_stand_on_the_step_s_background() -> None:
    views = train_views(grid(), "cpu")
    batch = BatchSampler(views, BatchConfig(rays=400, patches=0), ScheduleConfig(), 0).draw(3, Window(0, 2), 1)
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
